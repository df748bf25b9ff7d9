"""One run to a folder: a second one would write between the files of the first."""

import errno
import fcntl
import os
import socket
import time
from pathlib import Path
from typing import IO

from tqdm.auto import tqdm


LOCK = Path("checkpoints", ".lock")
_HELD = (errno.EACCES, errno.EAGAIN)


def lock_folder(folder: Path, patience: float = 30.0) -> IO[str]:
    """Keep a folder for this process until the file that is returned is closed, or the process ends in any way.

    It is the system's lock on a file, so that none is left behind by a crash. It also holds between the machines of a
    network file system that has locks; where there are none, nothing is locked.

    Args:
        folder: of a run, made if there is none.
        patience: seconds in which an earlier run that was told to end may do so.

    Raises:
        ValueError: if another process keeps it.
    """
    (folder / LOCK).parent.mkdir(parents=True, exist_ok=True)
    file = (folder / LOCK).open("a+")
    deadline, told = time.monotonic() + patience, False
    while not _try_to_lock(file):
        file.seek(0)
        holder = file.read() or "another process"
        if time.monotonic() > deadline:
            file.close()
            raise ValueError(
                f"output_dir={str(folder)!r} is in use by {holder}: wait for that run or end it, or choose another "
                "folder."
            )
        if not told:
            told = True
            tqdm.write(f"{folder} is in use by {holder}: waiting for it to end")
        time.sleep(0.1)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def _try_to_lock(file: IO[str]) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in _HELD
    return True
