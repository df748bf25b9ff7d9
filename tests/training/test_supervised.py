"""What is opened, loaded and computed when a classifier is trained, and what is refused before that."""

import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from classifier_runs import (
    COLOURS,
    EVERYTHING,
    NOTHING,
    SMALL,
    as_a_new_process,
    places,
    save_encoder,
    weights,
    write_colours,
)
from safetensors.torch import save_file
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

from modeling_micl import MiclForImageClassification, MiclForPreTraining
from training.augment import Augmentation
from training.batch import Batch
from training.classifier_config import FinetuneConfig
from training.optim import layer_decay_optimizer
from training.results import save_model
from training.run import Run
from training.supervised import Classify, build_classifier, open_classes


NAMES = list(COLOURS)[:4]
IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., FinetuneConfig]:
    """Build the settings of a small run; keywords replace single values."""
    return lambda **overrides: FinetuneConfig(**(places(tmp_path) | SMALL | NOTHING | overrides))


@pytest.fixture
def pretrained(tmp_path: Path) -> MiclForPreTraining:
    """What lies in `encoder`."""
    return save_encoder(tmp_path / "encoder")


@pytest.fixture
def stored_classifier(tmp_path: Path, pretrained: MiclForPreTraining, config: Callable[..., FinetuneConfig]) -> str:
    """A classifier with mean pooling whose weights are not the initial ones."""
    model = build_classifier(config(), NAMES, classifier_pooling="mean")
    with torch.no_grad():
        model.fc_norm.weight.add_(0.5)
        model.vit.layers[0].mlp.fc1.bias.add_(0.5)
    save_model(model, tmp_path / "classifier")
    return str(tmp_path / "classifier")


def same(some: torch.nn.Module, others: torch.nn.Module) -> bool:
    pairs = zip(some.state_dict().items(), others.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


# Where the weights come from


def test_a_head_on_cls_sees_what_pre_training_learned(
    pretrained: MiclForPreTraining, config: Callable[..., FinetuneConfig]
) -> None:
    model = build_classifier(config(), NAMES, classifier_pooling="cls").eval()
    assert same(model.vit, pretrained.vit)
    torch.testing.assert_close(model(IMAGES).logits, model.classifier(pretrained.vit(IMAGES).pooler_output))


def test_a_head_on_the_mean_has_a_fresh_norm_instead_of_the_encoders(
    pretrained: MiclForPreTraining, config: Callable[..., FinetuneConfig]
) -> None:
    assert pretrained.vit.layernorm.weight.std() > 0.01
    model = build_classifier(config(), NAMES, classifier_pooling="mean").eval()
    stored, expected = model.vit.state_dict(), pretrained.vit.state_dict()
    assert expected.keys() - stored.keys() == {"layernorm.weight", "layernorm.bias"}
    assert all(torch.equal(stored[name], expected[name]) for name in stored)
    assert (model.fc_norm.weight == 1).all()
    tokens = pretrained.vit(IMAGES, output_hidden_states=True).hidden_states[-1]
    pooled = torch.nn.functional.layer_norm(tokens[:, 1:].mean(dim=1), (32,), eps=1e-6)
    torch.testing.assert_close(model(IMAGES).logits, model.classifier(pooled))


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_random_weights_are_random_and_their_own_every_time(
    pooling: str, pretrained: MiclForPreTraining, config: Callable[..., FinetuneConfig]
) -> None:
    one, again, other = (
        build_classifier(config(random_init=True, seed=seed), NAMES, classifier_pooling=pooling) for seed in (0, 0, 1)
    )
    assert same(one, again)
    trained = pretrained.vit.state_dict()
    for name, values in one.vit.state_dict().items():
        if values.ndim > 1 and name != "embeddings.position_embeddings":
            for others in (trained[name], other.vit.state_dict()[name]):
                assert abs(torch.corrcoef(torch.stack([values.flatten(), others.flatten()]))[0, 1]) < 0.5, name
    assert not torch.equal(one.classifier.weight, other.classifier.weight)


def test_the_head_depends_on_the_seed_alone(
    pretrained: MiclForPreTraining, config: Callable[..., FinetuneConfig]
) -> None:
    heads = []
    for number, seed in enumerate((3, 3, 4)):
        torch.manual_seed(number)
        heads.append(build_classifier(config(seed=seed), NAMES).classifier.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_the_classes_and_changes_are_in_the_configuration(
    pretrained: MiclForPreTraining, config: Callable[..., FinetuneConfig]
) -> None:
    built = build_classifier(config(), NAMES, classifier_pooling="cls", drop_path_rate=0.3).config
    assert built.id2label == {0: "red", 1: "green", 2: "blue", 3: "yellow"}
    assert built.label2id == {"red": 0, "green": 1, "blue": 2, "yellow": 3}
    assert (built.num_labels, built.classifier_pooling, built.drop_path_rate) == (4, "cls", 0.3)
    assert (built.hidden_size, built.image_size) == (32, 16)


def test_a_classifier_keeps_its_head_and_pooling(
    stored_classifier: str, config: Callable[..., FinetuneConfig]
) -> None:
    model = build_classifier(
        config(model=stored_classifier), NAMES, new_head=False, classifier_pooling="cls", drop_path_rate=0.2
    )
    assert same(model, MiclForImageClassification.from_pretrained(stored_classifier))
    assert (model.config.classifier_pooling, model.config.drop_path_rate) == ("mean", 0.2)


def test_a_classifier_of_other_classes_needs_a_new_head(
    stored_classifier: str, config: Callable[..., FinetuneConfig]
) -> None:
    settings = config(model=stored_classifier)
    with pytest.raises(ValueError, match=r"has 4 classes, but the dataset has 3.*--new_head"):
        build_classifier(settings, NAMES[:3], new_head=False)
    with pytest.raises(ValueError, match=r"differ \(label: head, dataset\): 0: 'red', 'green'; 1: 'green', 'red'"):
        build_classifier(settings, ["green", "red", *NAMES[2:]], new_head=False)
    model = build_classifier(settings, NAMES[:3], new_head=True)
    assert same(model.vit, MiclForImageClassification.from_pretrained(stored_classifier).vit)
    assert model.classifier.out_features == 3


# Models that cannot be used


def test_other_models_are_refused(tmp_path: Path, config: Callable[..., FinetuneConfig]) -> None:
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    ViTForImageClassification(ViTConfig(**size, image_size=16, patch_size=4)).save_pretrained(tmp_path / "vit")
    (tmp_path / "empty").mkdir()
    for name, reason in (
        ("vit", "is a 'vit' model, not a 'micl' one"),
        ("empty", "is no model: it has no config.json"),
        ("nowhere", "is no local path, and not a model on the Hub, .*check the path"),
    ):
        with pytest.raises(ValueError, match=rf"--model '.*{name}' {reason}"):
            build_classifier(config(model=str(tmp_path / name)), NAMES)


@pytest.mark.parametrize("lost", ["vit.layers.1.mlp.fc2.weight", "classifier.weight", "fc_norm.bias"])
def test_a_model_that_lacks_weights_is_refused(
    lost: str, tmp_path: Path, stored_classifier: str, config: Callable[..., FinetuneConfig]
) -> None:
    kept = {name: values for name, values in weights(Path(stored_classifier)).items() if name != lost}
    save_file(kept, tmp_path / "classifier" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"lacks weights, as '{lost}' \(1 in all\)"):
        build_classifier(config(model=stored_classifier), NAMES, new_head=False)
    if lost.startswith("vit."):
        with pytest.raises(ValueError, match="lacks weights"):
            build_classifier(config(model=stored_classifier), NAMES, new_head=True)


# Data


def opened(config: FinetuneConfig) -> Any:
    with as_a_new_process(Path(config.dataset).parent / "cache"):
        return open_classes(config, Accelerator())


def test_both_splits_and_the_classes_are_found(tmp_path: Path, config: Callable[..., FinetuneConfig]) -> None:
    data = write_colours(tmp_path / "data", "train", 9)
    source, eval_source, names = opened(config())
    assert (source.split, source.num_images, eval_source, names) == ("train", 9, None, NAMES)
    for split, length in (("test", 6), ("validation", 7)):
        write_colours(data, split, length)
    source, eval_source, names = opened(config(max_images=4))
    assert (source.num_images, eval_source.split, eval_source.num_images) == (4, "validation", 7)
    assert opened(config(eval_split="test"))[1].num_images == 6


def test_classes_may_be_folders(
    tmp_path: Path, config: Callable[..., FinetuneConfig], write_image_folder: Any
) -> None:
    shutil.move(write_image_folder(6), tmp_path / "data")
    assert opened(config())[2] == ["even", "odd"]


def write_bad_data(data: Path, defect: str) -> None:
    """A good train and a good test split, but for one defect."""
    write_colours(data, "train", 8)
    write_colours(data, "test", 8)
    split = "test" if "test" in defect else "train"
    if "unlabelled" in defect:
        write_colours(data, split, 8, labels=[-1] * 8)
    elif "one label missing" in defect:
        write_colours(data, split, 8, labels=[0, 1, 2, 3, None, 1, 2, 3])
    elif "empty" in defect:
        write_colours(data, split, 0)
    elif defect == "no label column":
        (data / "data" / "test-00000-of-00001.parquet").unlink()
        write_colours(data, "train", 8, labels=["a"] * 8, kind=datasets.Value("string"))
    elif defect == "integers":
        (data / "data" / "test-00000-of-00001.parquet").unlink()
        write_colours(data, "train", 8, kind=datasets.Value("int64"))
    elif "out of range" in defect:
        good = pq.read_table(file := data / "data" / f"{split}-00000-of-00001.parquet")
        write_colours(data, split, 8, labels=[0, 1, 2, 3, 9, 1, 2, 3], kind=datasets.Value("int64"))
        pq.write_table(pq.read_table(file).replace_schema_metadata(good.schema.metadata), file)
    elif defect == "fewer classes in test":
        write_colours(data, "test", 8, classes=3)
    elif defect == "another order in test":
        write_colours(data, "test", 8, kind=datasets.ClassLabel(names=sorted(NAMES)))


DEFECTS = {
    "no label column": "has no label column.*--label_column",
    "integers": "--label_column 'label' of the split 'train' is Value.*cast it",
    "unlabelled train": "split 'train' is unlabelled",
    "unlabelled test": "split 'test' is unlabelled: choose another one with.*--eval_split",
    "one label missing in train": r"split 'train' has labels outside 0 ≤ label < 4, as -1 \(1 of 8",
    "one label missing in test": r"split 'test' has labels outside 0 ≤ label < 4, as -1 \(1 of 8",
    "out of range in train": r"split 'train' has labels outside 0 ≤ label < 4, as 9 \(1 of 8",
    "out of range in test": r"split 'test' has labels outside 0 ≤ label < 4, as 9 \(1 of 8",
    "fewer classes in test": "splits 'train' and 'test' have different classes.*first of 4 and 3",
    "another order in test": "splits 'train' and 'test' have different classes, or in another order.*'blue'",
    "empty train": "split 'train' of .* is empty",
    "empty test": "split 'test' of .* is empty",
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_bad_data_is_refused(defect: str, tmp_path: Path, config: Callable[..., FinetuneConfig]) -> None:
    write_bad_data(tmp_path / "data", defect)
    with pytest.raises(ValueError, match=DEFECTS[defect]):
        opened(config(label_column="label" if defect == "integers" else None))


# A forward pass


@pytest.fixture
def task(tmp_path: Path, pretrained: MiclForPreTraining, config: Callable[..., FinetuneConfig]) -> Iterator[Classify]:
    """A run with everything random."""
    write_colours(tmp_path / "data", "train", 16)
    settings = config(**EVERYTHING)
    augmentation = Augmentation(
        **{name: EVERYTHING[name] for name in EVERYTHING if name in Augmentation.__dataclass_fields__}
    )
    with as_a_new_process(tmp_path / "cache"):
        accelerator = Accelerator()
        source, _, names = open_classes(settings, accelerator)
        model = build_classifier(settings, names, drop_path_rate=0.5)
        run = Run.start(settings, accelerator, source, model, layer_decay_optimizer(model, 0.05, 0.65, (0.9, 0.999)))
        run.model.train()
        yield Classify(run, settings, augmentation, None)


def loss_of(task: Classify, forward: int = 0) -> Tensor:
    pixels = torch.randint(0, 256, (4, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    task.run.progress.forwards = forward
    return task.forward(Batch(pixels, torch.tensor([0, 1, 2, 3]), torch.arange(4), [])).loss


def test_what_is_random_follows_from_the_forward_pass(task: Classify, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not from what was drawn before, so that resumed runs go on as if nothing had happened."""
    first = loss_of(task)
    random.seed(7)
    np.random.seed(7)  # noqa: NPY002
    torch.manual_seed(7)
    assert torch.equal(loss_of(task), first)
    assert not torch.equal(loss_of(task, forward=1), first)
    monkeypatch.setattr(task.config, "seed", 1)
    assert not torch.equal(loss_of(task), first)
    monkeypatch.setattr(task.config, "seed", 0)
    monkeypatch.setattr(task.run.accelerator.state, "process_index", 1)
    assert not torch.equal(loss_of(task), first)


@pytest.mark.parametrize(("label", "said"), [(-1, "as -1"), (4, "as 4")])
def test_a_wrong_label_in_the_stream_is_refused(label: int, said: str, task: Classify) -> None:
    """Where the labels could not all be read before."""
    batch = Batch(torch.zeros(2, 16, 16, 3, dtype=torch.uint8), torch.tensor([1, label]), torch.arange(2), [])
    with pytest.raises(ValueError, match=re.escape(f"labels outside 0 ≤ label < 4, {said}")):
        task.forward(batch)
