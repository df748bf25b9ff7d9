"""Whole runs: what they say when they fail, and what is tolerated."""

import math
import re
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
import torch
from run_folder import course, saved_steps
from safetensors.torch import load_file
from torch import Tensor

from training import pretrain
from training.checkpoint import newest_checkpoint, read_state
from training.config import PretrainConfig
from training.features import normalize_pixels
from training.log_files import read_metrics


Write = Callable[..., Path]
Settings = Callable[..., PretrainConfig]
Train = Callable[..., Path]

# What a run leaves behind


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
    config = settings(max_steps=20, save_steps=3, logging_steps=logging_steps, max_bad_steps=0)
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
        run_pretraining(settings(max_steps=20, save_steps=3, logging_steps=logging_steps, max_bad_steps=0))


def test_steps_are_skipped_before_a_run_of_bad_ones_stops(
    write_shards: Write, settings: Settings, run_pretraining: Train, broken_after: Callable[[int], None]
) -> None:
    write_shards(41)
    config = settings(max_steps=20, save_steps=3)
    broken_after(4)
    with pytest.raises(RuntimeError, match=r"Step 8: gradient not finite, 4 times in a row\..*lower base_lr"):
        run_pretraining(config)
    run = Path(config.output_dir)
    assert saved_steps(run) == [3, 6]
    assert all(finite_checkpoints(run))


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
