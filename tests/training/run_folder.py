"""What the tests read from a run's folder."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from training.log_files import read_metrics


def course(run: Path) -> list[tuple[float, ...]]:
    """What training went through, exactly."""
    names = ("step", "epoch", "loss", "learning_rate", "grad_norm", "contrastive_accuracy", "effective_rank")
    return [tuple(entry[name] for name in names) for entry in read_metrics(run / "metrics.jsonl") if "loss" in entry]


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "model" / "model.safetensors")


def same_weights(run: Path, other: Path) -> bool:
    some, others = weights(run), weights(other)
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in some)


def saved_steps(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))
