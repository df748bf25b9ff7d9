"""Settings: their ranges, what follows from them, and the recipes."""

import json
import math
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from training import config as config_module
from training.classifier_config import FinetuneConfig, ProbeConfig
from training.config import PretrainConfig, TrainingSettings
from training.parser import parse_settings


RECIPES = sorted((Path(config_module.__file__).parent / "recipes").glob("*.yaml"))
KINDS: dict[str, type[TrainingSettings]] = {
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
    "linear_probe": ProbeConfig,
}


IMPOSSIBLE = {
    "per_device_batch_size": 0,
    "gradient_accumulation_steps": 0,
    "epochs": 0,
    "logging_steps": 0,
    "save_steps": 0,
    "max_images": 0,
    "max_steps": 0,
    "save_total_limit": 0,
    "keep_every_steps": -1,
    "shuffle_window": 0,
    "num_workers": -1,
    "knn_epochs": -1,
    "knn_images": -1,
    "warmup_epochs": -0.5,
    "base_lr": -1e-9,
    "seed": -1,
    "weight_decay": -0.1,
    "max_grad_norm": -1.0,
    "adam_beta1": 1.0,
    "adam_beta2": -0.1,
    "crop_min_scale": 0.0,
    "max_bad_fraction": 1.1,
    "image_size": [64, 64, 64],
    "patch_size": [5],
    "hidden_size": 770,
    "num_attention_heads": 7,
    "num_hidden_layers": 0,
    "mask_ratio": 1.0,
    "num_views": 1,
    "views_per_decode": 0,
    "temperature": 0.0,
    "kappa": -0.5,
    "resume": "no/such/folder",
}


@pytest.mark.parametrize(("name", "value"), IMPOSSIBLE.items(), ids=IMPOSSIBLE)
def test_an_impossible_value_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name) as refused:
        PretrainConfig(**{name: value}).validate()
    assert str(value[0] if isinstance(value, list) else value) in str(refused.value)


def test_every_kth_checkpoint_must_be_one_that_is_written() -> None:
    with pytest.raises(ValueError, match="keep_every_steps=1500 must be a multiple of save_steps=1000"):
        PretrainConfig(keep_every_steps=1500).validate()
    PretrainConfig(keep_every_steps=2000).validate()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("crop_min_scale", (1.0, 1e-3)),
        ("max_bad_fraction", (0.0, 1.0)),
        ("adam_beta1", (0.0, 0.999)),
        ("warmup_epochs", (0, 199.9)),
        ("num_workers", (0,)),
        ("max_grad_norm", (None, 1.0)),
        ("mask_ratio", (0.0,)),
        ("image_size", ([32], [32, 64])),
    ],
)
def test_the_edges_of_a_range_are_allowed(name: str, values: tuple[Any, ...]) -> None:
    for value in values:
        PretrainConfig(**({"mask_ratio": 0.5, "patch_size": [8]} | {name: value})).validate()


@pytest.mark.parametrize(
    "name", ["temperature", "kappa", "mask_ratio", "base_lr", "crop_min_scale", "adam_beta2", "warmup_epochs"]
)
def test_a_value_that_is_no_number_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        PretrainConfig(**{name: math.nan}).validate()


def test_warmup_must_end_before_training_does() -> None:
    with pytest.raises(ValueError, match="warmup_epochs=10 must be less than epochs=10"):
        PretrainConfig(epochs=10).validate()


def test_resume_takes_an_existing_folder(tmp_path: Path) -> None:
    PretrainConfig(resume=str(tmp_path)).validate()


def test_trackers_are_a_list() -> None:
    assert PretrainConfig(report_to="none").trackers() == []
    assert PretrainConfig(report_to="tensorboard, wandb").trackers() == ["tensorboard", "wandb"]


def test_the_model_gets_the_settings() -> None:
    model = PretrainConfig(image_size=[64, 96], patch_size=[16], hidden_size=32, num_attention_heads=2, kappa=0.1)
    built = model.model_config()
    assert (built.image_size, built.patch_size, built.hidden_size, built.intermediate_size) == ([64, 96], 16, 32, 128)
    assert (built.kappa, built.mask_ratio, built.negatives) == (0.1, 0.9, "local")


IMPOSSIBLE_IN_FINETUNING = {
    "eval_epochs": -1,
    "erasing_probability": 1.5,
    "mixup_alpha": -0.1,
    "cutmix_alpha": -1,
    "label_smoothing": 1.0,
    "drop_path_rate": 1.0,
    "layer_decay": 0.0,
    "min_lr": -1e-9,
    "ema_decay": 1.0,
    "per_device_batch_size": 127,
    "epochs": 0,
}


@pytest.mark.parametrize(("name", "value"), IMPOSSIBLE_IN_FINETUNING.items(), ids=IMPOSSIBLE_IN_FINETUNING)
def test_an_impossible_value_is_refused_in_finetuning_too(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name) as refused:
        FinetuneConfig(model="somewhere", **{name: value}).validate()
    assert str(value) in str(refused.value)


def test_an_odd_batch_is_refused_only_where_images_are_paired() -> None:
    for unpaired in ({"mixup_alpha": 0}, {"cutmix_alpha": 0}):
        with pytest.raises(ValueError, match="per_device_batch_size=7 must be even"):
            FinetuneConfig(model="somewhere", per_device_batch_size=7, **unpaired).validate()
    FinetuneConfig(model="somewhere", per_device_batch_size=7, mixup_alpha=0, cutmix_alpha=0).validate()


def test_a_classifier_needs_an_encoder_to_start_from() -> None:
    for kind in (FinetuneConfig, ProbeConfig):
        with pytest.raises(ValueError, match="model is not set.*--model"):
            kind().validate()


def test_the_published_probe_takes_cls_only() -> None:
    with pytest.raises(ValueError, match="features='mean' goes with protocol='fast' only"):
        ProbeConfig(model="somewhere", protocol="published", features="mean").validate()
    ProbeConfig(model="somewhere", protocol="fast", features="mean").validate()


@pytest.mark.parametrize("kind", KINDS.values())
def test_what_may_change_on_resuming_are_settings_that_exist(kind: type[TrainingSettings]) -> None:
    names = {field.name for field in fields(kind)}
    assert names >= kind.CHANGEABLE
    must_stay = {"dataset", "seed", "base_lr", "min_lr", "epochs", "gradient_accumulation_steps"}
    must_stay |= {
        "views_per_decode",
        "decode_on_gpu",
        "mask_ratio",
        "negatives",
        "model",
        "random_init",
        "layer_decay",
        "ema_decay",
    }
    assert not must_stay & kind.CHANGEABLE
    # Pre-training compares what the batch sizes come to.
    assert ("per_device_batch_size" in kind.CHANGEABLE) == (kind is PretrainConfig)


def test_labels_may_change_on_resuming_only_where_they_are_not_learned() -> None:
    assert "label_column" in PretrainConfig.CHANGEABLE
    assert "label_column" not in FinetuneConfig.CHANGEABLE | ProbeConfig.CHANGEABLE


def test_settings_survive_json() -> None:
    config = PretrainConfig(image_size=[32, 64])
    assert PretrainConfig(**json.loads(json.dumps(config.to_dict()))) == config


def test_recipes_are_shipped() -> None:
    assert "photos.yaml" in {path.name for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid_for_the_program_that_it_names(path: Path) -> None:
    command = re.search(rf"-m training\.(\w+) --config training/recipes/{path.name}", path.read_text())
    assert command, "the header gives no command"
    kind = KINDS[command[1]]
    config = parse_settings(kind, f"training.{command[1]}", ["--config", str(path)])
    assert config != kind()
    if isinstance(config, PretrainConfig):
        assert config.contrastive_batch_size is not None  # the same batch whatever the hardware
    assert Path(config.output_dir).name == path.stem
