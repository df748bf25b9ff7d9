"""Starts of the pre-training command, and their ends: whole, or of one of the processes alone."""

import os
import random
import runpy
import socket
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch


ROOT = Path(__file__).parents[2]
MODULE = "training.pretrain"
END = 900  # seconds that a whole run may take
PATIENCE = 120  # seconds that processes may take to end after one of them was killed


class Start:
    """The processes of one start of a run; what they print is in a file.

    Args:
        processes: that train.
        launcher: that has started them, None if they have none.
    """

    def __init__(self, processes: list[psutil.Process], launcher: psutil.Process | None) -> None:
        self.started, self.launcher = processes, launcher

    def trainers(self) -> list[psutil.Process]:
        """The processes that train, as far as they are there already."""
        return self.started or _children(self.launcher)

    def is_running(self) -> bool:
        """Whether some process has not ended."""
        return any(
            process.is_running() and process.status() != psutil.STATUS_ZOMBIE
            for process in (self.started or [self.launcher])
        )

    def kill(self, target: str, moments: random.Random) -> None:
        """Kill "all" processes, "one" that trains, or the "launcher"; and wait until all have ended."""
        trainers = self.trainers()
        everything = trainers + ([self.launcher] if self.launcher else [])
        victims = {"all": everything, "one": trainers and [moments.choice(trainers)], "launcher": [self.launcher]}
        for process in victims[target] or everything:
            _kill(process)
        _, left = psutil.wait_procs(everything, PATIENCE)
        for process in left:
            _kill(process)
        assert not left, f"{target} killed, but {len(left)} processes have not ended in {PATIENCE} seconds"

    def status(self) -> int:
        """Wait for the end; 0 if all went well."""
        return max(abs(int(process.wait(END) or 0)) for process in (self.started or [self.launcher]))


def start_command(flags: Sequence[str], processes: int, log: Path, environment: dict[str, str]) -> Start:
    """Start the command as a user does: by python, or on several processes by torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", MODULE, *flags]
    with log.open("w") as file:
        child = psutil.Popen(command, cwd=ROOT, env=os.environ | environment, stdout=file, stderr=file)
    return Start([child], None) if processes == 1 else Start([], child)


def start_forks(flags: Sequence[str], processes: int, log: Path, environment: dict[str, str]) -> Start:
    """Run the command in forks of this process, which has imported everything."""
    log.write_text("")
    if processes == 1:
        return Start([_fork(flags, log, environment)], None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = environment | {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    return Start([_fork(flags, log, variables) for variables in ranks], None)


def _fork(flags: Sequence[str], log: Path, environment: dict[str, str]) -> psutil.Process:
    child = os.fork()
    if child:
        return psutil.Process(child)
    status = 1
    try:
        os.environ |= environment
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))  # torch has read it
        file = os.open(log, os.O_APPEND | os.O_WRONLY)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout.reconfigure(line_buffering=True)
        sys.argv = [MODULE, *flags]
        runpy.run_module(MODULE, run_name="__main__", alter_sys=True)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _children(process: psutil.Process | None) -> list[psutil.Process]:
    try:
        return process.children() if process else []
    except psutil.NoSuchProcess:
        return []


def _kill(process: psutil.Process | None) -> None:
    try:
        if process:
            process.kill()
    except psutil.NoSuchProcess:
        pass
