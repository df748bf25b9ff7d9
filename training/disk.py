"""Files and folders, so that neither a crash nor a full disk harms what is there already."""

import ctypes
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm.auto import tqdm


ADVICE = "free some space, or keep fewer checkpoints (save_total_limit, keep_every_steps)"
_FULL = (errno.ENOSPC, errno.EDQUOT)
# Of Linux's fcntl.h and fs.h.
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def is_disk_full(error: BaseException) -> bool:
    """Whether a file could not be written because the disk, or the user's share of it, is full."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    return any(f"(os error {number})" in str(error) for number in _FULL)  # all that safetensors tells


@contextmanager
def without_stopping(what: str) -> Iterator[None]:
    """Go on when the disk is full, with a warning that `what` is not written."""
    try:
        yield
    except OSError as error:
        if not is_disk_full(error):
            raise
        tqdm.write(f"WARNING: {what} cannot be written now ({error}): {ADVICE}.", file=sys.stderr)


@contextmanager
def replace_file(final: Path, unfinished: Path | None = None) -> Iterator[Path]:
    """Write a file in the place of another, so that there is the whole old or the whole new one at any moment.

    Args:
        final: the file.
        unfinished: what is written first, in the same folder; by default a name that the next to write uses again.

    Yields:
        Where to write; nothing is left there after an error.
    """
    unfinished = unfinished or final.with_name(f".tmp-{final.name}")
    try:
        yield unfinished
        synchronise_file(unfinished)
        unfinished.replace(final)
    except BaseException:  # Ctrl-C and the end of a generator, too
        unfinished.unlink(missing_ok=True)
        raise


def replace_folder(new: Path, final: Path) -> None:
    """Put a finished folder in the place of another, so that there is a whole one at any moment.

    No call of POSIX replaces a folder that is not empty, and a symbolic link in its place would be copied and sent
    without what it points to. So the two are exchanged by a call of Linux, which its local file systems know. Where
    there is none (macOS, NFS), the old one is `final` + `.old` for the moment between two renames; after a crash in
    that moment, `put_back` makes up for it.
    """
    synchronise(new)
    if not final.exists():
        new.rename(final)
    elif not _exchange(new, final):
        shutil.rmtree(_old(final), ignore_errors=True)
        final.rename(_old(final))
        new.rename(final)
    synchronise_folder(final.parent)
    for replaced in (new, _old(final)):
        shutil.rmtree(replaced, ignore_errors=True)


def put_back(final: Path) -> None:
    """Bring back what a crash in `replace_folder` left under another name."""
    if not final.exists() and _old(final).exists():
        _old(final).rename(final)


def _old(final: Path) -> Path:
    return final.with_name(f"{final.name}.old")


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the system or the file system cannot."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except AttributeError:
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)


def synchronise(folder: Path) -> None:
    """Have all files of a folder on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            synchronise_file(path)
    synchronise_folder(folder)


def synchronise_file(path: Path) -> None:
    """Have what a file holds on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def synchronise_folder(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def made_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """A folder that is there as a whole or not at all; whoever is first makes it.

    Args:
        folder: the folder.
        make: writes what it is to hold into an empty one.
    """
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".tmp-"))
        make(unfinished)
        try:
            unfinished.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(unfinished)
    return folder
