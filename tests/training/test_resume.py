"""Stopping and resuming change nothing."""

import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from forks import Fork, command
from run_folder import course, same_weights, saved_steps
from safetensors.torch import load_file

from training import pretrain
from training import run as run_module
from training.checkpoint import find_defect
from training.config import PretrainConfig
from training.log import Logger
from training.log_files import read_metrics
from training.run import Progress, Run
from training.stop import STOPPED_STATUS


Write = Callable[..., Path]
Settings = Callable[..., PretrainConfig]
Train = Callable[..., Path]
HANGS = 600  # seconds after which a process will not come to its end

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
        {"views_per_decode": 4},  # stops in the middle of a batch's passes
        {"save_steps": 1, "async_checkpoints": True},
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


def load_only_weights(run: Run, checkpoint: Path) -> None:
    run.model.load_state_dict(load_file(checkpoint / "model.safetensors"))


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
    change |= {"keep_every_steps": 4, "async_checkpoints": True, "on_full_disk": "go_on"}
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
    os.truncate(damaged / "optimizer.safetensors", 100)
    with pytest.raises(ValueError, match=r"step-000004: optimizer.safetensors is damaged"):
        run_pretraining(settings(max_steps=4, save_steps=2, resume=str(damaged)))
    run_pretraining(settings(max_steps=4, save_steps=2))
    printed = capsys.readouterr().out
    assert "not resuming from" in printed
    assert "optimizer.safetensors is damaged" in printed
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1], ids=lambda number: number.name)
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
    assert (run / "STOPPED").read_text() == f"step {stopped}\n"
    run_pretraining(settings(max_steps=8, **options))
    assert not (run / "STOPPED").exists()
    assert same_weights(whole, run)
    if "logging_steps" not in options:
        assert course(whole) == course(run)


# The command


@pytest.fixture
def start_command(tmp_path: Path) -> Iterator[Callable[[PretrainConfig], Fork]]:
    """Start the command with these settings; it and its workers do not outlive the test."""
    started = []

    def start(config: PretrainConfig) -> Fork:
        settings = {name: value for name, value in config.to_dict().items() if value not in (None, [])}
        started.append(Fork(command("training.pretrain", **settings), tmp_path / "home"))
        return started[-1]

    yield start
    for process in started:
        process.kill()


def test_a_signal_to_all_processes_loses_nothing(
    write_shards: Write, settings: Settings, start_command: Callable[[PretrainConfig], Fork], tmp_path: Path
) -> None:
    """The signal reaches the whole process group, the decoding process included, as from a terminal."""
    write_shards(41)
    whole = tmp_path / "whole"
    uninterrupted = start_command(settings(epochs=40, num_workers=0, output_dir=str(whole)))
    done = uninterrupted.wait(HANGS)
    assert done.status == 0, done.complaints

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        config = settings(epochs=40, num_workers=1, output_dir=str(tmp_path / number.name))
        run = Path(config.output_dir)
        first = start_command(config)
        deadline = time.monotonic() + HANGS
        while len(read_metrics(run / "metrics.jsonl")) < 20:
            assert not first.ended(), first.wait().complaints
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(first.pid, number)
        done = first.wait(HANGS)
        assert done.status == STOPPED_STATUS == 75, done.complaints
        assert "Traceback" not in done.complaints
        (stopped,) = saved_steps(run)
        assert 20 <= stopped < 200
        assert f"Stopped at step {stopped}, all saved: the same command continues from there." in done.printed

        done = start_command(config).wait(HANGS)
        assert done.status == 0, done.complaints
        assert f"resuming from {run / 'checkpoints' / f'step-{stopped:06d}'}" in done.printed
        assert [step for step, *_ in course(run)] == list(range(1, 201))
        assert course(whole) == course(run)
        assert same_weights(whole, run)
