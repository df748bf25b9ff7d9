"""Settings from recipes and flags, and mistakes in either."""

from pathlib import Path
from typing import Any

import pytest

from training.classifier_config import FinetuneConfig
from training.config import PretrainConfig
from training.evaluation import FrozenSettings
from training.parser import parse_settings


def parse(flags: list[str]) -> PretrainConfig:
    return parse_settings(PretrainConfig, "training.pretrain", flags)


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
        parse(flags)
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("training.pretrain: ")
    assert message.count("\n") == 1, message
    return message


def test_flags_win_over_the_recipe_and_the_recipe_over_the_defaults(recipe: Any) -> None:
    flags = recipe("epochs: 17\nseed: 3\nimage_size: [96, 64]\nreport_to: none\n")
    config = parse([*flags, "--seed", "5"])
    assert (config.epochs, config.seed, config.image_size, config.report_to) == (17, 5, [96, 64], "none")
    assert config.num_workers == PretrainConfig.num_workers
    assert parse(["--seed", "5", *flags]) == config


def test_without_flags_the_defaults_are_the_released_ones() -> None:
    config = parse([])
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
    found = getattr(parse(recipe(line)), line.split(":")[0])
    assert (found, type(found)) == (value, type(value))


def test_precision_no_can_be_written_in_a_recipe_without_quotes(recipe: Any) -> None:
    assert parse(recipe("mixed_precision: no")).mixed_precision == "no"


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
    assert parse(flags).streaming is value
    if flags:
        assert parse([*recipe(f"streaming: {not value}"), *flags]).streaming is value


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
        *(
            "num_workers: 1.5",
            "epochs: many",
            "seed: yes",
            "mask_ratio: abc",
            "max_steps: 1e3",
            "horizontal_flip: perhaps",
        ),
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


def test_an_impossible_setting_stops_the_command_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "warmup_epochs" in refusal(capsys, ["--epochs", "3"])


def test_every_program_has_its_own_flags_and_name(recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", "somewhere", *recipe("layer_decay: 0.5\nema_decay: 0.9\n")]
    config = parse_settings(FinetuneConfig, "training.finetune", [*flags, "--layer_decay", "0.7"])
    assert (config.model, config.layer_decay, config.ema_decay, config.mixup_alpha) == ("somewhere", 0.7, 0.9, 0.8)
    assert "unknown key 'layer_decay'" in refusal(capsys, flags)
    with pytest.raises(SystemExit):
        parse_settings(FinetuneConfig, "training.finetune", [])
    assert capsys.readouterr().err.startswith("training.finetune: model is not set")


def test_several_numbers_come_from_flags_and_recipes_alike(recipe: Any) -> None:
    flags = ["--model", "somewhere", "--output_dir", "results"]
    for shares in (["--few_shot", "0.05", "0.2"], recipe("few_shot: [0.05, 0.2]\n")):
        assert parse_settings(FrozenSettings, "training.knn", [*flags, *shares]).few_shot == [0.05, 0.2]
