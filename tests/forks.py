"""Programs in forks of this process: real processes, which need not import everything anew before they do anything.

What modules read from the environment as they are imported is that of this process; and a fork has one thread.
"""

import os
import runpy
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from accelerate.state import AcceleratorState, GradientState

from training import finetune, pretrain  # noqa: F401 (what all programs import is there, then)


Action = Callable[[], object]


@dataclass
class Done:
    """What became of processes: the first status that is not 0, and what all of them wrote."""

    status: int
    printed: str
    complaints: str


class Fork:
    """A fork of this process, in a session of its own, that does something and ends as a program does.

    Args:
        action: what it does.
        home: its cache of datasets.
        environment: variables to set.
    """

    def __init__(self, action: Action, home: Path, environment: Mapping[str, str] | None = None) -> None:
        self.files = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115 (they are read at the end)
        self.status: int | None = None
        self.pid = os.fork()
        if not self.pid:
            self._be(action, home, environment or {})

    def _be(self, action: Action, home: Path, environment: Mapping[str, str]) -> None:
        status = 1
        try:
            os.setsid()
            for number, file in enumerate(self.files, start=1):
                os.dup2(file.fileno(), number)
            sys.stdout, sys.stderr = self.files
            for number, handler in (
                (signal.SIGINT, signal.default_int_handler),
                *((each, signal.SIG_DFL) for each in (signal.SIGTERM, signal.SIGUSR1)),
            ):
                signal.signal(number, handler)
            os.environ.update({"ACCELERATE_USE_CPU": "true"} | environment)
            datasets.config.HF_DATASETS_CACHE = home
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
            torch.set_num_threads(1)
            torch.set_num_threads = lambda _: None  # of OpenMP's other threads a fork has none
            action()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)  # noqa: T201
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def ended(self) -> bool:
        """Whether it has come to its end."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status is not None

    def wait(self, seconds: float = 600) -> Done:
        """What became of it; it is killed where it takes longer."""
        deadline = time.monotonic() + seconds
        while not self.ended():
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"A process has not ended: {self._written()[1][-5000:]}")
            time.sleep(0.01)
        assert self.status is not None
        return Done(self.status, *self._written())

    def _written(self) -> tuple[str, str]:
        for file in self.files:
            file.seek(0)
        return self.files[0].read(), self.files[1].read()

    def kill(self) -> None:
        """End it, and all that it has started."""
        if not self.ended():
            os.killpg(self.pid, signal.SIGKILL)
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def command(module: str, **settings: object) -> Action:
    """`python -m MODULE --SETTING=VALUE ...`; a list has its values behind the flag."""
    flags: list[str] = []
    for name, value in settings.items():
        flags += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]

    def run() -> None:
        sys.argv[1:] = flags
        sys.modules.pop(module, None)  # runpy warns of one that is there
        runpy.run_module(module, run_name="__main__", alter_sys=True)

    return run


def run(action: Action, home: Path, processes: int = 1) -> Done:
    """Let one process or several, which then find each other, do the same."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    forks = []
    for rank in map(str, range(processes)):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        forks.append(Fork(action, home, meeting | ranks if processes > 1 else {}))
    try:
        done = [fork.wait() for fork in forks]
    finally:
        for fork in forks:
            fork.kill()
    status = next((each.status for each in done if each.status), 0)
    return Done(status, "".join(each.printed for each in done), "".join(each.complaints for each in done))
