"""Settings: recipes, flags, and mistakes in either."""

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from training import config as config_module
from training.config import PretrainConfig, parse_pretrain_config


RECIPES = sorted((Path(config_module.__file__).parent / "recipes").glob("[!f]*.yaml"))  # not finetune_*


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    """Write a recipe; returns the flags that read it."""

    def write(text: str) -> list[str]:
        (tmp_path / "recipe.yaml").write_text(text)
        return ["--config", str(tmp_path / "recipe.yaml")]

    return write


def refusal(capsys: pytest.CaptureFixture[str], flags: list[str]) -> str:
    """The one line that says why these flags are refused."""
    with pytest.raises(SystemExit) as stopped:
        parse_pretrain_config(flags)
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("training.pretrain: ")
    assert message.count("\n") == 1, message
    return message


def test_flags_win_over_the_recipe_and_the_recipe_over_the_defaults(recipe: Any) -> None:
    flags = recipe("epochs: 17\nseed: 3\nimage_size: [96, 64]\nreport_to: none\n")
    config = parse_pretrain_config([*flags, "--seed", "5"])
    assert (config.epochs, config.seed, config.image_size, config.report_to) == (17, 5, [96, 64], "none")
    assert config.per_device_batch_size == PretrainConfig.per_device_batch_size
    assert parse_pretrain_config(["--seed", "5", *flags]) == config


def test_without_flags_the_defaults_are_the_released_ones() -> None:
    config = parse_pretrain_config([])
    assert config == PretrainConfig()
    released = (0.9, 0.07, 1 / 64, 5e-5, 0.05, 0.9, 0.95, 200, 10, 0.2)
    assert released == (
        *(config.mask_ratio, config.temperature, config.kappa, config.base_lr, config.weight_decay),
        *(config.adam_beta1, config.adam_beta2, config.epochs, config.warmup_epochs, config.crop_min_scale),
    )


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("base_lr: 5e-5", 5e-5),  # a string to YAML
        ("base_lr: 1", 1.0),
        ("temperature: 0.1", 0.1),
        ("horizontal_flip: false", False),
        ("horizontal_flip: no", False),
        ("image_size: 128", [128]),
        ("patch_size: [16, 32]", [16, 32]),
        ("max_steps: null", None),
        ("max_grad_norm:", None),
        ("epochs: null", 200),
        ("dataset: a folder/with spaces", "a folder/with spaces"),
        ("dataset: -odd", "-odd"),
        ("mixed_precision: bf16", "bf16"),
        ("similarity: cosine", "cosine"),
        ("streaming: true", True),
        ("streaming: false", False),
        ("streaming: null", None),
    ],
)
def test_a_recipe_gives_values_of_the_right_type(line: str, value: Any, recipe: Any) -> None:
    found = getattr(parse_pretrain_config(recipe(line)), line.split(":")[0])
    assert (found, type(found)) == (value, type(value))


def test_precision_no_can_be_written_in_a_recipe_without_quotes(recipe: Any) -> None:
    assert parse_pretrain_config(recipe("mixed_precision: no")).mixed_precision == "no"


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        ([], None),
        (["--streaming"], True),
        (["--streaming", "true"], True),
        (["--streaming=False"], False),
        (["--no-streaming"], False),
        (["--no_streaming"], False),
    ],
)
def test_streaming_has_three_states(flags: list[str], value: bool | None, recipe: Any) -> None:
    assert parse_pretrain_config(flags).streaming is value
    if flags:
        assert parse_pretrain_config([*recipe(f"streaming: {not value}"), *flags]).streaming is value


@pytest.mark.parametrize(
    ("key", "nearest"), [("mask_ration", "mask_ratio"), ("device_batch_size", "per_device_batch_size")]
)
def test_an_unknown_name_is_refused_with_the_nearest_valid_one(
    key: str, nearest: str, recipe: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    in_recipe = refusal(capsys, recipe(f"epochs: 3\n{key}: 1\n"))
    assert key in in_recipe
    assert repr(nearest) in in_recipe
    assert "recipe.yaml" in in_recipe
    for flags in ([f"--{key}", "1"], [f"--{key}=1"], [f"--{key.replace('_', '-')}", "1"]):
        assert repr(nearest) in refusal(capsys, flags)


def test_an_unknown_name_like_no_other_points_to_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--help" in refusal(capsys, ["--xyzzy", "1"])
    assert "stray" in refusal(capsys, ["stray"])


@pytest.mark.parametrize(
    "line",
    [
        *("epochs: 1.5", "epochs: many", "seed: yes", "mask_ratio: abc", "max_steps: 1e3", "horizontal_flip: perhaps"),
        *("image_size: big", "image_size: [64, big]", "similarity: euclid", "negatives: all", "mixed_precision: fp8"),
        *("streaming: perhaps", "base_lr: {a: 1}"),
    ],
)
def test_a_value_of_a_wrong_type_is_refused_and_named(
    line: str, recipe: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert line.split(":")[0] in refusal(capsys, recipe(line)).replace("unknown flag", "")


def test_a_list_where_one_value_belongs_is_refused_and_named(recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert "base_lr" in refusal(capsys, recipe("base_lr: [1, 2]"))


@pytest.mark.parametrize(
    "text",
    [
        *("", "just words", "- a\n- b"),
        *("epochs: [1\nseed: 2", "a: b: c"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(text: str, recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert "recipe.yaml" in refusal(capsys, recipe(text))


def test_a_missing_recipe_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere.yaml" in refusal(capsys, ["--config", "nowhere.yaml"])


IMPOSSIBLE = {
    "per_device_batch_size": 0,
    "gradient_accumulation_steps": 0,
    "epochs": 0,
    "logging_steps": 0,
    "save_steps": 0,
    "max_images": 0,
    "max_steps": 0,
    "save_total_limit": 0,
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
    "temperature": 0.0,
    "kappa": -0.5,
    "resume": "no/such/folder",
}


@pytest.mark.parametrize(("name", "value"), IMPOSSIBLE.items(), ids=IMPOSSIBLE)
def test_an_impossible_value_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name) as refused:
        PretrainConfig(**{name: value}).validate()
    assert str(value[0] if isinstance(value, list) else value) in str(refused.value)


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


def test_an_impossible_setting_stops_the_command_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "warmup_epochs" in refusal(capsys, ["--epochs", "3"])


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


def test_what_may_change_on_resuming_are_settings_that_exist() -> None:
    names = {field.name for field in fields(PretrainConfig)}
    assert names >= PretrainConfig.CHANGEABLE
    must_stay = {"dataset", "seed", "base_lr", "epochs", "mask_ratio", "per_device_batch_size", "negatives"}
    assert not must_stay & PretrainConfig.CHANGEABLE


def test_settings_survive_json() -> None:
    config = PretrainConfig(image_size=[32, 64])
    assert PretrainConfig(**json.loads(json.dumps(config.to_dict()))) == config


def test_recipes_are_shipped() -> None:
    assert "photos.yaml" in {path.name for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid(path: Path) -> None:
    config = parse_pretrain_config(["--config", str(path)])
    assert config != PretrainConfig()
    assert Path(config.output_dir).name == path.stem
