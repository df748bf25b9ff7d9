"""One run at a time in a folder: two would write into each other's checkpoints and log."""

import errno
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from training.config import TrainingSettings


# What is left of a run whose launcher was killed saves and ends meanwhile.
PATIENCE = 60.0  # seconds


@contextmanager
def alone_in(config: TrainingSettings, accelerator: Accelerator) -> Iterator[None]:
    """Keep other runs out of a run's folder until this one ends, in whatever way.

    The first process holds a lock on a file, which the system takes back from a process that is gone. Where there are
    no such locks, or no file can be written, nothing is kept out.

    Args:
        config: of the run; names the folder.
        accelerator: its processes.

    Raises:
        RuntimeError: on all processes, if another run is in the folder and does not end within `PATIENCE`.
    """
    folder, holder = Path(config.output_dir), None
    file, made = folder / ".lock", not folder.exists()
    with ExitStack() as held:
        if accelerator.is_main_process:
            with suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
                holder = _take(file, min(PATIENCE, config.process_timeout / 2), held)
        (holder,) = broadcast_object_list([holder])
        if holder is not None:
            raise RuntimeError(
                f"Another run ({holder}) is writing to {folder}: let it end, stop it, or choose another --output_dir."
            )
        try:
            yield
        finally:
            if accelerator.is_main_process:
                _leave(file, made)


def _take(file: Path, patience: float, held: ExitStack) -> str | None:
    """Lock a file until `held` ends; returns who has it if they do not give it back in so many seconds."""
    end, told = time.monotonic() + patience, False
    while True:
        opened = file.open("a+")
        if _lock(opened) and _is(opened, file):
            held.enter_context(opened).truncate(0)
            os.write(opened.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
            return None
        opened.seek(0)
        holder = opened.read().strip() or "another process"
        opened.close()
        if time.monotonic() > end:
            return holder
        if not told:
            print(f"waiting up to {patience:.0f} s for {holder} to leave {file.parent}", file=sys.stderr)  # noqa: T201
            told = True
        time.sleep(0.2)


def _is(opened: IO[str], file: Path) -> bool:
    """Whether a file is still there: whoever has it removes it in the end."""
    try:
        return os.fstat(opened.fileno()).st_ino == file.stat().st_ino
    except FileNotFoundError:
        return False


def _leave(file: Path, made: bool) -> None:
    """Remove the file while it is ours, and a folder that was made for it alone."""
    with suppress(OSError):
        file.unlink()
        if made:
            file.parent.rmdir()


def _lock(file: IO[str]) -> bool:
    """Whether a file is ours now."""
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)  # others say that there are no locks here
    return True
