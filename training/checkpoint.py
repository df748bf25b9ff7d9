"""Resumable checkpoints, written so that neither a crash at any moment nor a full disk loses one."""

import hashlib
import json
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from training.disk import ADVICE, is_disk_full, synchronise, synchronise_folder
from training.tensors import OPTIMIZER, Contents, Resumable, gather_state, load_tensors, write_files


MANIFEST = "manifest.json"
STATE = "state.json"


class NotSaved(RuntimeError):
    """A checkpoint could not be written; those before it are untouched."""


class DiskFull(NotSaved):
    """For want of space."""


class CheckpointWriter:
    """Writes the checkpoints of a run in a thread, one after the other.

    Args:
        folder: of all checkpoints.
        keep: newest checkpoints to keep.
        keep_every: also keep those whose step is a multiple of this; 0 for none.
    """

    def __init__(self, folder: Path, keep: int, keep_every: int = 0) -> None:
        self.folder, self.keep, self.keep_every = folder, keep, keep_every
        self.thread = ThreadPoolExecutor(1, "checkpoints")
        self.writing: Future[NotSaved | None] | None = None

    def begin(self, run: Resumable, step: int, state: dict[str, Any], copy: bool = True) -> None:
        """Take the state of a run and begin to write `step-N`; all processes call it, and `finish` later.

        Args:
            run: whose state to save, and its processes.
            step: optimiser steps done.
            state: what else to restore, as JSON.
            copy: whether training goes on before `finish`.
        """
        contents = gather_state(run, copy)
        if run.accelerator.is_main_process:
            contents[STATE] = json.dumps(state, indent=2)
            self.writing = self.thread.submit(self._write, contents, step)
        else:
            self.writing = self.thread.submit(lambda: None)

    def finish(self) -> None:
        """Wait until what was begun is a checkpoint; all processes call it.

        Raises:
            NotSaved: on all of them, if it could not be written.
        """
        if self.writing is None:
            return
        writing, self.writing = self.writing, None
        (failure,) = broadcast_object_list([writing.result()])
        if failure is not None:
            raise failure

    def _write(self, contents: Contents, step: int) -> NotSaved | None:
        try:
            write_checkpoint(contents, self.folder, step, self.keep, self.keep_every)
        except Exception as error:  # whatever it is, the other processes must not wait in vain
            kind, advice = (DiskFull, f": {ADVICE}") if is_disk_full(error) else (NotSaved, "")
            return kind(
                f"The checkpoint of step {step} could not be written ({type(error).__name__}: {error}){advice}. "
                f"Those before it in {self.folder} are good."
            )
        return None


def write_checkpoint(contents: Contents, folder: Path, step: int, keep: int, keep_every: int = 0) -> None:
    """Write `folder/step-N`, and delete old ones.

    Everything is written beside its place, synchronised to disk and listed with checksums before one rename makes it
    a checkpoint; old ones are deleted only then.

    Args:
        contents: of its files.
        folder: of all checkpoints.
        step: optimiser steps done.
        keep: newest checkpoints to keep.
        keep_every: also keep those whose step is a multiple of this; 0 for none.
    """
    final, unfinished = _place(folder, step), folder / f".tmp-step-{step:06d}"
    for leftover in folder.glob(".tmp-step-*"):
        shutil.rmtree(leftover)
    try:
        unfinished.mkdir(parents=True)
        write_files(contents, unfinished)
        files = {name: _digest(unfinished / name) for name in contents}
        (unfinished / MANIFEST).write_text(json.dumps(files, indent=2))
        synchronise(unfinished)
        shutil.rmtree(final, ignore_errors=True)
        unfinished.rename(final)
    except Exception:
        shutil.rmtree(unfinished, ignore_errors=True)  # gives back the space that was too little
        raise
    synchronise_folder(folder)
    for old in [path for path in _by_step(folder) if _step(path) <= step][:-keep]:
        if not keep_every or _step(old) % keep_every:
            shutil.rmtree(old)


def set_aside_later(folder: Path, step: int) -> Path | None:
    """Keep what an earlier run left, where going back behind it would mix the two; returns where it is now.

    Args:
        folder: of all checkpoints; `metrics.jsonl` is expected beside it.
        step: where the new run begins.
    """
    later = [path for path in _by_step(folder) if _step(path) > step]
    if not later:
        return None
    number = 1 + len(list(folder.parent.glob("before-*")))
    kept = folder.parent / f"before-{number}"
    kept.mkdir()
    if (folder.parent / "metrics.jsonl").exists():
        shutil.copy(folder.parent / "metrics.jsonl", kept)
    if len(later) == len(_by_step(folder)):
        folder.rename(kept / folder.name)
        return kept
    (kept / folder.name).mkdir()
    for path in later:  # only these: a crash before the next checkpoint needs the one that was loaded
        path.rename(kept / folder.name / path.name)
    return kept


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest valid checkpoint in a folder, None if there is none, and why each newer one was refused."""
    refused: list[str] = []
    for path in reversed(_by_step(folder)):
        defect = find_defect(path)
        if defect is None:
            return path, refused
        refused.append(f"{path}: {defect}")
    return None, refused


def find_defect(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, None if it is as it was written."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"no readable {MANIFEST} ({error})"
    if OPTIMIZER not in files:
        return "written by an older version as pickles, which are not read: finish the run with that version"
    for name, digest in files.items():
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        if _digest(checkpoint / name) != digest:
            return f"{name} is damaged"
    return None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The state that was given to `CheckpointWriter.begin`."""
    state: dict[str, Any] = json.loads((checkpoint / STATE).read_text())
    return state


def load_checkpoint(run: Resumable, checkpoint: Path) -> None:
    """Restore the model, its average, the optimiser and the loss scaler, with all processes together.

    Raises:
        ValueError: if the checkpoint is of another model or optimiser, naming what differs.
    """
    load_tensors(run, checkpoint)


def _place(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"


def _by_step(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
