"""The training loop: what happens between two steps leaves training as it is, and what goes wrong is said."""

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from run_folder import course, same_weights

from training import pretrain
from training.alarms import CollapseAlarm
from training.config import PretrainConfig
from training.data import Batch, EvaluationImages, batches
from training.features import normalize_pixels
from training.images import central_crop
from training.judge import fit_probe
from training.log import read_metrics
from training.pretrain import Contrast
from training.source import open_source


Write = Callable[..., Path]
Settings = Callable[..., PretrainConfig]
Train = Callable[..., Path]


def test_evaluating_does_not_disturb_training(
    write_shards: Write, settings: Settings, run_pretraining: Train, tmp_path: Path
) -> None:
    write_shards(20)
    write_shards(10, split="test")
    without = run_pretraining(settings(output_dir=str(tmp_path / "without"), epochs=3))
    evaluations = {"knn_images": 10, "knn_epochs": 1}
    for probe in (False, True):
        run = run_pretraining(
            settings(output_dir=str(tmp_path / f"{probe}"), online_probe=probe, epochs=3, **evaluations)
        )
        assert course(without) == course(run)
        assert same_weights(without, run)


def test_every_online_evaluation_is_logged(
    write_shards: Write, settings: Settings, run_pretraining: Train, tmp_path: Path
) -> None:
    write_shards(20)
    write_shards(10, split="test")
    run = run_pretraining(settings(epochs=3, knn_images=20, knn_epochs=1, online_probe=True))
    entries = [entry for entry in read_metrics(run / "metrics.jsonl") if "knn_accuracy" in entry]
    assert [entry["step"] for entry in entries] == [0, 2, 4, 6]
    assert [entry.keys() for entry in entries[:3]] == [{"step", "knn_accuracy", "probe_accuracy"}] * 3
    assert all(0 <= value <= 1 for entry in entries for name, value in entry.items() if name != "step")
    # As fitted to the features of the encoder that training begins with
    config = settings()
    encoder = pretrain.untrained_model(config).vit.eval()
    features, labels = {}, {}
    for split in ("train", "test"):
        images = EvaluationImages(open_source(config.dataset, split), central_crop((16, 16)), 20)
        batch = next(batches(images, 0))
        with torch.no_grad():
            features[split], labels[split] = encoder(normalize_pixels(batch.pixels)).pooler_output, batch.labels
    scores = fit_probe(features["train"], labels["train"], 4).scores(features["test"])
    assert entries[0]["probe_accuracy"] == pytest.approx(float((scores.argmax(1) == labels["test"]).float().mean()))


def test_dropout_would_be_on_in_every_step_and_off_in_every_evaluation(
    write_shards: Write, settings: Settings, run_pretraining: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(20)
    write_shards(10, split="test")
    modes: list[tuple[str, bool]] = []
    forward, evaluate = Contrast.forward, pretrain.frozen_scores

    def spy_forward(self: Contrast, batch: Batch) -> Any:
        modes.append(("step", self.run.unwrapped().vit.training))
        return forward(self, batch)

    def spy_evaluate(accelerator: Any, extractors: Any, *rest: Any) -> Any:
        def extract(batch: Batch) -> Any:
            modes.append(("evaluation", accelerator._models[0].vit.training))
            return extractors["encoder"](batch)

        return evaluate(accelerator, {"encoder": extract}, *rest)

    monkeypatch.setattr(Contrast, "forward", spy_forward)
    monkeypatch.setattr(pretrain, "frozen_scores", spy_evaluate)
    run_pretraining(settings(epochs=2, knn_images=10, knn_epochs=1))
    epoch = [("evaluation", False), ("evaluation", False), ("step", True), ("step", True)]  # both splits first
    assert modes == 2 * epoch


def test_a_run_that_learns_nothing_says_so(
    settings: Settings,
    run_pretraining: Train,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of one picture, again and again, no view can find its own image."""
    (tmp_path / "data").mkdir()
    for number in range(16):
        Image.new("RGB", (16, 16), (200, 100, 50)).save(tmp_path / "data" / f"{number}.png")
    monkeypatch.setattr(pretrain, "CollapseAlarm", partial(CollapseAlarm, patience=3, first_step=0))
    run_pretraining(settings(epochs=2, negatives="global"))
    warnings = re.findall(r"WARNING: .*", capsys.readouterr().err)
    assert len(warnings) == 1  # of four steps
    assert f"ln(contrasted images) = {math.log(8):.3f}" in warnings[0]
