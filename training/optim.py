"""Optimisers and learning rates: of pre-training as in the authors' program, of classifiers as in MAE's."""

import math
from typing import Any

import torch
from timm.optim.lars import Lars
from torch import nn

from modeling_micl import MiclForImageClassification


def build_optimizer(
    model: nn.Module, weight_decay: float, betas: tuple[float, float], learning_rate: float = 0.0
) -> torch.optim.AdamW:
    """AdamW for pre-training; biases and other one-dimensional parameters are not decayed."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return _adamw(groups, betas, learning_rate)


def layer_decay_optimizer(
    model: MiclForImageClassification, weight_decay: float, layer_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """AdamW for fine-tuning, where each layer learns `layer_decay` times as fast as the one after it.

    The head has the full rate, the embeddings the lowest, as in BEiT and MAE (util/lr_decay.py). Biases, other
    one-dimensional parameters and the [CLS] token are not decayed.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = 0.0 if parameter.ndim <= 1 or name.endswith("cls_token") else weight_decay
            scale = layer_decay ** _layers_above(name, model.config.num_hidden_layers)
            groups.setdefault((scale, decay), []).append(parameter)
    return _adamw(
        [{"params": params, "weight_decay": decay, "lr_scale": scale} for (scale, decay), params in groups.items()],
        betas,
    )


def _layers_above(name: str, num_layers: int) -> int:
    """How many layers lie between a parameter and the loss; the head counts as one."""
    if name.startswith("vit.embeddings."):
        return num_layers + 1
    if name.startswith("vit.layers."):
        return num_layers - int(name.split(".")[2])
    return 0


def lars_optimizer(head: nn.Module, weight_decay: float) -> torch.optim.Optimizer:
    """LARS with momentum 0.9 for the published linear probe, biases without it, as MAE's (util/lars.py).

    With a weight decay, which the published protocol does not have, timm's rule differs: it adds the two norms.
    """
    matrices = [p for p in head.parameters() if p.ndim > 1]
    vectors = [p for p in head.parameters() if p.ndim <= 1]
    groups = [
        # Without `always_adapt` timm's rule does nothing where there is no weight decay.
        {"params": matrices, "weight_decay": weight_decay, "always_adapt": True},
        {"params": vectors, "weight_decay": 0.0, "always_adapt": False},
    ]
    return Lars(groups, lr=0.0, momentum=0.9, trust_coeff=0.001)


def _adamw(groups: list[dict[str, Any]], betas: tuple[float, float], learning_rate: float = 0.0) -> torch.optim.AdamW:
    fused = all(p.device.type in ("cpu", "cuda") for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)


def scaled_learning_rate(base_lr: float, images_per_step: int) -> float:
    """The peak learning rate: `base_lr` is meant for 256 images per optimiser step."""
    return base_lr * images_per_step / 256


def learning_rate(epoch: float, peak: float, warmup_epochs: float, epochs: float, least: float = 0.0) -> float:
    """Linear warm-up from 0, then half a cosine.

    Args:
        epoch: epochs done so far, fractional: the rate changes at every step and is 0 at the first.
        peak: highest rate, reached at the end of the warm-up.
        warmup_epochs: epochs of warm-up.
        epochs: epochs of the whole training.
        least: rate at the end.
    """
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    return least + (peak - least) * 0.5 * (1 + math.cos(math.pi * (epoch - warmup_epochs) / (epochs - warmup_epochs)))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Use this rate from the next step on, times the group's `lr_scale` where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = value * group.get("lr_scale", 1.0)
