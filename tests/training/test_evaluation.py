"""What the evaluation programs share: settings, models of either kind, classes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from modeling_micl import MiclForImageClassification, MiclForPreTraining, MiclModel, MiclPreTrainedModel
from training.evaluation import (
    EvaluationSettings,
    FrozenSettings,
    check_same_classes,
    load_classifier,
    load_encoder,
    load_frozen,
    open_labelled,
    predict,
)
from training.results import save_model
from training.source import open_source


Model = Callable[..., MiclPreTrainedModel]
Write = Callable[..., Path]


# Settings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": None}, "model is not set.*--model"),
        ({"model": "no/such/folder"}, "'no/such/folder' is no local folder: say with --output_dir"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"max_images": 0}, "max_images must be at least 1, got 0"),
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
        ({"few_shot": [0.1, 0.0]}, r"few_shot takes shares in \(0, 1\], got 0.0"),
        ({"few_shot": [1.1]}, r"few_shot takes shares in \(0, 1\], got 1.1"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        FrozenSettings(**({"model": str(tmp_path)} | settings)).validate()


def test_results_go_beside_the_model_unless_a_folder_is_named(tmp_path: Path) -> None:
    EvaluationSettings(model=str(tmp_path)).validate()
    assert EvaluationSettings(model=str(tmp_path)).results_folder() == tmp_path
    elsewhere = EvaluationSettings(model="somebody/model", output_dir="results")
    elsewhere.validate()
    assert elsewhere.results_folder() == Path("results")


def test_the_two_splits_are_opened_in_order(write_shards: Write) -> None:
    write_shards(5, split="other")
    folder = str(write_shards(7))
    with pytest.raises(ValueError, match="has no validation or test split: name one with --eval_split"):
        open_labelled(EvaluationSettings(dataset=folder))
    train, test = open_labelled(EvaluationSettings(dataset=folder, eval_split="other"))
    assert (train.split, train.num_images, test.split, test.num_images) == ("train", 7, "other", 5)


# Models


@pytest.fixture
def folders(tmp_path: Path, tiny_model: Model) -> dict[str, Path]:
    """A pre-trained encoder and classifiers of either pooling, as they are saved."""
    models = {"encoder": tiny_model(MiclForPreTraining)}
    for pooling in ("mean", "cls"):
        models[pooling] = tiny_model(MiclForImageClassification, num_labels=5, classifier_pooling=pooling)
    for name, model in models.items():
        save_model(model, tmp_path / name)
    return {name: tmp_path / name for name in models}


@pytest.mark.parametrize("model_type", ["micl", "else", None])
def test_no_code_of_a_model_folder_is_run_and_nobody_is_asked(
    model_type: str | None, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, marker = folders["encoder"] / "config.json", tmp_path / "ran"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": model_type}))
    for file in folders["encoder"].glob("*.py"):
        file.write_text(f"open({str(marker)!r}, 'w')\n{file.read_text()}")
    questions: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question: questions.append(question) or "y")
    for load in (load_frozen, load_encoder):
        if model_type == "micl":
            assert isinstance(load(str(folders["encoder"])), MiclModel)
        else:
            with pytest.raises(ValueError, match="--model"):
                load(str(folders["encoder"]))
    assert (questions, marker.exists()) == ([], False)


@torch.no_grad()
def test_an_encoder_comes_back_in_evaluation_mode(
    folders: dict[str, Path], tiny_model: Model, pixel_values: torch.Tensor
) -> None:
    expected = tiny_model(MiclForPreTraining).vit(pixel_values).last_hidden_state
    loaded = load_frozen(str(folders["encoder"]))
    assert isinstance(loaded, MiclModel)
    assert not loaded.training
    assert torch.equal(loaded(pixel_values).last_hidden_state, expected)


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_of_a_frozen_classifier_only_the_last_layer_is_gone(
    pooling: str, folders: dict[str, Path], tiny_model: Model, pixel_values: torch.Tensor
) -> None:
    whole, frozen = load_classifier(str(folders[pooling])), load_frozen(str(folders[pooling]))
    assert not whole.training
    assert not frozen.training
    original = tiny_model(MiclForImageClassification, num_labels=5, classifier_pooling=pooling)
    assert torch.equal(whole(pixel_values).logits, original(pixel_values).logits)
    assert frozen(pixel_values).logits.shape == (3, 32)
    assert torch.equal(original.classifier(frozen(pixel_values).logits), whole(pixel_values).logits)


@pytest.mark.parametrize("name", ["encoder", "mean"])
def test_random_weights_are_those_of_the_seed(name: str, folders: dict[str, Path]) -> None:
    def weight(**options: Any) -> torch.Tensor:
        torch.manual_seed(99)
        model = load_frozen(str(folders[name]), **options)
        assert not model.training
        return dict(model.named_parameters())[f"{'' if name == 'encoder' else 'vit.'}layers.1.mlp.fc1.weight"]

    first = weight(random_init=True, seed=1)
    assert torch.equal(weight(random_init=True, seed=1), first)
    assert not torch.equal(weight(random_init=True, seed=2), first)
    assert not torch.equal(weight(seed=1), first)
    assert torch.equal(weight(seed=1), weight(seed=2))


@pytest.mark.parametrize("random_init", [False, True])
def test_it_is_told_whose_features_are_judged(random_init: bool, folders: dict[str, Path]) -> None:
    """A classifier pools as it was built, whatever `features` says."""
    told = {
        (name, pooling): FrozenSettings(model=str(folder), features=pooling, random_init=random_init).whose()
        for name, folder in folders.items()
        for pooling in ("cls", "mean")
    }
    whole = "random weights" if random_init else "the encoder"
    assert (told["encoder", "cls"], told["encoder", "mean"]) == (f"cls of {whole}", f"mean of {whole}")
    for name in ("cls", "mean"):
        assert told[name, "cls"] == told[name, "mean"]
        assert "head" in told[name, "cls"]
        assert ("random weights" in told[name, "cls"]) == random_init


def test_an_encoder_without_a_head_is_no_classifier(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"encoder' has no classification head: train one with training.finetune"):
        load_classifier(str(folders["encoder"]))


def test_an_encoder_that_lacks_weights_is_refused(folders: dict[str, Path]) -> None:
    """Its layers would be random, and nothing would tell."""
    file = folders["encoder"] / "model.safetensors"
    weights = load_file(file)
    del weights["vit.layers.1.mlp.fc1.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights, as 'layers.1.mlp.fc1.weight' \(1 in all\)"):
        load_encoder(str(folders["encoder"]))


# Classes


NAMES = ["cat", "dog", "owl"]


def test_the_classes_of_head_and_data_must_be_the_same(tiny_model: Model) -> None:
    labels = dict(enumerate(NAMES))
    config = tiny_model(MiclForImageClassification, id2label=labels, label2id={n: i for i, n in labels.items()}).config
    check_same_classes(config, NAMES, "a model")
    with pytest.raises(ValueError, match="'a model' has 3 classes, but the dataset has 2.*--new_head"):
        check_same_classes(config, ["cat", "dog"], "a model")
    with pytest.raises(ValueError, match=r"differ \(label: head, dataset\): 1: 'dog', 'owl'; 2: 'owl', 'dog'"):
        check_same_classes(config, ["cat", "owl", "dog"], "a model")


# Predictions


@torch.no_grad()
def test_predictions_are_the_logits_of_every_image_in_the_order_of_the_data(
    tiny_model: Model, write_shards: Write, no_accelerator: None
) -> None:
    """Also if dropout was on before: a share of the images would get other scores each time."""
    model = tiny_model(MiclForImageClassification, num_labels=4, hidden_dropout_prob=0.5).train()
    assert isinstance(model, MiclForImageClassification)
    source = open_source(str(write_shards(3, 20, 0, 4)))
    first, labels = predict(Accelerator(), model, source, None, 0)
    again, _ = predict(Accelerator(), model, source, None, 0)
    assert torch.equal(first, again)
    assert first.shape == (27, 4)
    assert labels.tolist() == [number % 4 for number in range(27)]
    part, labels_of_part = predict(Accelerator(), model, source, 9, 0)  # the heads of the shards
    heads = [0, *range(3, 9), 23, 24]
    assert labels_of_part.tolist() == labels[heads].tolist()
    torch.testing.assert_close(part, first[heads])
