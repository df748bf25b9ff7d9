"""A folder has one run at a time; whoever is gone, in whatever way, keeps nobody out."""

import errno
import fcntl
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from training import alone, pretrain
from training.alone import alone_in
from training.config import PretrainConfig


Settings = Callable[..., PretrainConfig]
FOR_LONG = 600.0


@pytest.fixture
def config(settings: Settings, no_accelerator: None, monkeypatch: pytest.MonkeyPatch) -> PretrainConfig:
    """Of a run that has no patience."""
    monkeypatch.setattr(alone, "PATIENCE", 0.5)
    return settings()


@contextmanager
def another_run(config: PretrainConfig, seconds: float, with_worker: bool = False) -> Iterator[int]:
    """A process, and perhaps a worker of it, that is in the run's folder for so long; gives its number."""
    ready, given = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.setsid()
            with alone_in(config, Accelerator()):
                if with_worker and not os.fork():
                    time.sleep(FOR_LONG)
                os.write(given, b".")
                time.sleep(seconds)
        finally:
            os._exit(0)
    assert os.read(ready, 1) == b"."
    try:
        yield pid
    finally:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_second_run_is_refused_before_it_writes_anything(config: PretrainConfig, write_shards: Any) -> None:
    write_shards(20)
    with another_run(config, FOR_LONG) as pid:
        before = sorted(Path(config.output_dir).iterdir())
        with pytest.raises(RuntimeError, match=rf"Another run \(process {pid} on .*\) is writing to .*--output_dir"):
            pretrain.main(config)
        assert sorted(Path(config.output_dir).iterdir()) == before


def test_it_waits_for_one_that_is_ending(
    config: PretrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(alone, "PATIENCE", 60)
    with another_run(config, 1) as pid, alone_in(config, Accelerator()):
        assert f"waiting up to 60 s for process {pid} on" in capsys.readouterr().err


@pytest.mark.parametrize("with_worker", [False, True])
def test_one_that_was_killed_keeps_nobody_out(
    with_worker: bool, config: PretrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    with another_run(config, FOR_LONG, with_worker) as pid:
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        with alone_in(config, Accelerator()):
            assert (Path(config.output_dir) / ".lock").read_text().startswith(f"process {os.getpid()} on ")
        assert capsys.readouterr().err == ""


def test_one_that_has_ended_in_this_process_keeps_nobody_out_and_leaves_nothing(config: PretrainConfig) -> None:
    folder = Path(config.output_dir)
    with alone_in(config, Accelerator()):
        pass
    assert not folder.exists()
    with another_run(config, FOR_LONG):
        pass
    folder.mkdir(exist_ok=True)
    with alone_in(config, Accelerator()):
        assert [file.name for file in folder.iterdir()] == [".lock"]
    assert list(folder.iterdir()) == []


def test_a_lock_that_is_removed_while_others_wait_for_it_lets_in_one_of_them(
    config: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have opened a file that is gone: to lock it says nothing about the next one."""
    lock = alone._lock

    def too_late(file: Any) -> bool:
        if not done:
            done.append(True)
            (Path(config.output_dir) / ".lock").unlink()
            others.enter_context(another_run(config, FOR_LONG))
        return lock(file)

    done = list[bool]()
    with ExitStack() as others:
        monkeypatch.setattr(alone, "_lock", too_late)
        with pytest.raises(RuntimeError, match="Another run"), alone_in(config, Accelerator()):
            pass


def test_a_file_system_without_locks_or_a_full_disk_keeps_nobody_out(
    config: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    with another_run(config, FOR_LONG), monkeypatch.context() as patch:
        patch.setattr(fcntl, "lockf", refuse)
        with alone_in(config, Accelerator()):
            pass
    monkeypatch.setattr(Path, "open", refuse)
    with alone_in(config, Accelerator()):
        pass
