"""Whole runs: what they leave behind, and that stopping, failing and resuming change nothing."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoImageProcessor

from modeling_micl import MiclModel
from training import pretrain
from training import run as run_module
from training.checkpoint import find_defect, newest_checkpoint, read_state
from training.config import PretrainConfig
from training.features import knn_accuracy, normalize_pixels
from training.log import Logger, read_metrics
from training.optim import learning_rate
from training.pretrain import view_noise
from training.run import Progress, StopRequest, make_plan


Write = Callable[..., Path]
Settings = Callable[..., PretrainConfig]
Train = Callable[..., Path]
ROOT = Path(__file__).parents[2]


def course(run: Path) -> list[tuple[float, ...]]:
    """What training went through, exactly."""
    names = ("step", "epoch", "loss", "learning_rate", "grad_norm", "contrastive_accuracy", "effective_rank")
    return [tuple(entry[name] for name in names) for entry in read_metrics(run / "metrics.jsonl") if "loss" in entry]


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "model" / "model.safetensors")


def same_weights(run: Path, other: Path) -> bool:
    some, others = weights(run), weights(other)
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in some)


def saved_steps(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


# What a run leaves behind


@pytest.fixture
def labelled_run(
    write_shards: Write, settings: Settings, run_pretraining: Train, capsys: pytest.CaptureFixture[str]
) -> tuple[Path, str]:
    """A finished run on data with a labelled test split, and what it printed."""
    write_shards(40, 30)
    write_shards(50, split="test")
    config = settings(image_size=[16, 20], epochs=3, knn_images=60, knn_epochs=2, save_steps=10)
    return run_pretraining(config, figures=True), capsys.readouterr().out


def test_a_run_leaves_a_folder_to_resume_and_one_to_share(labelled_run: tuple[Path, str]) -> None:
    run, printed = labelled_run
    assert {path.name for path in run.iterdir()} == {"checkpoints", "metrics.jsonl", "model", "figures"}
    assert saved_steps(run) == [10, 20, 24]
    found = {path.name for path in (run / "model").iterdir()}
    assert found == {"config.json", "model.safetensors", "preprocessor_config.json", "eval.json", "README.md"}

    for figure in ("views", "similarity", "curves"):
        with Image.open(run / "figures" / f"{figure}.png") as image:
            assert min(image.size) > 300
            assert np.asarray(image.convert("L")).std() > 10

    entries = read_metrics(run / "metrics.jsonl")
    steps = [entry for entry in entries if "loss" in entry]
    assert [entry["step"] for entry in steps] == list(range(1, 25))
    assert [entry["epoch"] for entry in steps] == [n / 8 for n in range(1, 25)]
    assert [entry["step"] for entry in entries if "knn_accuracy" in entry] == [0, 16, 24]
    fields = {"step", "epoch", "loss", "learning_rate", "images_per_second", "grad_norm", "broken_images"}
    fields |= {"contrastive_accuracy", "negative_cosine", "effective_rank"}
    for entry in steps:
        assert entry.keys() == fields
        assert all(math.isfinite(value) for value in entry.values())

    results = json.loads((run / "model" / "eval.json").read_text())
    assert {"hardware", "versions", "results"} == results.keys()
    by_name = {result["features"]: result for result in results["results"]}
    assert len(by_name) == 5
    printed_values = dict(re.findall(r"^  (\S.*?)  +(\d+\.\d)%$", printed, flags=re.MULTILINE))
    assert printed_values == {name: f"{100 * result['value']:.1f}" for name, result in by_name.items()}
    for result in by_name.values():
        assert (result["num_train_images"], result["num_test_images"], result["seed"]) == (60, 50, 0)
        assert "k=20" in result["protocol"]
        assert result["command"]
    assert by_name["encoder after training"]["value"] == entries[-1]["knn_accuracy"]
    assert by_name["encoder before training"]["value"] == entries[0]["knn_accuracy"]


def test_the_portable_model_has_the_accuracy_that_it_claims(labelled_run: tuple[Path, str], tmp_path: Path) -> None:
    """Anybody can repeat the evaluation with transformers alone."""
    folder = labelled_run[0] / "model"
    model, processor = MiclModel.from_pretrained(folder).eval(), AutoImageProcessor.from_pretrained(folder)
    features, labels = {}, {}
    for split, files in (("train", "train-*.parquet"), ("test", "test-*.parquet")):
        rows = datasets.Dataset.from_parquet([str(path) for path in sorted((tmp_path / "data/data").glob(files))])
        if split == "train":  # 60 of 40 + 30, in proportion
            rows = rows.select([*range(34), *range(40, 66)])
        with torch.no_grad():
            features[split] = model(processor(list(rows["image"]), return_tensors="pt").pixel_values).pooler_output
        labels[split] = torch.tensor(rows["label"])
    accuracy = knn_accuracy(features["train"], labels["train"], features["test"], labels["test"])
    results = json.loads((folder / "eval.json").read_text())["results"]
    assert next(r["value"] for r in results if r["features"] == "encoder after training") == pytest.approx(accuracy)


def test_the_card_claims_what_eval_json_holds_and_nothing_else(labelled_run: tuple[Path, str]) -> None:
    folder = labelled_run[0] / "model"
    results = json.loads((folder / "eval.json").read_text())["results"]
    section = (folder / "README.md").read_text().split("## Results")[1].split("##")[0]
    claimed = re.findall(r"^\| (.+?) \| (\d+\.\d)% \|.* 60 images vote on 50 of", section, flags=re.MULTILINE)
    assert claimed == [(result["features"], f"{100 * result['value']:.1f}") for result in results]
    assert len(re.findall(r"\d%", section)) == len(results)


def test_without_labels_there_is_no_evaluation(
    write_image_folder: Write, settings: Settings, run_pretraining: Train, tmp_path: Path
) -> None:
    write_image_folder(20)
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (tmp_path / "pictures").rglob("*.png"):
        shutil.copy(path, flat)
    run = run_pretraining(settings(dataset=str(flat), knn_images=10, epochs=2), figures=True)
    assert json.loads((run / "model" / "eval.json").read_text())["results"] == []
    assert (run / "figures" / "views.png").exists()


@pytest.mark.parametrize("labels", ["absent", "all -1"])
def test_an_unlabelled_test_split_does_not_cost_the_model(
    labels: str, write_shards: Write, settings: Settings, run_pretraining: Train
) -> None:
    """The Hub's test splits often have no labels, or -1 for all."""
    test = next(write_shards(10, split="test").rglob("*.parquet"))
    write_shards(16)
    rows = datasets.Dataset.from_parquet(str(test))
    rows = rows.remove_columns("label") if labels == "absent" else rows.map(lambda _: {"label": -1})
    rows.to_parquet(test)
    run = run_pretraining(settings(epochs=2, knn_images=10))
    assert (run / "model" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("splits", "asked", "chosen"),
    [
        (("test", "validation"), None, 7),
        (("test",), None, 5),
        (("test", "validation"), "test", 5),
        (("other",), None, None),
    ],
)
def test_the_split_for_knn_is_found(
    splits: tuple[str, ...], asked: str | None, chosen: int | None, write_shards: Write, settings: Settings
) -> None:
    write_shards(12)
    for split in splits:
        write_shards({"test": 5, "validation": 7, "other": 9}[split], split=split)
    _, evaluated = pretrain.open_sources(settings(eval_split=asked, knn_images=10))
    assert (evaluated.num_images if evaluated else None) == chosen
    assert pretrain.open_sources(settings(eval_split=asked, knn_images=0))[1] is None


def test_evaluating_does_not_disturb_training(
    write_shards: Write, settings: Settings, run_pretraining: Train, tmp_path: Path
) -> None:
    write_shards(20)
    write_shards(10, split="test")
    without = run_pretraining(settings(output_dir=str(tmp_path / "without"), epochs=3))
    with_knn = run_pretraining(settings(output_dir=str(tmp_path / "with"), epochs=3, knn_images=10, knn_epochs=1))
    assert course(without) == course(with_knn)
    assert same_weights(without, with_knn)


@pytest.mark.parametrize(
    "options",
    [
        {"num_views": 3, "image_size": [16, 24]},
        {"mixed_precision": "bf16"},
        {"negatives": "global", "similarity": "cosine"},
        {"gradient_checkpointing": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_kind_of_run_comes_to_its_end(
    options: dict[str, Any], write_shards: Write, settings: Settings, run_pretraining: Train
) -> None:
    write_shards(20)
    run = run_pretraining(settings(epochs=2, **options), figures=True)
    assert [step for step, *_ in course(run)] == [1, 2, 3, 4]
    assert all(math.isfinite(value) for entry in course(run) for value in entry)


def test_plain_colours_are_soon_told_apart(
    settings: Settings, run_pretraining: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    for number, colour in enumerate(np.random.default_rng(0).integers(0, 256, (64, 3)).tolist()):
        Image.new("RGB", (16, 16), tuple(colour)).save(tmp_path / "data" / f"{number}.png")
    run = run_pretraining(settings(epochs=15, per_device_batch_size=16, base_lr=0.05))
    losses = [loss for _, _, loss, *_ in course(run)]
    assert np.mean(losses[-4:]) < 0.5 * np.mean(losses[:4]) < 0.5 * math.log(16)
    assert "WARNING" not in capsys.readouterr().err


def test_tensorboard_gets_settings_of_any_type(
    write_shards: Write, settings: Settings, run_pretraining: Train
) -> None:
    write_shards(20)
    run = run_pretraining(settings(max_steps=2, report_to="tensorboard", max_grad_norm=None))
    assert list(run.rglob("events.out.tfevents.*"))


# Plans


def test_a_plan_follows_from_settings_data_and_processes(settings: Settings) -> None:
    config = settings(per_device_batch_size=8, gradient_accumulation_steps=3, epochs=5, base_lr=0.1)
    plan = make_plan(config, num_images=100, processes=2)
    assert (plan.forward_images, plan.contrasted_images, plan.images_per_step) == (16, 8, 48)
    assert (plan.forwards_per_epoch, plan.total_steps) == (6, 10)
    assert plan.peak_lr == pytest.approx(0.1 * 48 / 256)
    assert make_plan(settings(negatives="global"), 100, 2).contrasted_images == 16
    assert make_plan(settings(max_steps=4), 100, 2).total_steps == 4
    assert make_plan(settings(max_steps=4000), 100, 2).total_steps == 48


def test_a_batch_without_negatives_is_refused(settings: Settings) -> None:
    with pytest.raises(ValueError, match="per_device_batch_size=1 leaves no negatives"):
        make_plan(settings(per_device_batch_size=1), 100, 2)
    assert make_plan(settings(per_device_batch_size=1, negatives="global"), 100, 2).contrasted_images == 2


def test_too_few_images_are_refused(write_shards: Write, settings: Settings, run_pretraining: Train) -> None:
    write_shards(7)
    with pytest.raises(ValueError, match="The 7 images do not fill one batch of 8 .*at most 7"):
        run_pretraining(settings())
    assert make_plan(settings(), 8, 1).total_steps == 8


def test_too_much_accumulation_is_refused(settings: Settings) -> None:
    with pytest.raises(ValueError, match="gradient_accumulation_steps"):
        make_plan(settings(epochs=2, gradient_accumulation_steps=9), num_images=32, processes=1)


def test_a_tracker_that_is_not_installed_is_an_error_before_anything_is_loaded(
    settings: Settings, run_pretraining: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tracker in ("nonsense", "tensorboard,nonsense"):
        with pytest.raises(ValueError, match="'nonsense'.*not installed"):
            run_pretraining(settings(dataset="no/such/folder", report_to=tracker))
    monkeypatch.setattr(pretrain, "get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(ValueError, match="'wandb'.*not installed"):
        run_pretraining(settings(dataset="no/such/folder", report_to="tensorboard, wandb"))


# Randomness


def test_masks_differ_by_seed_and_by_forward_pass() -> None:
    noises = [
        view_noise(seed, forward, 12, 16, torch.device("cpu")) for seed, forward in ((0, 0), (0, 1), (1, 0), (0, 0))
    ]
    assert noises[0].shape == (12, 16)
    assert 0 <= noises[0].min() < 0.1 < 0.9 < noises[0].max() < 1
    assert torch.equal(noises[0], noises[3])
    for other in noises[1:3]:
        assert not torch.isin(other, noises[0]).any()


def test_processes_share_out_the_masks_of_the_whole_batch(
    write_shards: Write, settings: Settings, run_pretraining: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The noise that the model gets is the own rows of the global batch's."""
    write_shards(20)
    drawn: list[Tensor] = []
    original = pretrain.view_noise

    def spy(*args: Any) -> Tensor:
        drawn.append(original(*args))
        return drawn[-1]

    monkeypatch.setattr(pretrain, "view_noise", spy)
    run_pretraining(settings(max_steps=2))
    device = torch.device("cpu")
    assert [noise.shape for noise in drawn] == [(8, 16)] * 2
    assert all(torch.equal(noise, original(0, n, 8, 16, device)) for n, noise in enumerate(drawn))


def test_the_seed_decides_everything(
    write_shards: Write, settings: Settings, run_pretraining: Train, tmp_path: Path
) -> None:
    write_shards(20)
    runs = [
        run_pretraining(settings(output_dir=str(tmp_path / name), seed=seed, max_steps=3))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert course(runs[0]) == course(runs[1])
    assert same_weights(runs[0], runs[1])
    assert course(runs[0])[0] != course(runs[2])[0]


# Accumulation


def test_accumulation_steps_once_for_several_forward_passes(
    write_shards: Write, settings: Settings, run_pretraining: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(40)
    rates: list[float] = []
    original = pretrain.set_learning_rate

    def spy(optimizer: torch.optim.Optimizer, rate: float) -> None:
        rates.append(rate)
        original(optimizer, rate)

    monkeypatch.setattr(pretrain, "set_learning_rate", spy)
    run = run_pretraining(settings(epochs=4, gradient_accumulation_steps=3))
    peak = 0.02 * 24 / 256
    assert [step for step, *_ in course(run)] == list(range(1, 7))  # 4 × 5 passes, the last two make no step
    assert [epoch for _, epoch, *_ in course(run)] == [3 * n / 5 for n in range(1, 7)]
    expected = [learning_rate(3 * n / 5, peak, 1, 4) for n in range(6)]
    assert [rate for _, _, _, rate, *_ in course(run)] == pytest.approx(expected)
    assert rates == pytest.approx([rate for rate in expected for _ in range(3)])
    checkpoint, _ = newest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    optimizer = torch.load(checkpoint / "optimizer.bin", weights_only=True)
    assert {int(state["step"]) for state in optimizer["state"].values()} == {6}


# Stopping and resuming


def run_in_two_parts(
    settings: Settings, train: Train, folder: Path, before_second: Callable[[], None] = lambda: None, **options: Any
) -> tuple[Path, Path]:
    """An uninterrupted run of 12 steps and one that ends after 6 and is continued."""
    whole = train(settings(output_dir=str(folder / "whole"), max_steps=12, **options))
    parts = str(folder / "parts")
    train(settings(output_dir=parts, max_steps=6, **options))
    before_second()
    return whole, train(settings(output_dir=parts, max_steps=12, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"streaming": True},
        {"streaming": False},
        {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5},
        {"num_workers": 1},
    ],
    ids=str,
)
def test_a_resumed_run_is_the_uninterrupted_one(
    options: dict[str, Any], write_shards: Write, settings: Settings, run_pretraining: Train, tmp_path: Path
) -> None:
    write_shards(20, 13, 8)
    whole, parts = run_in_two_parts(settings, run_pretraining, tmp_path, **options)
    assert [step for step, *_ in course(whole)] == list(range(1, 13))
    assert course(whole) == course(parts)
    assert same_weights(whole, parts)


def load_only_weights(accelerator: Accelerator, checkpoint: Path) -> None:
    accelerator._models[0].load_state_dict(load_file(checkpoint / "model.safetensors"), strict=False)


def without_forwards(**progress: Any) -> Progress:
    return Progress(**(progress | {"forwards": 0}))


@pytest.mark.parametrize("mutant", ["weights only", "data and masks from the start", "masks by the number of calls"])
def test_an_incomplete_resume_would_be_noticed(
    mutant: str,
    write_shards: Write,
    settings: Settings,
    run_pretraining: Train,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_shards(20, 13, 8)
    original, calls = pretrain.view_noise, count()

    def train(config: PretrainConfig) -> Path:
        nonlocal calls
        calls = count()
        return run_pretraining(config)

    def forget() -> None:
        if mutant == "weights only":
            monkeypatch.setattr(run_module, "load_checkpoint", load_only_weights)
        elif mutant == "data and masks from the start":
            monkeypatch.setattr(run_module, "Progress", without_forwards)

    if mutant == "masks by the number of calls":
        monkeypatch.setattr(pretrain, "view_noise", lambda seed, forward, *rest: original(seed, next(calls), *rest))
    whole, parts = run_in_two_parts(settings, train, tmp_path, before_second=forget)
    assert course(whole)[:6] == course(parts)[:6]
    assert course(whole) != course(parts)
    assert not same_weights(whole, parts)


def test_a_finished_run_is_not_trained_further(
    write_shards: Write, settings: Settings, run_pretraining: Train, tmp_path: Path
) -> None:
    write_shards(20)
    run = run_pretraining(settings(max_steps=3))
    kept = shutil.copytree(run, tmp_path / "kept")
    run_pretraining(settings(max_steps=3))
    assert course(run) == course(kept)
    assert same_weights(run, kept)
    assert saved_steps(run) == [3]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"base_lr": 0.03}, "base_lr: 0.02 → 0.03"),
        ({"seed": 1}, "seed: 0 → 1"),
        ({"mask_ratio": 0.25}, "mask_ratio: 0.5 → 0.25"),
        ({"hidden_size": 64}, "hidden_size: 32 → 64"),
        ({"per_device_batch_size": 4}, "forward_images: 8 → 4"),
        ({"max_images": 16}, "data: "),
        ({"streaming": False}, "streaming: None → False"),
    ],
    ids=lambda change: next(iter(change)) if isinstance(change, dict) else "",
)
def test_another_recipe_is_not_resumed(
    change: dict[str, Any], named: str, finished_run: Path, settings: Settings, run_pretraining: Train
) -> None:
    with pytest.raises(ValueError, match=re.escape(named)) as refused:
        run_pretraining(settings(max_steps=5, **change))
    assert "--output_dir" in str(refused.value)
    assert "epochs" not in str(refused.value)
    assert saved_steps(finished_run) == [3]


@pytest.fixture
def finished_run(write_shards: Write, settings: Settings, run_pretraining: Train) -> Path:
    """Three steps, saved at the last."""
    write_shards(20)
    return run_pretraining(settings(max_steps=3))


def test_other_data_of_the_same_name_is_not_resumed(
    finished_run: Path, write_shards: Write, settings: Settings, run_pretraining: Train
) -> None:
    write_shards(24)
    with pytest.raises(ValueError, match="data: "):
        run_pretraining(settings(max_steps=5))


def test_what_does_not_change_the_course_may_change_on_resuming(
    finished_run: Path, settings: Settings, run_pretraining: Train
) -> None:
    change = {"num_workers": 1, "save_steps": 2, "logging_steps": 2, "gradient_checkpointing": True}
    run_pretraining(settings(max_steps=5, max_bad_fraction=0.5, knn_images=5, **change))
    assert saved_steps(finished_run) == [3, 4, 5]


def test_a_new_start_can_be_asked_for(finished_run: Path, settings: Settings, run_pretraining: Train) -> None:
    before = course(finished_run)
    run_pretraining(settings(max_steps=3, resume="none"))
    assert course(finished_run) == before
    run_pretraining(settings(max_steps=3, resume="none", seed=5))
    assert course(finished_run) != before


def test_a_run_continues_from_a_given_checkpoint_of_another(
    write_shards: Write, settings: Settings, run_pretraining: Train, tmp_path: Path
) -> None:
    write_shards(20)
    whole = run_pretraining(settings(output_dir=str(tmp_path / "whole"), max_steps=6, save_steps=2))
    given = whole / "checkpoints" / "step-000004"
    branch = run_pretraining(settings(output_dir=str(tmp_path / "branch"), max_steps=6, resume=str(given)))
    assert [step for step, *_ in course(branch)] == [5, 6]
    assert same_weights(whole, branch)


def test_a_damaged_checkpoint_is_refused_if_given_and_passed_over_if_not(
    write_shards: Write,
    settings: Settings,
    run_pretraining: Train,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_shards(20)
    run = run_pretraining(settings(max_steps=4, save_steps=2))
    whole = shutil.copytree(run, tmp_path / "whole")
    damaged = run / "checkpoints" / "step-000004"
    os.truncate(damaged / "optimizer.bin", 100)
    with pytest.raises(ValueError, match=r"step-000004: optimizer.bin is damaged"):
        run_pretraining(settings(max_steps=4, save_steps=2, resume=str(damaged)))
    run_pretraining(settings(max_steps=4, save_steps=2))
    printed = capsys.readouterr().out
    assert "not resuming from" in printed
    assert "optimizer.bin is damaged" in printed
    assert f"resuming from {run / 'checkpoints' / 'step-000002'}" in printed
    assert course(run) == course(whole)
    assert same_weights(run, whole)
    assert find_defect(damaged) is None


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[signal.Signals, int], None]:
    """Send this process a signal after a forward pass of a run to come, once."""

    def send(number: signal.Signals, forward: int) -> None:
        original = Logger.add
        calls = count(1)

        def add(self: Logger, *args: Any) -> None:
            original(self, *args)
            if next(calls) == forward:
                os.kill(os.getpid(), number)

        monkeypatch.setattr(Logger, "add", add)

    return send


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("options", [{}, {"logging_steps": 4}, {"gradient_accumulation_steps": 2}], ids=str)
def test_an_interrupted_run_saves_and_continues(
    number: signal.Signals,
    options: dict[str, Any],
    write_shards: Write,
    settings: Settings,
    run_pretraining: Train,
    interrupt: Callable[[signal.Signals, int], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_shards(41)
    whole = run_pretraining(settings(output_dir=str(tmp_path / "whole"), max_steps=8, **options))
    interrupt(number, 5)
    run = run_pretraining(settings(max_steps=8, **options))
    (stopped,) = saved_steps(run)
    assert 1 <= stopped < 8
    assert f"Stopped at step {stopped}, all saved" in capsys.readouterr().out
    assert not (run / "model").exists()
    run_pretraining(settings(max_steps=8, **options))
    assert same_weights(whole, run)
    if "logging_steps" not in options:
        assert course(whole) == course(run)


@pytest.mark.usefixtures("no_accelerator")
def test_a_second_signal_ends_at_once() -> None:
    stop = StopRequest()
    assert not stop.came
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.came
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


# Failures


@pytest.fixture
def broken_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Make the pixels NaN from a forward pass on."""

    def set_up(forwards: int) -> None:
        calls = count(1)

        def poisoned(pixels: Tensor) -> Tensor:
            return normalize_pixels(pixels) * (math.nan if next(calls) > forwards else 1)

        monkeypatch.setattr(pretrain, "normalize_pixels", poisoned)

    return set_up


def finite_checkpoints(run: Path) -> Iterator[bool]:
    for step in saved_steps(run):
        tensors = load_file(run / "checkpoints" / f"step-{step:06d}" / "model.safetensors").values()
        yield all(torch.isfinite(tensor).all() for tensor in tensors)


@pytest.mark.parametrize("logging_steps", [1, 2, 100])
def test_a_loss_that_is_no_number_stops_the_run_before_it_is_saved(
    logging_steps: int,
    write_shards: Write,
    settings: Settings,
    run_pretraining: Train,
    broken_after: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_shards(41)
    config = settings(max_steps=20, save_steps=3, logging_steps=logging_steps)
    broken_after(4)
    with pytest.raises(RuntimeError):
        run_pretraining(config)
    run = Path(config.output_dir)
    assert saved_steps(run) == [3]
    assert all(finite_checkpoints(run))
    monkeypatch.undo()
    checkpoint, refused = newest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    assert not refused
    assert read_state(checkpoint)["progress"]["step"] == 3


@pytest.mark.parametrize(("logging_steps", "noticed"), [(1, 5), (2, 6), (100, 6)])
def test_a_loss_that_is_no_number_is_named_with_advice(
    logging_steps: int,
    noticed: int,
    write_shards: Write,
    settings: Settings,
    run_pretraining: Train,
    broken_after: Callable[[int], None],
) -> None:
    write_shards(41)
    broken_after(4)
    with pytest.raises(RuntimeError, match=f"Step {noticed}: loss nan.*lower base_lr"):
        run_pretraining(settings(max_steps=20, save_steps=3, logging_steps=logging_steps))


def test_an_absurd_learning_rate_stops_the_run_with_advice(
    write_shards: Write, settings: Settings, run_pretraining: Train
) -> None:
    write_shards(20)
    config = settings(base_lr=1e30, save_steps=1, max_steps=20)
    with pytest.raises(RuntimeError, match="lower base_lr"):
        run_pretraining(config)
    assert all(finite_checkpoints(Path(config.output_dir)))


THIRTY_PERCENT = {number for number in range(40) if number % 10 < 3}


def test_too_many_broken_images_stop_the_run(
    write_shards: Write, settings: Settings, run_pretraining: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(25, 15, broken=THIRTY_PERCENT)
    with pytest.raises(RuntimeError, match=r"\d+ of \d+ images were broken, more than max_bad_fraction=0.1"):
        run_pretraining(settings(max_bad_fraction=0.1))
    named = re.findall(r"skipped a broken image.*\(picture-(\d+).png\)", capsys.readouterr().err)
    assert len(named) > 4
    assert {int(number) for number in named} <= THIRTY_PERCENT


def test_tolerated_broken_images_are_counted_also_over_a_resume(
    write_shards: Write, settings: Settings, run_pretraining: Train
) -> None:
    write_shards(25, 15, broken=THIRTY_PERCENT)
    config = {"max_bad_fraction": 0.5, "epochs": 4, "logging_steps": 2}
    run_pretraining(settings(max_steps=7, **config))
    run = run_pretraining(settings(**config))
    entries = read_metrics(run / "metrics.jsonl")
    assert entries[-1]["step"] == 20
    assert entries[-1]["broken_images"] == 4 * len(THIRTY_PERCENT)


def test_few_broken_images_at_the_beginning_are_tolerated(
    write_shards: Write, settings: Settings, run_pretraining: Train
) -> None:
    """One broken image in the first batch of eight is more than a tenth of it, but not of the data."""
    write_shards(40, broken={3})
    assert course(run_pretraining(settings(epochs=2)))[-1][0] == 10


# The command


@pytest.fixture
def start_command(tmp_path: Path) -> Iterator[Callable[[PretrainConfig], subprocess.Popen[str]]]:
    """Start the command with these settings; it and its workers do not outlive the test."""
    started = []
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "HF_HOME": str(tmp_path / "home"),
    }

    def start(config: PretrainConfig) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "training.pretrain"]
        for name, value in config.to_dict().items():
            values = value if isinstance(value, list) else [] if value is None else [value]
            command += [f"--{name}", *map(str, values)] if values else []
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@pytest.mark.slow
def test_ctrl_c_at_the_command_line_loses_nothing(
    write_shards: Write,
    settings: Settings,
    start_command: Callable[[PretrainConfig], subprocess.Popen[str]],
    tmp_path: Path,
) -> None:
    """The signal reaches the whole process group, the decoding process included, as from a terminal."""
    write_shards(41)
    config = settings(epochs=60, num_workers=1)
    run = Path(config.output_dir)
    first = start_command(config)
    deadline = time.monotonic() + 60
    while len(read_metrics(run / "metrics.jsonl")) < 20:
        assert first.poll() is None, first.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(first.pid, signal.SIGINT)
    printed, complaints = first.communicate(timeout=60)
    assert first.returncode == 0, complaints
    assert "Traceback" not in complaints
    (stopped,) = saved_steps(run)
    assert 20 <= stopped < 300
    assert f"Stopped at step {stopped}, all saved: the same command continues from there." in printed

    second = start_command(config)
    printed, complaints = second.communicate(timeout=120)
    assert second.returncode == 0, complaints
    assert f"resuming from {run / 'checkpoints' / f'step-{stopped:06d}'}" in printed
    assert [step for step, *_ in course(run)] == list(range(1, 301))

    whole = tmp_path / "whole"
    third = start_command(settings(epochs=60, num_workers=0, output_dir=str(whole)))
    _, complaints = third.communicate(timeout=120)
    assert third.returncode == 0, complaints
    assert course(whole) == course(run)
    assert same_weights(whole, run)
