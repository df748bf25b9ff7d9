import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError

from modeling_micl import (
    MiclBackbone,
    MiclConfig,
    MiclForImageClassification,
    MiclForPreTraining,
    MiclModel,
    MiclPreTrainedModel,
)


Values = dict[str, Any]
Build = Callable[..., MiclConfig]


def build(tiny_config: Build, folder: Path, changes: Values) -> None:
    tiny_config(**changes)


def load_with_overrides(tiny_config: Build, folder: Path, changes: Values) -> None:
    tiny_config().save_pretrained(folder)
    MiclConfig.from_pretrained(folder, **changes)


def change_and_build_a_model(tiny_config: Build, folder: Path, changes: Values) -> None:
    config = tiny_config()
    for name, value in changes.items():
        setattr(config, name, value)
    MiclForPreTraining(config)


@pytest.mark.parametrize("make", [build, load_with_overrides, change_and_build_a_model])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mask_ratio": 1.0}, ["mask_ratio", "1.0", "[0, 1)", "0.9"]),
        ({"mask_ratio": -0.1}, ["mask_ratio", "-0.1", "[0, 1)", "0.9"]),
        ({"mask_ratio": float("nan")}, ["mask_ratio", "nan", "[0, 1)", "0.9"]),
        ({"mask_ratio": 0.9}, ["mask_ratio=0.9", "1 of 16 patches", "num_views=2", "lower mask_ratio"]),
        ({"num_views": 9}, ["num_views=9", "8 of 16 patches", "mask_ratio=0.5", "lower mask_ratio or num_views"]),
        ({"num_views": 1}, ["num_views", "1", "at least 2"]),
        ({"kappa": -0.5}, ["kappa", "-0.5", "> -1/2", "1/64"]),
        ({"kappa": float("nan")}, ["kappa", "nan", "> -1/2", "1/64"]),
        ({"temperature": 0}, ["temperature", "0", "> 0", "0.07"]),
        ({"temperature": -0.07}, ["temperature", "-0.07", "> 0", "0.07"]),
        ({"temperature": "0.07"}, ["temperature", "'0.07'", "float"]),
        ({"similarity": "dot"}, ["similarity", "dot", "t-sp", "cosine"]),
        ({"negatives": "all"}, ["negatives", "all", "local", "global"]),
        ({"classifier_pooling": "max"}, ["classifier_pooling", "max", "mean", "cls"]),
        ({"image_size": 30}, ["height of image_size=30", "patch_size=8", "24 or 32"]),
        ({"image_size": 4}, ["height of image_size=4", "patch_size=8", "8 or 8"]),
        ({"image_size": [32, 36]}, ["width of image_size=[32, 36]", "patch_size=8", "32 or 40"]),
        ({"image_size": [32]}, ["image_size", "[32]", "(height, width)"]),
        ({"patch_size": 0}, ["patch_size", "0", "positive"]),
        ({"num_attention_heads": 3}, ["hidden_size=32", "num_attention_heads=3", "change one"]),
        ({"hidden_size": 30}, ["hidden_size=30", "divisible by 4", "32"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers", "0", "at least 1"]),
        ({"drop_path_rate": 1.0}, ["drop_path_rate", "1.0", "[0, 1)"]),
        ({"drop_path_rate": -0.1}, ["drop_path_rate", "-0.1", "[0, 1)"]),
        ({"num_views": 2.5}, ["num_views", "2.5", "int"]),
    ],
    ids=str,
)
def test_a_mistake_is_refused_with_field_value_and_remedy(
    changes: Values, words: list[str], make: Callable[..., None], tiny_config: Build, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, StrictDataclassFieldValidationError)) as error:
        make(tiny_config, tmp_path, changes)
    assert [word for word in words if word not in str(error.value)] == []


@pytest.mark.parametrize("model", [MiclModel, MiclForPreTraining, MiclForImageClassification, MiclBackbone])
def test_every_model_checks_its_config_again(model: type[MiclPreTrainedModel], tiny_config: Build) -> None:
    config = tiny_config()
    config.temperature = -1
    with pytest.raises(ValueError, match="temperature must be > 0, got -1"):
        model(config)


def test_the_defaults_are_vit_b_16_as_the_released_program_runs_it() -> None:
    config = MiclConfig()
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (768, 12, 12)
    assert (config.intermediate_size, config.image_size, config.patch_size) == (3072, 224, 16)
    assert (config.mask_ratio, config.temperature, config.kappa) == (0.9, 0.07, 1 / 64)
    assert (config.layer_norm_eps, config.hidden_act, config.qkv_bias) == (1e-6, "gelu", True)
    assert config.hidden_dropout_prob == config.attention_probs_dropout_prob == config.drop_path_rate == 0
    assert (config.num_views, config.similarity, config.negatives) == (2, "t-sp", "local")


@pytest.mark.parametrize("image_size", [32, (32, 48), [48, 32]])
@pytest.mark.parametrize("patch_size", [8, (8, 4)])
def test_a_config_survives_json(image_size: Any, patch_size: Any, tiny_config: Build, tmp_path: Path) -> None:
    config = tiny_config(
        image_size=image_size, patch_size=patch_size, num_views=3, similarity="cosine", out_features=["stage1"]
    )
    config.save_pretrained(tmp_path)
    restored = MiclConfig.from_pretrained(tmp_path)
    assert restored.to_diff_dict() == config.to_diff_dict()
    assert restored.grid_size == config.grid_size
    assert restored.out_features == ["stage1"]
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "micl"


@pytest.mark.parametrize(
    ("image_size", "patch_size", "grid_size"),
    [(32, 8, (4, 4)), ((32, 48), 8, (4, 6)), ([24, 32], (6, 4), (4, 8)), (24, (4, 8), (6, 3))],
)
def test_the_grid_is_height_by_width(
    image_size: Any, patch_size: Any, grid_size: tuple[int, int], tiny_config: Build
) -> None:
    config = tiny_config(image_size=image_size, patch_size=patch_size)
    assert config.grid_size == grid_size
    assert config.num_patches == grid_size[0] * grid_size[1]


@pytest.mark.parametrize("depth", [1, 4])
def test_another_depth_leaves_no_stale_stages(depth: int, tiny_config: Build, tmp_path: Path) -> None:
    tiny_config().save_pretrained(tmp_path)
    config = MiclConfig.from_pretrained(tmp_path, num_hidden_layers=depth)
    assert config.stage_names == ["stem", *(f"stage{layer}" for layer in range(1, depth + 1))]
    assert config.out_features == [f"stage{depth}"]
    assert config.out_indices == [depth]


def test_a_copy_with_another_depth_has_the_stages_of_that_depth(tiny_config: Build) -> None:
    config = MiclConfig(**{**tiny_config().to_dict(), "num_hidden_layers": 3})
    assert config.stage_names == ["stem", "stage1", "stage2", "stage3"]


@pytest.mark.parametrize("depth", [1, 3])
def test_a_depth_that_contradicts_the_stages_builds_no_model(depth: int, tiny_config: Build) -> None:
    config = tiny_config()
    config.num_hidden_layers = depth
    with pytest.raises(ValueError, match=f"num_hidden_layers={depth}.*stage2"):
        MiclBackbone(config)


@pytest.mark.parametrize("chosen", [{"out_features": ["stem", "stage1"]}, {"out_indices": [0, 1]}], ids=str)
def test_the_stages_of_a_saved_config_can_be_chosen(chosen: Values, tiny_config: Build, tmp_path: Path) -> None:
    tiny_config().save_pretrained(tmp_path)
    config = MiclConfig.from_pretrained(tmp_path, **chosen)
    assert config.out_features == ["stem", "stage1"]
    assert config.out_indices == [0, 1]


def test_values_that_fit_only_together_can_be_overridden_together(tiny_config: Build, tmp_path: Path) -> None:
    tiny_config().save_pretrained(tmp_path)
    config = MiclConfig.from_pretrained(tmp_path, image_size=30, patch_size=5, mask_ratio=0.9)
    assert (config.image_size, config.patch_size, config.mask_ratio) == (30, 5, 0.9)


def test_overrides_leave_the_given_dictionary_alone(tiny_config: Build) -> None:
    values = tiny_config().to_dict()
    before = json.dumps(values)
    assert MiclConfig.from_dict(values, temperature=0.2, num_hidden_layers=1).temperature == 0.2
    assert json.dumps(values) == before


def test_keywords_that_are_no_config_values_are_handed_back(tiny_config: Build) -> None:
    config, unused = MiclConfig.from_dict(
        tiny_config().to_dict(), return_unused_kwargs=True, temperature=0.2, low_noise=1
    )
    assert config.temperature == 0.2
    assert unused == {"low_noise": 1}


def test_labels_and_their_number_stay_together(tiny_config: Build, tmp_path: Path) -> None:
    tiny_config(id2label={0: "cat", 1: "dog", 2: "owl"}, label2id={"cat": 0, "dog": 1, "owl": 2}).save_pretrained(
        tmp_path
    )
    assert MiclConfig.from_pretrained(tmp_path).id2label == {0: "cat", 1: "dog", 2: "owl"}
    assert MiclConfig.from_pretrained(tmp_path, num_labels=7).num_labels == 7
