"""How a run that is interrupted ends: saved, with a status and a file that say to start the same command again."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from training.disk import without_stopping
from training.run import Run


# The exit status of a run that was asked to stop and saved what it has: EX_TEMPFAIL, start the same command again.
STOPPED_STATUS = 75
STOPPED_FILE = "STOPPED"
# Variables that `torchrun` and `accelerate launch` set for the processes that they start.
LAUNCHED = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")


class StopRequest:
    """Remembers that a run was asked to stop, so that it can end between two steps.

    It is asked by SIGINT (Ctrl-C), SIGTERM or SIGUSR1, or by the end of the launcher that started this process.
    A launcher passes on what the terminal or SLURM has sent to all processes already, so a signal soon after the first
    is the same one; a later one ends the process at once.
    """

    same_seconds = 3.0

    def __init__(self) -> None:
        self.since: float | None = None
        self.run: Run | None = None  # once all is saved
        self.launcher = os.getppid() if any(name in os.environ for name in LAUNCHED) else None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._receive)

    @property
    def came(self) -> bool:
        """Whether the run was asked to stop."""
        return self.since is not None or (self.launcher is not None and os.getppid() != self.launcher)

    def end_at_once(self, run: Run) -> None:
        """From now on end without saving: all is saved, and the rest can be done again."""
        self.run = run
        if self.came:
            self._end(run)

    @contextmanager
    def ending_at_once(self, run: Run) -> Iterator[None]:
        """The same for a while."""
        self.end_at_once(run)
        try:
            yield
        finally:
            self.run = None

    def _receive(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self.since is None:
            self.since = now
            if self.run is not None:
                self._end(self.run)
        elif now - self.since > self.same_seconds:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def _end(self, run: Run) -> None:
        write_stopped(run)  # from any process: the others may have been ended in the meantime
        raise SystemExit(STOPPED_STATUS)


def mark_stopped(run: Run) -> None:
    """Tell by a file in the run's folder that the same command is to be started again."""
    if run.accelerator.is_main_process:
        write_stopped(run)


def write_stopped(run: Run) -> None:
    """Write that file."""
    with without_stopping(str(run.folder / STOPPED_FILE)):
        (run.folder / STOPPED_FILE).write_text(f"step {run.progress.step}\n")


def mark_started(run: Run) -> None:
    """Remove that file, as the run goes on."""
    if run.accelerator.is_main_process:
        (run.folder / STOPPED_FILE).unlink(missing_ok=True)
