"""Resumable checkpoints, written so that a crash at any moment loses none, and the safe replacement of a folder.

A checkpoint is tensors and JSON, never a pickle. It holds whole tensors under the names that they have in the bare
model, however the processes wrap or share it out, so that any number of them can go on from it. It holds no state of
random generators: what is random in training is drawn from the seed, the place in the course and the place in the
batch, by generators made or seeded for it.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import AveragedModel


MODEL = "model.safetensors"
AVERAGED = "averaged.safetensors"
OPTIMIZER = "optimizer.safetensors"
OPTIMIZER_SETTINGS = "optimizer.json"
STATE = "state.json"
MANIFEST = "manifest.json"


class Resumable(Protocol):
    """What a checkpoint holds the state of; a `Run` is one.

    Attributes:
        accelerator: its processes and loss scaler.
        model: as training uses it, wrapped or sharded.
        optimizer: of the model's parameters.
        averaged: moving average of the weights, None for none.
    """

    accelerator: Accelerator
    model: nn.Module
    optimizer: torch.optim.Optimizer
    averaged: AveragedModel | None


def save_checkpoint(run: Resumable, folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write `folder/step-N` with all processes together, and delete old ones.

    Everything is written beside its place, synchronised to disk and listed with checksums before one rename makes it
    a checkpoint; old ones are deleted only then.

    Args:
        run: what to save.
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
    _write_tensors(run, unfinished)
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
        ValueError: if the checkpoint is of another model or optimiser, naming the tensors that differ.
    """
    _load_model(run.accelerator.unwrap_model(run.model), checkpoint / MODEL)
    if run.averaged is not None:
        _load_model(run.averaged, checkpoint / AVERAGED)
    settings = json.loads((checkpoint / OPTIMIZER_SETTINGS).read_text())
    _load_optimizer(run, settings["param_groups"], checkpoint / OPTIMIZER)
    if run.accelerator.scaler is not None:
        run.accelerator.scaler.load_state_dict(settings["scaler"])


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


def _write_tensors(run: Resumable, folder: Path) -> None:
    """Write the tensors and the optimiser's settings: all processes take part, the main one writes."""
    accelerator, optimizer = run.accelerator, run.optimizer
    files = {MODEL: accelerator.unwrap_model(run.model).state_dict()}
    if run.averaged is not None:
        files[AVERAGED] = run.averaged.state_dict()
    groups = _named_groups(run)
    names = [name for group in groups for name in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    files[OPTIMIZER] = {
        f"{name}.{key}": value
        for name, parameter in zip(names, parameters, strict=True)
        for key, value in optimizer.state.get(parameter, {}).items()  # nothing before the first step
    }
    for file, tensors in files.items():
        whole = {}
        for name, tensor in tensors.items():
            gathered = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if accelerator.is_main_process:
                whole[name] = gathered.cpu().contiguous()
        if accelerator.is_main_process:
            save_file(whole, folder / file)
    if accelerator.is_main_process:
        scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
        (folder / OPTIMIZER_SETTINGS).write_text(json.dumps({"param_groups": groups, "scaler": scaler}, indent=2))


def _load_model(model: nn.Module, file: Path) -> None:
    own, stored = model.state_dict(), load_file(file)
    _check_names(file, stored, own)
    model.load_state_dict({name: _own_part(tensor, own[name]) for name, tensor in stored.items()})


def _load_optimizer(run: Resumable, stored_groups: list[dict[str, Any]], file: Path) -> None:
    groups, stored = _named_groups(run), load_file(file)
    _check_names(file, _group_members(stored_groups), _group_members(groups))
    parameters = dict(run.accelerator.unwrap_model(run.model).named_parameters())
    own, keys = [name for group in groups for name in group["params"]], {name.split(".")[-1] for name in stored}
    _check_names(file, stored, [f"{name}.{key}" for name in own for key in keys])
    state = {name: {key: _own_part(stored[f"{name}.{key}"], parameters[name]) for key in keys} for name in own if keys}
    settings = [
        {key: tuple(value) if isinstance(value, list) else value for key, value in then.items()}
        | {"params": now["params"]}
        for then, now in zip(stored_groups, groups, strict=True)
    ]
    run.optimizer.load_state_dict({"state": state, "param_groups": settings})


def _named_groups(run: Resumable) -> list[dict[str, Any]]:
    """The optimiser's groups, with the names of their parameters in the bare model."""
    names = {parameter: name for name, parameter in run.accelerator.unwrap_model(run.model).named_parameters()}
    return [{**group, "params": [names[p] for p in group["params"]]} for group in run.optimizer.param_groups]


def _group_members(groups: list[dict[str, Any]]) -> list[str]:
    return [f"{name} in group {number}" for number, group in enumerate(groups) for name in group["params"]]


def _check_names(file: Path, found: Iterable[str], expected: Iterable[str]) -> None:
    missing, unexpected = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or unexpected:
        raise ValueError(f"{file} is of another model or optimiser: missing {missing}, unexpected {unexpected}.")


def _own_part(whole: Tensor, like: Tensor) -> Tensor:
    """What this process holds of a whole tensor that is shared out as `like` is."""
    if isinstance(like, DTensor) and whole.shape == like.shape:  # others are numbers, as the optimiser's steps
        return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return whole.clone()  # not the file itself, mapped into memory, which will be deleted


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
