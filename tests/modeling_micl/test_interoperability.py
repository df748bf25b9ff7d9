"""A saved folder works where users will put it: stock ViT, the Auto classes, pipelines."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
    pipeline,
)

from modeling_micl import (
    MiclBackbone,
    MiclConfig,
    MiclForImageClassification,
    MiclForPreTraining,
    MiclModel,
    MiclPreTrainedModel,
)


Model = Callable[..., MiclPreTrainedModel]
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
LABELS = {0: "cat", 1: "dog", 2: "owl"}


@pytest.fixture
def pretrained(tiny_model: Model, tmp_path: Path) -> Path:
    """Folder of a pre-trained model and its image processor."""
    tiny_model(MiclForPreTraining).save_pretrained(tmp_path)
    processor = ViTImageProcessor(
        size={"height": 32, "width": 32},
        resample=3,
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
        do_convert_rgb=True,
    )
    processor.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))


@pytest.mark.parametrize("model_class", [MiclModel, MiclForPreTraining])
def test_stock_vit_loads_every_weight_and_gives_the_same_output(
    model_class: type[MiclPreTrainedModel], tiny_model: Model, pixel_values: Tensor, tmp_path: Path
) -> None:
    model = tiny_model(model_class)
    encoder = model if model_class is MiclModel else model.vit
    encoder.embeddings.position_embeddings.normal_()  # not even [CLS] has position zero
    model.save_pretrained(tmp_path)
    stock, info = ViTModel.from_pretrained(tmp_path, add_pooling_layer=False, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(stock(pixel_values).last_hidden_state, encoder(pixel_values).last_hidden_state)


def test_dropout_is_where_stock_vit_has_it(tiny_model: Model, pixel_values: Tensor, tmp_path: Path) -> None:
    model = tiny_model(MiclModel, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3)
    model.save_pretrained(tmp_path)
    outputs = []
    for encoder in (model, ViTModel.from_pretrained(tmp_path, add_pooling_layer=False)):
        torch.manual_seed(3)
        outputs.append(encoder.train()(pixel_values).last_hidden_state)
    assert torch.equal(*outputs)
    assert not torch.allclose(outputs[0], model.eval()(pixel_values).last_hidden_state)


def test_auto_image_processor_falls_back_on_the_model_type(pretrained: Path) -> None:
    path = pretrained / "preprocessor_config.json"
    values = json.loads(path.read_text())
    del values["image_processor_type"]
    path.write_text(json.dumps(values))
    processor = AutoImageProcessor.from_pretrained(pretrained)
    assert isinstance(processor, ViTImageProcessor)
    assert list(processor.image_mean) == IMAGENET_MEAN


def test_stock_vit_loads_a_classifier_on_cls(tiny_model: Model, pixel_values: Tensor, tmp_path: Path) -> None:
    model = tiny_model(MiclForImageClassification, num_labels=5, classifier_pooling="cls")
    model.save_pretrained(tmp_path)
    stock, info = ViTForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(stock(pixel_values).logits, model(pixel_values).logits)


@pytest.mark.parametrize(
    ("auto", "expected"),
    [
        (AutoModel, MiclModel),
        (AutoModelForPreTraining, MiclForPreTraining),
        (AutoModelForImageClassification, MiclForImageClassification),
    ],
)
def test_auto_classes_know_the_models(auto: type, expected: type, pretrained: Path) -> None:
    assert type(auto.from_pretrained(pretrained)) is expected
    assert type(auto.from_config(AutoConfig.from_pretrained(pretrained))) is expected


def test_auto_config_finds_the_configuration(pretrained: Path) -> None:
    config = AutoConfig.from_pretrained(pretrained, temperature=0.2)
    assert type(config) is MiclConfig
    assert config.temperature == 0.2
    assert type(AutoConfig.for_model("micl")) is MiclConfig


def test_auto_image_processor_normalises_as_imagenet(pretrained: Path) -> None:
    processor = AutoImageProcessor.from_pretrained(pretrained)
    gray = Image.fromarray(np.full((40, 50), 255, dtype=np.uint8))
    pixel_values = processor(gray, return_tensors="pt").pixel_values
    expected = (1 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    torch.testing.assert_close(pixel_values, expected.view(1, 3, 1, 1).expand(1, 3, 32, 32))


def test_auto_backbone_builds_from_a_config(tiny_config: Callable[..., MiclConfig], pixel_values: Tensor) -> None:
    backbone = AutoBackbone.from_config(tiny_config(out_features=["stem", "stage2"]))
    assert type(backbone) is MiclBackbone
    assert [tuple(maps.shape) for maps in backbone(pixel_values).feature_maps] == [(3, 32, 4, 4)] * 2


def test_a_backbone_of_chosen_stages_loads_from_a_pretraining_folder(pretrained: Path, pixel_values: Tensor) -> None:
    backbone, info = MiclBackbone.from_pretrained(
        pretrained, out_features=["stage1", "stage2"], output_loading_info=True
    )
    assert not any(info.values())
    encoder = MiclModel.from_pretrained(pretrained)
    hidden_states = encoder(pixel_values, output_hidden_states=True).hidden_states
    feature_maps = backbone(pixel_values).feature_maps
    for feature_map, tokens in zip(feature_maps, hidden_states[1:], strict=True):
        assert torch.equal(feature_map.flatten(2).transpose(1, 2), encoder.layernorm(tokens)[:, 1:])


@pytest.mark.parametrize(
    ("pooling", "head"),
    [
        ("mean", {"fc_norm.weight", "fc_norm.bias", "classifier.weight", "classifier.bias"}),
        ("cls", {"classifier.weight", "classifier.bias"}),
    ],
)
def test_a_classifier_of_a_pretraining_folder_lacks_only_its_head(
    pooling: str, head: set[str], pretrained: Path
) -> None:
    model, info = MiclForImageClassification.from_pretrained(
        pretrained, num_labels=3, classifier_pooling=pooling, output_loading_info=True
    )
    assert info.pop("missing_keys") == head
    assert not any(info.values())
    encoder = MiclModel.from_pretrained(pretrained)
    for name, parameter in model.vit.named_parameters():
        assert torch.equal(parameter, encoder.get_parameter(name))


def test_a_finetuned_folder_can_get_another_number_of_labels(tiny_model: Model, tmp_path: Path) -> None:
    tiny_model(MiclForImageClassification, num_labels=5).save_pretrained(tmp_path)
    model, info = MiclForImageClassification.from_pretrained(
        tmp_path, num_labels=3, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {name for name, *_ in info["mismatched_keys"]} == {"classifier.weight", "classifier.bias"}
    assert model.classifier.weight.shape == (3, 32)


def test_the_feature_extraction_pipeline_returns_the_encoders_tokens(pretrained: Path, photo: Image.Image) -> None:
    features = pipeline("image-feature-extraction", model=str(pretrained))(photo)
    pixel_values = AutoImageProcessor.from_pretrained(pretrained)(photo, return_tensors="pt").pixel_values
    expected = MiclModel.from_pretrained(pretrained)(pixel_values).last_hidden_state
    torch.testing.assert_close(torch.tensor(features), expected)


def test_the_classification_pipeline_names_the_labels(pretrained: Path, photo: Image.Image, tiny_model: Model) -> None:
    model = tiny_model(MiclForImageClassification, id2label=LABELS, label2id={v: k for k, v in LABELS.items()})
    model.save_pretrained(pretrained)
    answers = pipeline("image-classification", model=str(pretrained))(photo)
    pixel_values = AutoImageProcessor.from_pretrained(pretrained)(photo, return_tensors="pt").pixel_values
    probabilities = model(pixel_values).logits.softmax(-1)[0]
    assert {answer["label"]: answer["score"] for answer in answers} == pytest.approx(
        {name: probabilities[label].item() for label, name in LABELS.items()}, abs=1e-5
    )
