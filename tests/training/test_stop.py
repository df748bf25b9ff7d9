"""What a run takes for a request to stop, and how it ends when all is saved already."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from run_folder import course, saved_steps

from training import pretrain, stop
from training.config import PretrainConfig
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
