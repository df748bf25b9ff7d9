"""Resumable checkpoints, written so that a crash at any moment loses none, and the safe replacement of a folder."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from training.tensors import OPTIMIZER, Resumable, load_tensors, write_tensors


MANIFEST = "manifest.json"
STATE = "state.json"


def save_checkpoint(run: Resumable, folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write `folder/step-N` with all processes together, and delete old ones.

    Everything is written beside its place, synchronised to disk and listed with checksums before one rename makes it
    a checkpoint; old ones are deleted only then.

    Args:
        run: whose state to save, and its processes.
        folder: of all checkpoints.
        step: optimiser steps done.
        state: what else to restore, as JSON.
        keep: newest checkpoints to keep.
    """
    accelerator = run.accelerator
    final, unfinished = folder / f"step-{step:06d}", folder / f".tmp-step-{step:06d}"
    if accelerator.is_main_process:
        for leftover in folder.glob(".tmp-step-*"):
            shutil.rmtree(leftover)
        unfinished.mkdir(parents=True)
    accelerator.wait_for_everyone()
    write_tensors(run, unfinished)
    if accelerator.is_main_process:
        (unfinished / STATE).write_text(json.dumps(state, indent=2))
        files = {str(path.relative_to(unfinished)): _digest(path) for path in unfinished.rglob("*") if path.is_file()}
        (unfinished / MANIFEST).write_text(json.dumps(files, indent=2))
        _synchronise(unfinished)
        shutil.rmtree(final, ignore_errors=True)
        unfinished.rename(final)
        _synchronise_folder(folder)
        for old in [path for path in _by_step(folder) if _step(path) <= step][:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def set_aside_later(folder: Path, step: int) -> Path | None:
    """Keep what an earlier run left, where going back behind it would mix the two; returns where it is now.

    Args:
        folder: of all checkpoints; `metrics.jsonl` is expected beside it.
        step: where the new run begins.
    """
    if not folder.is_dir() or all(_step(path) <= step for path in _by_step(folder)):
        return None
    number = 1 + len(list(folder.parent.glob("before-*")))
    kept = folder.parent / f"before-{number}"
    kept.mkdir()
    if (folder.parent / "metrics.jsonl").exists():
        shutil.copy(folder.parent / "metrics.jsonl", kept)
    folder.rename(kept / folder.name)
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
    """The state given to `save_checkpoint`."""
    state: dict[str, Any] = json.loads((checkpoint / STATE).read_text())
    return state


def load_checkpoint(run: Resumable, checkpoint: Path) -> None:
    """Restore the model, its average, the optimiser and the loss scaler, with all processes together.

    Raises:
        ValueError: if the checkpoint is of another model or optimiser, naming what differs.
    """
    load_tensors(run, checkpoint)


def replace_folder(new: Path, final: Path) -> None:
    """Put a finished folder in the place of another; in between, the old one is `final` + `.old`."""
    _synchronise(new)
    old = final.with_name(final.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    new.rename(final)
    _synchronise_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _by_step(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _synchronise(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _synchronise_folder(folder)


def _synchronise_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
