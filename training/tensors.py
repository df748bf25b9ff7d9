"""The state of training as tensors and JSON: what a checkpoint holds, without a pickle.

Tensors are stored whole and under the names that they have in the bare model, however the processes wrap it or share
it out, so that any number of them can go on from there. No state of random generators belongs to it: whatever is
random in training is drawn from the seed, the number of the epoch or forward pass, and the image or process, by
generators that are made or seeded for it.

Why not `torch.distributed.checkpoint.state_dict`: it makes an optimiser without state do a step before saving it, and
where names are missing keeps what was there, without a word.
"""

import json
from collections.abc import Iterable, Iterator
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

Contents = dict[str, dict[str, Tensor] | str]  # tensors or text of each file


class Resumable(Protocol):
    """What has the state; a `Run` is one.

    Attributes:
        accelerator: its processes and loss scaler.
        model: as training uses it: bare, wrapped by DDP or sharded by `fully_shard`.
        optimizer: of parameters of the model.
        averaged: moving average of the weights, None for none.
    """

    accelerator: Accelerator
    model: nn.Module
    optimizer: torch.optim.Optimizer
    averaged: AveragedModel | None


def gather_state(run: Resumable, copy: bool = False) -> Contents:
    """What a checkpoint holds, by file; all processes call it, and only the main one gets it.

    Args:
        run: whose state.
        copy: whether training goes on before it is written.
    """
    accelerator = run.accelerator
    tensors = {MODEL: _bare(run).state_dict()}
    if run.averaged is not None:
        tensors[AVERAGED] = run.averaged.state_dict()
    tensors[OPTIMIZER] = {
        f"{name}.{key}": tensor
        for name, parameter in _trained(run).items()
        for key, tensor in run.optimizer.state.get(parameter, {}).items()  # there is none before the first step
    }
    contents: Contents = {}
    for file, parts in tensors.items():
        whole = {}
        for name, tensor in whole_tensors(parts):
            if accelerator.is_main_process:
                whole[name] = tensor.to("cpu", copy=copy).contiguous()
        contents[file] = whole
    scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
    contents[OPTIMIZER_SETTINGS] = json.dumps({"param_groups": _named_groups(run), "scaler": scaler}, indent=2)
    return contents if accelerator.is_main_process else {}


def write_files(contents: Contents, folder: Path) -> None:
    """Write what `gather_state` gave."""
    for name, content in contents.items():
        if isinstance(content, str):
            (folder / name).write_text(content)
        else:
            save_file(content, folder / name)


def load_tensors(run: Resumable, folder: Path) -> None:
    """Restore what `write_files` wrote; all processes call it, and each reads the files.

    Raises:
        ValueError: if it is of another model or optimiser, naming what is missing and what is not expected.
    """
    _load_model(_bare(run), folder / MODEL)
    if run.averaged is not None:
        _load_model(run.averaged, folder / AVERAGED)
    settings = json.loads((folder / OPTIMIZER_SETTINGS).read_text())
    _load_optimizer(run, settings["param_groups"], folder / OPTIMIZER)
    if run.accelerator.scaler is not None:
        run.accelerator.scaler.load_state_dict(settings["scaler"])


def _bare(run: Resumable) -> nn.Module:
    model: nn.Module = run.accelerator.unwrap_model(run.model, keep_torch_compile=False)
    return model


def _named_groups(run: Resumable) -> list[dict[str, Any]]:
    """The optimiser's groups, with the names of their parameters for these."""
    names = {parameter: name for name, parameter in _bare(run).named_parameters()}
    return [group | {"params": [names[p] for p in group["params"]]} for group in run.optimizer.param_groups]


def _trained(run: Resumable) -> dict[str, nn.Parameter]:
    """The optimiser's parameters by name, in its order."""
    parameters = dict(_bare(run).named_parameters())
    return {name: parameters[name] for group in _named_groups(run) for name in group["params"]}


def whole_tensors(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Names and whole tensors, of which each process may hold only a part; all processes call it."""
    for name, tensor in sorted(tensors.items()):  # all processes gather the same one at a time
        yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def load_whole(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load whole tensors into a model, of which each process may hold only a part."""
    own = model.state_dict()
    model.load_state_dict({name: _own_part(tensor, own[name]) for name, tensor in tensors.items()})


def _load_model(model: nn.Module, file: Path) -> None:
    stored = load_file(file)
    _check_names(file, stored, model.state_dict())
    load_whole(model, stored)


def _load_optimizer(run: Resumable, groups: list[dict[str, Any]], file: Path) -> None:
    own_groups, trained, stored = _named_groups(run), _trained(run), load_file(file)
    _check_names(file, _members(groups), _members(own_groups))
    keys = {name.rpartition(".")[2] for name in stored}
    _check_names(file, stored, (f"{name}.{key}" for name in trained for key in keys))
    state = {
        name: {key: _own_part(stored[f"{name}.{key}"], parameter) for key in keys}
        for name, parameter in trained.items()
        if keys
    }
    settings = [group | {"params": own["params"]} for group, own in zip(groups, own_groups, strict=True)]
    run.optimizer.load_state_dict({"state": state, "param_groups": settings})  # names do as well as numbers


def _members(groups: list[dict[str, Any]]) -> Iterator[str]:
    for number, group in enumerate(groups):
        yield from (f"{name} (group {number})" for name in group["params"])


def _check_names(file: Path, found: Iterable[str], expected: Iterable[str]) -> None:
    has, needs = set(found), set(expected)
    if has != needs:
        raise ValueError(
            f"{file} is of another model or optimiser: missing {sorted(needs - has)}, "
            f"not expected {sorted(has - needs)}."
        )


def _own_part(whole: Tensor, like: Tensor) -> Tensor:
    """What this process holds of a whole tensor that is shared out as `like` is."""
    if isinstance(like, DTensor) and whole.shape == like.shape:  # the others are numbers, like the optimiser's steps
        return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return whole.clone()  # not the file itself, mapped into memory, which will be deleted
