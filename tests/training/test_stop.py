"""What a run takes for a request to stop, and how it ends when all is saved already."""

import os
import signal
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from run_folder import course, saved_steps

from training import checkpoint, pretrain, stop
from training.checkpoint import find_defect
from training.config import PretrainConfig
from training.log import Logger
from training.log_files import read_metrics
from training.pretrain import Contrast
from training.stop import LAUNCHED, StopRequest


Settings = Callable[..., PretrainConfig]


@pytest.fixture
def request_at(no_accelerator: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Send a signal at this time, in seconds."""

    def send(seconds: float) -> None:
        monkeypatch.setattr(stop, "time", SimpleNamespace(monotonic=lambda: seconds))
        os.kill(os.getpid(), signal.SIGTERM)

    return send


def test_a_signal_that_a_launcher_repeats_is_one_request_and_a_later_one_ends_at_once(
    request_at: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(signal, "raise_signal", ended.append)
    asked = StopRequest()
    assert not asked.came
    request_at(100.0)
    assert asked.came
    request_at(102.0)
    assert not ended
    request_at(103.5)
    assert ended == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.usefixtures("no_accelerator")
@pytest.mark.parametrize("launched_by", ["the shell", *LAUNCHED])
def test_a_run_whose_launcher_is_gone_is_to_stop_but_not_one_whose_shell_is(
    launched_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    if launched_by != "the shell":
        monkeypatch.setenv(launched_by, "no")
    asked = StopRequest()
    assert not asked.came
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert asked.came == (launched_by != "the shell")


def test_a_signal_during_the_last_evaluation_ends_the_run_and_the_same_command_finishes_it(
    write_shards: Callable[..., Path],
    settings: Settings,
    run_pretraining: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def signal_amid(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        raise AssertionError("the run went on")

    write_shards(20)
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "finish", signal_amid)
        with pytest.raises(SystemExit) as ended:
            run_pretraining(settings(max_steps=3))
    run = Path(settings().output_dir)
    assert ended.value.code == 75
    assert (run / "STOPPED").exists()
    assert saved_steps(run) == [3]
    before = course(run)
    run_pretraining(settings(max_steps=3))
    assert not (run / "STOPPED").exists()
    assert (run / "model").exists()
    assert course(run) == before


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("number", [0, 2])
def test_a_signal_during_an_evaluation_ends_the_run_which_evaluates_when_it_goes_on(
    number: int,
    asynchronous: bool,
    write_shards: Callable[..., Path],
    settings: Settings,
    run_pretraining: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    evaluate, evaluations = Contrast.evaluate, count()

    def signal_amid(self: Contrast) -> dict[str, float]:
        if next(evaluations) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self)

    write_shards(20)
    write_shards(10, split="test")
    options = {"knn_images": 10, "knn_epochs": 1, "max_steps": 6, "logging_steps": 4, "save_steps": 5}
    whole = run_pretraining(settings(output_dir=str(tmp_path / "whole"), **options))
    options |= {"output_dir": str(tmp_path / "run"), "async_checkpoints": asynchronous}
    with monkeypatch.context() as patch:
        patch.setattr(Contrast, "evaluate", signal_amid)
        with pytest.raises(SystemExit) as ended:
            run_pretraining(settings(**options))
    run, step = tmp_path / "run", 2 * number  # of two steps per epoch
    assert ended.value.code == 75
    assert (run / "STOPPED").read_text() == f"step {step}\n"
    assert (saved_steps(run) or [0])[-1] == step
    run_pretraining(settings(**options))
    assert course(run) == course(whole)
    of_both = [read_metrics(folder / "metrics.jsonl") for folder in (run, whole)]
    entries = [[(e["step"], e["knn_accuracy"]) for e in kept if "knn_accuracy" in e] for kept in of_both]
    assert entries[0] == entries[1]
    assert [at for at, _ in entries[0]] == [0, 2, 4, 6]


def test_a_run_that_goes_on_where_it_was_evaluated_is_not_evaluated_again(
    write_shards: Callable[..., Path],
    settings: Settings,
    run_pretraining: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_shards(20)
    write_shards(10, split="test")
    config = settings(knn_images=10, knn_epochs=1, max_steps=6, save_steps=5)
    add = Logger.add

    def crash(self: Logger, *args: Any) -> None:
        add(self, *args)
        if self.run.progress.step == 4:
            raise RuntimeError("lost")

    with monkeypatch.context() as patch:
        patch.setattr(Logger, "add", crash)
        with pytest.raises(RuntimeError, match="lost"):
            run_pretraining(config)
    run = run_pretraining(config)
    entries = read_metrics(run / "metrics.jsonl")
    assert [entry["step"] for entry in entries if "knn_accuracy" in entry] == [0, 2, 4, 6]


def test_a_stop_waits_for_the_checkpoints_that_are_being_written_and_nothing_follows_them(
    write_shards: Callable[..., Path],
    settings: Settings,
    run_pretraining: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both of a checkpoint before and of the one for the stop, which is at a step that is saved anyway."""
    write, add, forwards = checkpoint.write_files, Logger.add, count(1)
    followed: list[int] = []

    def write_slowly(*args: Any) -> None:
        time.sleep(1)
        write(*args)

    def add_and_signal(self: Logger, *args: Any) -> None:
        add(self, *args)
        if next(forwards) == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(checkpoint, "write_files", write_slowly)
    monkeypatch.setattr(Logger, "add", add_and_signal)
    monkeypatch.setattr(Contrast, "after_checkpoint", lambda self: followed.append(self.run.progress.step))
    write_shards(41)
    run = run_pretraining(settings(max_steps=8, save_steps=2, async_checkpoints=True))
    assert (run / "STOPPED").read_text() == "step 4\n"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000002", "step-000004"]
    assert [find_defect(path) for path in (run / "checkpoints").iterdir()] == [None, None]
    assert followed == [2]
