"""Judging a study's runs: one pass gives both kinds of features, and scores are found again."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from study_files import small_study

from modeling_micl import MiclForPreTraining, MiclModel, MiclPreTrainedModel
from training.batch import Batch
from training.features import LabelledFeatures, encoder_features
from training.labels import few_shot
from training.results import read_evaluation, save_model
from training.scores import score_features
from training.study_judge import judge_references, judge_run, pooled, scores_of, split_pooled, stored_scores
from training.study_plan import PlannedRun, Planner


Build = Callable[..., MiclPreTrainedModel]


@pytest.fixture
def run(tmp_path: Path, write_shards: Callable[..., Path]) -> PlannedRun:
    """A planned run of 60 images, with 15 to judge by."""
    write_shards(75)
    write_shards(30, split="test")
    return Planner(small_study(tmp_path)).plan().runs[0]


def test_both_kinds_of_features_are_those_of_other_programs(tiny_model: Build, no_accelerator: Any) -> None:
    encoder, accelerator = tiny_model(MiclModel), Accelerator()
    pixels = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    batch = Batch(pixels, torch.arange(3), torch.arange(3), [])
    with torch.no_grad():
        both = LabelledFeatures({"both": pooled(encoder, accelerator)(batch), "raw": torch.ones(3, 1)}, batch.labels)
        expected = {name: encoder_features(encoder, accelerator, name)(batch) for name in ("cls", "mean")}
    found = split_pooled(both).features
    assert list(found) == ["cls", "mean", "raw"]
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values)


def test_scores_tell_good_features_from_bad_ones() -> None:
    labels = torch.arange(60) % 2
    good, bad = torch.eye(2)[labels], torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    split = LabelledFeatures({"good": good, "bad": bad}, labels)
    queries = LabelledFeatures({"good": good[:20], "bad": bad[30:50].flip(0)}, labels[:20])
    scores = scores_of(split, queries)
    assert scores["good"] == {"knn": 1.0, "probe": 1.0}
    assert max(scores["bad"].values()) < 0.9


def test_few_labels_are_a_share_of_every_class(no_accelerator: Any) -> None:
    labels, noise = torch.arange(200) % 2, torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    features = torch.cat([torch.eye(2)[labels], noise], dim=1)
    split = LabelledFeatures({"cls": features}, labels)
    scores = scores_of(split, split, [0.1, 0.06], seed=3)
    assert list(scores["cls"]) == ["knn", "probe", "knn, 10 %", "probe, 10 %", "knn, 6 %", "probe, 6 %"]
    chosen = few_shot(labels, 0.06, 3)
    assert len(chosen) == 12
    few = score_features(LabelledFeatures({"cls": features[chosen]}, labels[chosen]), split, with_probe=False)
    assert scores["cls"]["knn, 6 %"] == few.knn["cls"] != scores["cls"]["knn"]
    assert scores == scores_of(split, split, [0.1, 0.06], seed=3) != scores_of(split, split, [0.1, 0.06], seed=4)


def test_scores_are_kept_by_split_and_number_of_images(run: PlannedRun, no_accelerator: Any) -> None:
    folder = run.folder / "model"
    save_model(MiclForPreTraining(run.config.model_config()), folder)
    assert stored_scores(folder, "validation", 40) == {}
    judge_run(run, 40)
    found = stored_scores(folder, "validation", 40)
    assert {name: set(values) for name, values in found.items()} == dict.fromkeys(("cls", "mean"), {"knn", "probe"})
    assert stored_scores(folder, "test", 40) == stored_scores(folder, "validation", 41) == {}
    few = replace(run, few_shot=[0.5])
    assert stored_scores(folder, "validation", 40, few.few_shot) == {}
    judge_run(few, 40)
    both = stored_scores(folder, "validation", 40, few.few_shot)
    assert set(both["cls"]) == {"knn", "probe", "knn, 50 %", "probe, 50 %"}
    assert stored_scores(folder, "validation", 40) == found
    entry = read_evaluation(folder)["results"][0]
    assert (entry["num_train_images"], entry["num_test_images"], entry["split"]) == (40, 15, "validation")


def test_references_are_judged_beside_random_weights(run: PlannedRun, tmp_path: Path, no_accelerator: Any) -> None:
    judge_references(run, "test", 40, tmp_path / "references")
    found = stored_scores(tmp_path / "references", "test", 40)
    assert set(found) == {"mean-centred pixels", "cls", "mean", "raw pixels", "colour histogram"}
    assert found["raw pixels"]["knn"] > 0
