"""What a run measures: metrics of a batch, the arithmetic of a step, and where numbers come from."""

import os
import platform
import subprocess
import sys
import time
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modeling_micl import MiclConfig, MiclForPreTrainingOutput, visible_patches_per_view


PEAK_SECONDS = 0.2  # of multiplying matrices, at least


@torch.no_grad()
def batch_metrics(output: MiclForPreTrainingOutput, first_target: int = 0) -> dict[str, Tensor]:
    """How well views find each other, and whether the embeddings spread out.

    Args:
        output: of the model on this process's images.
        first_target: column of the logits that belongs to the first own image.

    Returns:
        contrastive_accuracy, the share of views 0 whose best match is the own view 1; negative_cosine, the mean cosine
        of views of different images; effective_rank, the exponential of the entropy of the embeddings' singular
        values (Roy and Vetterli 2007): 1 when all lie on a line, at most their width.
    """
    assert output.logits is not None
    assert output.view_embeds is not None
    logits = output.logits if output.logits.ndim == 2 else output.logits[0]
    targets = torch.arange(len(logits), device=logits.device) + first_target
    embeds = output.view_embeds.float()
    cosines = embeds[:, 0] @ embeds[:, 1].T
    negatives = cosines[~torch.eye(len(cosines), dtype=torch.bool, device=cosines.device)]
    return {
        "contrastive_accuracy": (logits.argmax(dim=1) == targets).float().mean(),
        "negative_cosine": negatives.mean(),
        "effective_rank": effective_rank(embeds.flatten(0, 1)),
    }


def effective_rank(embeds: Tensor) -> Tensor:
    """Exponential of the entropy of the normalised singular values of (n, D) embeddings around their mean."""
    centred = embeds - embeds.mean(dim=0)
    gram = centred @ centred.T if len(embeds) < embeds.shape[1] else centred.T @ centred
    singular = torch.linalg.eigvalsh(gram.nan_to_num()).clamp(min=0).sqrt()
    shares = singular / singular.sum().clamp(min=torch.finfo(singular.dtype).tiny)
    rank: Tensor = torch.special.entr(shares).sum().exp()
    return rank


def gigaflop_per_image(config: MiclConfig) -> float:
    """GFLOP of the encoder's layers for one image, forward and backward (twice the forward), all views.

    A multiplication and an addition are two operations; embeddings, norms and the loss are left out. In the last layer
    all tokens have keys and values, the rest is for [CLS] alone.
    """
    patches_per_view = visible_patches_per_view(config.num_patches, config.mask_ratio, config.num_views)
    width, layers = config.hidden_size, config.num_hidden_layers
    sequence = layers_gigaflop(1 + patches_per_view, width, config.intermediate_size, layers, cls_only=True)
    return config.num_views * sequence


def layers_gigaflop(tokens: int, width: int, mlp_width: int, layers: int, cls_only: bool = False) -> float:
    """GFLOP of a ViT's layers for one sequence, forward and backward; the last one for [CLS] alone with `cls_only`."""

    def layer(asking: int) -> int:
        """A layer in which so many of the tokens have queries."""
        per_asking_token = 4 * width**2 + 4 * tokens * width + 4 * width * mlp_width
        return tokens * 4 * width**2 + asking * per_asking_token

    return 3 * ((layers - 1) * layer(tokens) + layer(1 if cls_only else tokens)) / 1e9


@torch.no_grad()
def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second at which this process multiplies large matrices, at best, in `PEAK_SECONDS`.

    What a step achieves is compared with this rather than with a data sheet, so that it means the same on every
    machine; if something else runs on it for so long, it is too low.
    """
    side, at_once = (1024, 1) if device.type == "cpu" else (4096, 10)
    generator = torch.Generator(device).manual_seed(0)  # not the one that training draws from
    left, right = torch.randn(2, side, side, generator=generator, device=device).to(dtype)
    peak, stop = 0.0, time.perf_counter() + PEAK_SECONDS
    (left @ right)[0, 0].item()  # waits for the device
    while not peak or time.perf_counter() < stop:
        start = time.perf_counter()
        for _ in range(at_once):
            product = left @ right
        product[0, 0].item()
        peak = max(peak, at_once * 2 * side**3 / (time.perf_counter() - start))
    return peak


def usable_cores() -> int:
    """Cores of this machine that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def provenance() -> dict[str, Any]:
    """Where numbers come from: hardware and library versions."""
    packages = ("torch", "transformers", "accelerate", "datasets", "modeling-micl")
    accelerators = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "hardware": {"cpu": _processor(), "cpu_cores": os.cpu_count(), "accelerators": accelerators},
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in packages}
        | {"commit": _commit()},
    }


@cache
def _commit() -> str | None:
    """The commit of the checkout that this runs from, None if it is none.

    With a mark if files were changed, but for those that programs here write: documents, measurements and pictures.
    """
    git = ["git", "-C", str(Path(__file__).parents[1])]
    written = [f":!*.{kind}" for kind in ("md", "json", "png")]
    try:
        commit, changed = (
            subprocess.run([*git, *arguments], capture_output=True, text=True, check=True).stdout.strip()
            for arguments in (
                ["rev-parse", "--short=12", "HEAD"],
                ["status", "--porcelain", "--untracked-files=no", "--", ".", *written],
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}-dirty" if changed else commit


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
