"""Top-1 and top-5 accuracy: against loops, as a module of `evaluate`, and in its evaluator."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import evaluate
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from numpy.typing import NDArray

from modeling_micl import MiclForImageClassification, MiclPreTrainedModel
from training import accuracy
from training.accuracy import TopKAccuracy
from training.evaluation import accuracies, predict
from training.results import image_processor
from training.source import open_source


def compute(predictions: NDArray[np.generic], references: list[int]) -> dict[str, float]:
    found: dict[str, float] = TopKAccuracy(keep_in_memory=True).compute(predictions=predictions, references=references)
    return found


def in_loops(scores: list[list[float]], labels: list[int], k: int) -> float:
    hits = 0
    for row, label in zip(scores, labels, strict=True):
        better = sum(score > row[label] or (score == row[label] and c < label) for c, score in enumerate(row))
        hits += better < k
    return hits / len(labels)


@pytest.mark.parametrize("classes", [2, 5, 6, 30])
def test_accuracies_are_what_loops_give(classes: int) -> None:
    rng = np.random.default_rng(classes)
    labels = rng.integers(0, classes, 83).tolist()
    scores = rng.standard_normal((83, classes)).astype(np.float32)
    scores[np.arange(83), labels] += 0.7
    found = compute(scores, labels)
    assert found["top1_accuracy"] == in_loops(scores.tolist(), labels, 1)
    assert 0.1 < found["top1_accuracy"] < 0.95
    if classes > 5:
        assert found["top5_accuracy"] == in_loops(scores.tolist(), labels, 5)
        assert found["top1_accuracy"] < found["top5_accuracy"] < 1
    else:
        assert found.keys() == {"top1_accuracy"}  # of five classes, five always hold the label


def test_equal_scores_count_for_the_lower_class() -> None:
    """A classifier that has learned nothing must not get every image right."""
    equal = np.zeros((10, 10), dtype=np.float32)
    assert compute(equal, list(range(10))) == {"top1_accuracy": 0.1, "top5_accuracy": 0.5}
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 3, (60, 8)).astype(np.float32), rng.integers(0, 8, 60).tolist()
    expected = {f"top{k}_accuracy": in_loops(scores.tolist(), labels, k) for k in (1, 5)}
    assert compute(scores, labels) == expected


def test_predicted_classes_will_do() -> None:
    assert compute(np.array([3, 1, 2, 0]), [3, 1, 0, 0]) == {"top1_accuracy": 0.75}


@pytest.mark.parametrize("classes", [2, 5, 6, 7, 30])
def test_ranked_classes_give_what_their_scores_do(classes: int) -> None:
    """Draws included; six of the ranked classes are enough."""
    rng = np.random.default_rng(classes)
    labels = rng.integers(0, classes, 83)
    scores = rng.integers(0, 9, (83, classes)).astype(np.float32)
    expected = compute(scores, labels.tolist())
    assert expected["top1_accuracy"] == in_loops(scores.tolist(), labels.tolist(), 1)
    assert accuracies(torch.from_numpy(scores), torch.from_numpy(labels)) == expected
    ranked = np.argsort(-scores, axis=1, kind="stable")
    for kept in (ranked, ranked[:, :6]):
        metric = TopKAccuracy(keep_in_memory=True)
        assert metric.compute(predictions=kept, references=labels, ranked=True) == expected


def test_batches_may_be_added_one_by_one() -> None:
    metric, scores = TopKAccuracy(keep_in_memory=True), np.eye(7, dtype=np.float32)
    for part in (slice(0, 3), slice(3, 7)):
        metric.add_batch(predictions=scores[part], references=[0, 1, 2, 3, 4, 5, 0][part])
    found = metric.compute()
    assert found["top1_accuracy"] == pytest.approx(6 / 7)


def test_tensors_without_a_labelled_image_are_refused_and_others_judged() -> None:
    with pytest.raises(ValueError, match="None of the images could be decoded and has a label.*--eval_split"):
        accuracies(torch.zeros(0, 6), torch.zeros(0, dtype=torch.int64))
    assert accuracies(torch.eye(6), torch.arange(6)) == {"top1_accuracy": 1.0, "top5_accuracy": 1.0}


SCRIPT = """
import evaluate, json, sys
metric = evaluate.load(sys.argv[1])
print(json.dumps(metric.compute(predictions=[[0.0, 1.0], [2.0, 1.0], [0.5, 0.0]], references=[1, 0, 1])))
"""


@pytest.mark.slow
def test_evaluate_loads_the_file_alone_without_a_network(tmp_path: Path) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", SCRIPT, str(accuracy.__file__)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"top1_accuracy": pytest.approx(2 / 3)}


def test_the_evaluator_of_evaluate_gives_the_accuracy_of_our_predictions(
    write_shards: Callable[..., Path], tiny_model: Callable[..., MiclPreTrainedModel], no_accelerator: None
) -> None:
    """On pictures whose central square is the model's input as it is, so that nothing is resized."""
    folder = write_shards(30, 7, labels=7)
    names = {label: f"class {label}" for label in range(7)}
    label2id = {name: label for label, name in names.items()}
    model = tiny_model(MiclForImageClassification, image_size=16, patch_size=4, id2label=names, label2id=label2id)
    assert isinstance(model, MiclForImageClassification)
    scores, labels = predict(Accelerator(), model, open_source(str(folder)), None, 0)
    # Let each class win about as often, and some images be right.
    with torch.no_grad():
        model.classifier.bias.sub_(scores.mean(dim=0))
    scores, labels = predict(Accelerator(), model, open_source(str(folder)), None, 0)
    assert len(scores.argmax(dim=1).unique()) > 3
    ours = accuracies(scores, labels)
    assert 0 < ours["top1_accuracy"] < 1

    files = [str(path) for path in sorted(folder.rglob("*.parquet"))]
    found = evaluate.evaluator("image-classification").compute(
        model_or_pipeline=model,
        data=datasets.Dataset.from_parquet(files),
        feature_extractor=image_processor(model.config),
        metric=TopKAccuracy(keep_in_memory=True),
        label_mapping=model.config.label2id,
    )
    assert found["top1_accuracy"] == ours["top1_accuracy"]
