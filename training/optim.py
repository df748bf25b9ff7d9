"""Optimiser and learning rate of pre-training, as in the authors' released program."""

import math

import torch
from torch import nn


def build_optimizer(
    model: nn.Module, weight_decay: float, betas: tuple[float, float], learning_rate: float = 0.0
) -> torch.optim.AdamW:
    """AdamW, fused where the device allows; biases and other one-dimensional parameters are not decayed."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in trained)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)


def scaled_learning_rate(base_lr: float, images_per_step: int) -> float:
    """The peak learning rate: `base_lr` is meant for 256 images per optimiser step."""
    return base_lr * images_per_step / 256


def learning_rate(epoch: float, peak: float, warmup_epochs: float, epochs: float) -> float:
    """Linear warm-up from 0, then half a cosine down to 0.

    Args:
        epoch: epochs done so far, fractional: the rate changes at every step and is 0 at the first.
        peak: highest rate, reached at the end of the warm-up.
        warmup_epochs: epochs of warm-up.
        epochs: epochs of the whole training.
    """
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    return peak * 0.5 * (1 + math.cos(math.pi * (epoch - warmup_epochs) / (epochs - warmup_epochs)))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Use one rate for all parameters from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = value
