"""A step whose gradient is not finite leaves everything as it was; too many of them in a row end the run."""

import re
import time
from collections.abc import Callable, Collection, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest
from run_folder import course, same_weights, saved_steps
from safetensors.torch import load_file
from torch import Tensor

from training import checkpoint, loop, pretrain
from training.agreement import Agreement
from training.batch import Batch
from training.checkpoint import newest_checkpoint, read_state
from training.config import PretrainConfig
from training.log_files import read_metrics
from training.stream import StreamError


Write = Callable[..., Path]
Settings = Callable[..., PretrainConfig]
Train = Callable[..., Path]


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[[Collection[int]], None]:
    """Have the images of these forward passes of the next run hold what is no number."""
    original = pretrain.normalize_pixels

    def spoil(forwards: Collection[int]) -> None:
        number = count(1)

        def normalize(pixels: Tensor) -> Tensor:
            normal = original(pixels)
            return normal * float("nan") if next(number) in forwards else normal

        monkeypatch.setattr(pretrain, "normalize_pixels", normalize)

    return spoil


@pytest.fixture
def tell_later(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Have processes know of a step only so many steps later."""
    original = Agreement.__init__

    def tell_later(delay: int) -> None:
        def start(self: Agreement, *args: Any) -> None:
            original(self, *args)
            self.delay = delay

        monkeypatch.setattr(Agreement, "__init__", start)

    return tell_later


def state(run: Path, step: int) -> dict[str, Tensor]:
    """Weights and optimiser of a checkpoint."""
    folder = run / "checkpoints" / f"step-{step:06d}"
    return load_file(folder / "model.safetensors") | load_file(folder / "optimizer.safetensors")


def same_state(run: Path, step: int, other: int) -> bool:
    some, others = state(run, step), state(run, other)
    return some.keys() == others.keys() and all(some[name].equal(others[name]) for name in some)


@pytest.mark.parametrize(
    ("options", "spoilt"),
    [({}, {3, 5, 6}), ({"max_grad_norm": 0.5}, {3, 5, 6}), ({"gradient_accumulation_steps": 2}, {5, 6, 9, 12})],
    ids=str,
)
@pytest.mark.parametrize("delay", [0, 1])
def test_a_bad_step_is_skipped(
    delay: int,
    options: dict[str, Any],
    spoilt: set[int],
    write_shards: Write,
    settings: Settings,
    run_pretraining: Train,
    spoil: Callable[[Collection[int]], None],
    tell_later: Callable[[int], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the delay of a GPU, too."""
    tell_later(delay)
    write_shards(41)
    spoil(spoilt)
    run = run_pretraining(settings(max_steps=8, save_steps=1, save_total_limit=10, max_bad_steps=2, **options))
    for step in range(2, 9):
        assert same_state(run, step - 1, step) == (step in {3, 5, 6}), step
    assert read_state(newest_checkpoint(run / "checkpoints")[0] or run)["progress"]["skipped"] == 3
    entries = [entry for entry in read_metrics(run / "metrics.jsonl") if "loss" in entry]
    assert [entry["skipped_steps"] for entry in entries] == [0, 0, 1, 1, 2, 3, 3, 3]
    said = re.findall(r"WARNING: Step (\d+) is skipped", capsys.readouterr().err)
    assert said == ["3", "5"]  # once for each event


def test_the_loss_of_an_entry_is_that_of_its_good_batches(
    write_shards: Write,
    settings: Settings,
    run_pretraining: Train,
    spoil: Callable[[Collection[int]], None],
    tmp_path: Path,
) -> None:
    write_shards(41)
    spoil({3})
    each = run_pretraining(settings(max_steps=4))
    spoil({3})
    together = run_pretraining(settings(max_steps=4, logging_steps=4, output_dir=str(tmp_path / "together")))
    losses = [loss for _, _, loss, *_ in course(each)]
    assert losses[2] != losses[2]  # not a number
    assert course(together)[0][2] == pytest.approx(sum(losses[n] for n in (0, 1, 3)) / 3)


@pytest.mark.parametrize(("most", "last"), [(2, 5), (0, 3)])
def test_too_many_in_a_row_end_the_run_with_a_good_checkpoint(
    most: int,
    last: int,
    write_shards: Write,
    settings: Settings,
    run_pretraining: Train,
    spoil: Callable[[Collection[int]], None],
    tmp_path: Path,
) -> None:
    write_shards(41)
    whole = run_pretraining(settings(max_steps=8, output_dir=str(tmp_path / "whole")))
    spoil({3, 4, 5})
    config = settings(max_steps=8, save_steps=2, max_bad_steps=most)
    with pytest.raises(RuntimeError, match=rf"Step {last}: .*checkpoints is good\. Try"):
        run_pretraining(config)
    run = Path(config.output_dir)
    assert saved_steps(run) == ([2, 4] if most else [2])
    if most:
        assert same_state(run, 2, 4)
    spoil(())
    run_pretraining(settings(max_steps=8, resume=str(run / "checkpoints" / "step-000002")))
    assert same_weights(run, whole)


def test_looking_for_bad_steps_changes_nothing(
    write_shards: Write, settings: Settings, run_pretraining: Train, tmp_path: Path
) -> None:
    write_shards(41)
    runs = [
        run_pretraining(settings(max_steps=6, logging_steps=2, max_bad_steps=n, output_dir=str(tmp_path / str(n))))
        for n in (0, 3)
    ]
    assert course(runs[0]) == course(runs[1])
    assert same_weights(*runs)


def test_one_before_a_failing_stream_is_counted_and_all_is_saved(
    write_shards: Write,
    settings: Settings,
    run_pretraining: Train,
    spoil: Callable[[Collection[int]], None],
    tell_later: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Even if checkpoints are written in the background, and what a GPU tells of the step is still to be read."""
    whole, write = loop.process_batches, checkpoint.write_files

    def three_batches(*args: Any) -> Iterator[Batch]:
        yield from islice(whole(*args), 3)
        raise StreamError("The line is cut.")

    def write_slowly(*args: Any) -> None:
        time.sleep(1)
        write(*args)

    monkeypatch.setattr(loop, "process_batches", three_batches)
    monkeypatch.setattr(checkpoint, "write_files", write_slowly)
    tell_later(1)
    write_shards(41)
    spoil({3})
    config = settings(max_steps=8, logging_steps=5, async_checkpoints=True)
    with pytest.raises(StreamError, match="The line is cut"):
        run_pretraining(config)
    run = Path(config.output_dir)
    assert saved_steps(run) == [3]
    assert read_state(run / "checkpoints" / "step-000003")["progress"]["skipped"] == 1
    assert read_metrics(run / "metrics.jsonl")[-1]["skipped_steps"] == 1
    assert not (run / "STOPPED").exists()
