"""What a study file may say, and what of it is refused."""

from typing import Any

import pytest
from study_files import study

from training.parser import parse_settings
from training.study_settings import StudySettings


def test_a_factor_is_a_list_of_values_or_words_for_settings(tmp_path: Any) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(
        "steps: 5\nfactors:\n  temperature: [0.02, 5e-2]\n  patch_size: [[4], [8, 4]]\n"
        "  depth:\n    deep: {num_hidden_layers: 8, hidden_size: 64}\n"
    )
    settings = parse_settings(StudySettings, "training.study", ["--config", str(file), "--jobs", "1"])
    assert settings.factor_points() == {
        "temperature": {"0.02": {"temperature": "0.02"}, "5e-2": {"temperature": "5e-2"}},
        "patch_size": {"4": {"patch_size": ["4"]}, "8 4": {"patch_size": ["8", "4"]}},
        "depth": {"deep": {"num_hidden_layers": "8", "hidden_size": "64"}},
    }
    assert settings.budget() == {"steps": 5}


def test_a_grid_has_every_combination() -> None:
    points = study(grids={"both": {"mask_ratio": [0.5, 0.9], "views": {"four": {"num_views": 4}}}}).grid_points()
    assert points["both"] == [
        ({"mask_ratio": "0.5", "views": "four"}, {"mask_ratio": 0.5, "num_views": 4}),
        ({"mask_ratio": "0.9", "views": "four"}, {"mask_ratio": 0.9, "num_views": 4}),
    ]


@pytest.mark.parametrize("asked", [{"few_shot": [0.1]}, {"finetune": {"epochs": 1}}])
def test_what_is_for_final_runs_needs_some(asked: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="final_seeds"):
        study(**asked).validate()
    study(**asked, final_seeds=[1]).validate()


def test_trials_know_their_method() -> None:
    trials = {"mae": {"base_lr": [1, 2]}, "whole images": {"method": ["simclr"], "crop_min_scale": [1, 0.5]}}
    points = study(trials=trials).trial_points()
    assert [changes["method"] for _, changes in points["whole images"]] == ["simclr", "simclr"]
    assert [changes for _, changes in points["mae"]] == [
        {"method": "mae", "base_lr": 1},
        {"method": "mae", "base_lr": 2},
    ]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"images": 5.0}, "one budget"),
        ({"steps": None}, "one budget.*none"),
        ({"factors": {"temperature": 0.1}}, "temperature must have a list"),
        ({"factors": "temperature"}, "factors must be a mapping"),
        ({"factors": "[1]"}, "factors must be a mapping"),
        ({"grids": {"both": [1, 2]}}, "mapping of settings to lists"),
        ({"trials": {"moco": {"base_lr": [1]}}}, "no method 'moco': choose among micl, mae"),
        ({"trials": {"mae": {"base_lr": [1]}, "micl": {"base_lr": [1, 2]}}}, "equally many.*'mae': 1, 'micl': 2"),
        ({"trials": {"mae": {"base_lr": [1]}}, "factors": {"base_lr": [1]}}, "trials.*factors"),
        ({"trials": {"mae": {"base_lr": [1]}}, "labels": False}, "trials are chosen by.*labels=False"),
        ({"seeds": [0, 1], "final_seeds": [1]}, "none in both"),
        ({"seeds": []}, "some of the first"),
        ({"held_out": 1}, "held_out must be at least 2"),
        ({"jobs": -1}, "jobs must be at least 0"),
    ],
)
def test_what_cannot_be_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        study(**changes).validate()
