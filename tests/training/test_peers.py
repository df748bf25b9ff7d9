"""Who is lost, told by what each process last wrote into a store: between threads, and between processes."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch.distributed as dist

from training import peers
from training.peers import AT_WORK, GAVE_UP, Peers


ROOT = Path(__file__).parents[2]
SILENT = "(no sign of life: killed, stopped or cut off)"
Begin = Callable[[int], list[Peers]]
Server = list[dist.TCPStore]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "BEAT", 0.02)
    monkeypatch.setattr(peers, "SILENT", 0.7)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    """What serves the store; it is gone when it is taken from the list."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    return [dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)]


@pytest.fixture
def begin(server: Server) -> Iterator[Begin]:
    """Begin so many processes, of which each knows that all are alive."""
    with ExitStack() as stack:

        def begin(number: int) -> list[Peers]:
            processes = [stack.enter_context(Peers(rank, number)) for rank in range(number)]
            wait(lambda: all(not value.startswith("0 ") for process in processes for value in process.values))
            return processes

        yield begin


def wait(until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def die(*processes: Peers) -> None:
    """Give no sign of life any more."""
    for process in processes:
        process.ended.set()
        process.thread.join()


def test_a_store_that_is_slow_for_once_silences_nobody(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = threading.Event()

    class Store(dist.TCPStore):
        def multi_get(self, keys: list[str]) -> list[bytes]:
            if slow.is_set():
                slow.clear()
                if self.timeout.total_seconds() < 3 * peers.SILENT:
                    raise dist.DistStoreError("timed out")
                time.sleep(3 * peers.SILENT)
            return super().multi_get(keys)

    monkeypatch.setattr(dist, "TCPStore", Store)
    processes = begin(3)
    slow.set()
    wait(lambda: not slow.is_set())
    time.sleep(4 * peers.SILENT)
    assert all(process.thread.is_alive() for process in processes)
    assert all(process.silence(rank) < peers.SILENT for process in processes for rank in range(3))


def test_a_process_that_has_not_given_up_as_the_others_have_hangs(begin: Begin) -> None:
    first, second, _ = begin(3)
    second.state = GAVE_UP
    assert first.lost() == "process 2 (alive, but hangs)"
    assert first.thread.is_alive()


def test_dead_processes_are_named_and_those_that_wait_for_them_still_are_not(begin: Begin) -> None:
    first, second, _, fourth, fifth = begin(5)
    fifth.__exit__(None)  # is done
    die(second, fourth)
    assert first.lost() == f"processes 1, 3 {SILENT}"


def test_a_process_that_failed_is_told_from_a_killed_one(begin: Begin) -> None:
    first, second, third = begin(3)
    second.__exit__(ValueError)
    die(third)  # ended by the launcher, perhaps
    assert first.lost() == "process 1 (ended by an error of its own)"


def test_that_the_server_of_the_store_failed_is_told(
    begin: Begin, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "BEAT", 0.2)
    first, second = begin(2)
    first.__exit__(ValueError)
    server.clear()
    assert second.lost() == "process 0 (ended by an error of its own)"


def test_who_was_waited_for_in_vain_learns_that(begin: Begin) -> None:
    first, second = begin(2)
    first.state = GAVE_UP
    wait(lambda: second.values[0].endswith(GAVE_UP))
    first.__exit__(RuntimeError)
    assert second.lost() == "the others (which have given up waiting for it)"


@pytest.mark.parametrize("launched", [False, True])
def test_with_the_store_its_server_is_gone(
    launched: bool, begin: Begin, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    if launched:
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    _, second, third = begin(3)
    server.clear()
    told = "others (which cannot be told, as the launcher's store is gone, too)"
    assert second.lost() == (told if launched else f"process 0 {SILENT}")
    assert not third.thread.is_alive()


def test_what_was_seen_before_the_store_was_gone_counts(begin: Begin, server: Server) -> None:
    first, second, third = begin(3)
    die(second)
    assert first.lost() == f"process 1 {SILENT}"
    server.clear()
    assert third.lost() == f"process 1 {SILENT}"


def test_a_process_that_is_silent_for_long_is_warned_about_once(
    begin: Begin, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where nothing else tells of it: NCCL ends a process that has waited too long without a Python error."""
    monkeypatch.setattr(peers, "WARN", 0.5)
    first, second = begin(2)
    die(second)
    wait(lambda: bool(first.warned))
    time.sleep(0.2)
    assert capsys.readouterr().err.count("WARNING: process 1 has given no sign of life for") == 1
    assert first.state == AT_WORK


def test_a_process_alone_needs_no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with Peers(0, 1) as process:
        assert not process.thread.is_alive()


@pytest.mark.slow
def test_each_of_three_processes_names_the_fourth() -> None:
    """It is killed, stopped or asleep, or has failed; two times it is the one that serves the store."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    program = [sys.executable, str(Path(__file__).with_name("lost_peers.py"))]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    said = {(line["fault"], line["rank"]): line["said"].partition(" at step 30")[0] for line in lines}
    lost = {"killed": 2, "killed server of the store": 0, "stopped": 1, "stopped server of the store": 0}
    expected = {fault: f"process {rank} {SILENT}" for fault, rank in lost.items()}
    expected |= {"sleeping": "process 3 (alive, but hangs)", "failed": "process 1 (ended by an error of its own)"}
    assert said.pop(("failed", 1)) == "its own error"
    assert said == {
        (fault, rank): f"Process {rank} lost {whom}"
        for fault, whom in expected.items()
        for rank in range(4)
        if not whom.startswith(f"process {rank} ")
    }
