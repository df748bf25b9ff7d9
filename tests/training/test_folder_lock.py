"""One run to a folder at a time, also after a crash."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Timer

import pytest

from training import run
from training.config import PretrainConfig
from training.folder_lock import LOCK, lock_folder


def keep(folder: Path, told: Connection) -> None:
    file = lock_folder(folder)
    child = os.fork()  # as DataLoader's workers are made
    if child == 0:
        time.sleep(60)
        os._exit(0)
    told.send(child)
    time.sleep(60)
    file.close()


@pytest.fixture
def other(tmp_path: Path) -> Iterator[multiprocessing.Process]:
    """A process that keeps the folder, with a child that it has forked."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=keep, args=(tmp_path, there))
    process.start()
    child = here.recv()
    yield process
    process.kill()
    os.kill(child, signal.SIGKILL)


def test_a_second_run_is_refused_by_the_name_of_the_first(tmp_path: Path, other: multiprocessing.Process) -> None:
    with pytest.raises(ValueError, match=rf"output_dir=.* is in use by process {other.pid} on .*another folder"):
        lock_folder(tmp_path, patience=0.2)
    assert other.is_alive()


def test_a_run_that_is_refused_writes_nothing(
    tmp_path: Path,
    other: multiprocessing.Process,
    write_shards: Callable[..., Path],
    settings: Callable[..., PretrainConfig],
    run_pretraining: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_shards(41)
    monkeypatch.setattr(run, "lock_folder", partial(lock_folder, patience=0))
    with pytest.raises(ValueError, match=f"is in use by process {other.pid}"):
        run_pretraining(settings(output_dir=str(tmp_path)))
    assert {path.name for path in tmp_path.iterdir()} == {"data", "checkpoints"}
    assert list((tmp_path / "checkpoints").iterdir()) == [tmp_path / LOCK]


def test_a_killed_run_keeps_nothing_though_its_workers_live(tmp_path: Path, other: multiprocessing.Process) -> None:
    other.kill()
    other.join()
    file = lock_folder(tmp_path, patience=0)
    assert f"process {os.getpid()} on" in (tmp_path / LOCK).read_text()
    file.close()


def test_a_run_that_is_about_to_end_is_waited_for(
    tmp_path: Path, other: multiprocessing.Process, capsys: pytest.CaptureFixture[str]
) -> None:
    Timer(0.3, other.kill).start()
    lock_folder(tmp_path, patience=30).close()
    assert capsys.readouterr().out.count(f"is in use by process {other.pid}") == 1


def test_runs_of_one_process_follow_each_other(tmp_path: Path) -> None:
    first = lock_folder(tmp_path / "new" / "run", patience=0)
    lock_folder(tmp_path / "new" / "run", patience=0).close()
    first.close()
