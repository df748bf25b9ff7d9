"""The training loop: what happens between two steps leaves training as it is, and what goes wrong is said."""

import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from run_folder import course, same_weights

from training import log, loop, pretrain
from training.alarms import CollapseAlarm
from training.batch import Batch
from training.config import PretrainConfig
from training.data import EvaluationImages, batches
from training.features import normalize_pixels
from training.images import central_crop
from training.judge import fit_probe
from training.log_files import read_metrics
from training.monitor import gigaflop_per_image
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


def test_the_log_tells_how_the_time_is_spent(
    write_shards: Write,
    settings: Settings,
    run_pretraining: Train,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By a clock on which a batch takes three seconds to come and one to learn."""
    now = 0.0

    def slow(*given: Any) -> Iterator[Batch]:
        nonlocal now
        for batch in batches(*given):
            now += 3
            yield batch

    def learn(*given: Any, **options: Any) -> Any:
        nonlocal now
        now += 1
        return learned(*given, **options)

    learned = loop.learn
    monkeypatch.setattr(loop, "batches", slow)
    monkeypatch.setattr(loop, "learn", learn)
    monkeypatch.setattr(log, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(log, "matmul_peak", lambda device, dtype: 1e9 if dtype is torch.bfloat16 else 1)
    write_shards(20)
    config = settings(epochs=6, logging_steps=2, mixed_precision="bf16")
    entries = [entry for entry in read_metrics(run_pretraining(config) / "metrics.jsonl") if "loss" in entry]
    assert [entry["step"] for entry in entries] == [2, 4, 6, 8, 10, 12]
    assert {entry["images_per_second"] for entry in entries} == {2}
    assert {entry["data_wait"] for entry in entries} == {0.75}
    assert [entry["mfu"] for entry in entries] == pytest.approx([2 * gigaflop_per_image(config.model_config())] * 6)
    said = capsys.readouterr().err
    assert "data wait 75%, mfu 0%" in said
    assert said.count("WARNING: Training waits for images 75% of the time (data_wait), and more than 50% in 5") == 1
    assert "All cores are in use" in said  # as the model is on the CPU


def test_a_decoded_batch_serves_several_passes_with_new_views(
    write_shards: Write, settings: Settings, run_pretraining: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(20)
    seen: list[tuple[list[int], torch.Tensor, torch.Tensor]] = []
    forward = Contrast.forward

    def spy(self: Contrast, batch: Batch) -> Any:
        output = forward(self, batch)
        seen.append((batch.index.tolist(), batch.pixels, output.ids_visible))
        return output

    monkeypatch.setattr(Contrast, "forward", spy)
    run_pretraining(settings(epochs=3, output_dir=str(tmp_path / "once")))
    once, seen = seen, []
    run = run_pretraining(settings(epochs=3, output_dir=str(tmp_path / "thrice"), views_per_decode=3))
    assert [index for index, *_ in seen] == [once[n][0] for n in (0, 0, 0, 1, 1, 1)]
    assert all(torch.equal(pixels, once[n // 3][1]) for n, (_, pixels, _) in enumerate(seen))
    # The views of a pass do not depend on the images in it.
    assert all(torch.equal(ids, other) for (*_, ids), (*_, other) in zip(seen, once, strict=True))
    assert not torch.equal(seen[0][2], seen[1][2])
    assert [entry["epoch"] for entry in read_metrics(run / "metrics.jsonl")[1:]] == [0.5, 1, 1.5, 2, 2.5, 3]


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
