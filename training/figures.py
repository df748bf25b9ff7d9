"""Pictures of a run: the views of images, the curves, the similarities of a batch."""

from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor


matplotlib.use("Agg")
MASKED_GRAY = 0.92


def save_views(path: Path, pixels: Tensor, ids_visible: Tensor, patch_size: tuple[int, int]) -> None:
    """A row for each image: whole, then each of its views, then what no view sees.

    Args:
        path: PNG to write.
        pixels: (n, H, W, 3) uint8.
        ids_visible: (n, V, K) patches that each view sees.
        patch_size: (height, width) of a patch in pixels.
    """
    images, num_views = pixels / 255, ids_visible.shape[1]
    columns = num_views + 2
    figure, axes = plt.subplots(len(images), columns, figsize=(1.5 * columns, 1.5 * len(images) + 0.3), squeeze=False)
    for row, image, views in zip(axes, images, ids_visible, strict=True):
        row[0].imshow(image.numpy())
        for axis, view in zip(row[1:], views, strict=False):
            axis.imshow(_only_patches(image, view, patch_size).numpy())
        in_no_view = image - _only_patches(image, views.flatten(), patch_size) + MASKED_GRAY
        row[-1].imshow(in_no_view.numpy())
        axes_off(row)
    for axis, title in zip(
        axes[0], ["image", *(f"view {v + 1}" for v in range(num_views)), "in no view"], strict=True
    ):
        axis.set_title(title, fontsize=10)
    _finish(figure, path)


def save_curves(path: Path, metrics: list[dict[str, Any]]) -> None:
    """Loss, contrastive accuracy, learning rate, spread of the embeddings and kNN accuracy against optimiser steps."""
    names = {
        "loss": "loss",
        "contrastive_accuracy": "contrastive accuracy",
        "effective_rank": "effective rank of the embeddings",
        "negative_cosine": "mean cosine of negatives",
        "learning_rate": "learning rate",
        "knn_accuracy": "kNN accuracy on the test images",
    }
    figure, axes = plt.subplots(2, 3, figsize=(12, 6))
    for axis, (name, title) in zip(axes.flat, names.items(), strict=True):
        points = [(entry["step"], entry[name]) for entry in metrics if name in entry]
        if points:
            axis.plot(*zip(*points, strict=True), marker="o" if len(points) < 20 else None)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("optimiser step")
        axis.grid(alpha=0.3)
    _finish(figure, path)


def save_similarities(path: Path, before: Tensor, after: Tensor) -> None:
    """Cosines of view 1 of each image with view 2 of all, before and after training.

    Args:
        path: PNG to write.
        before: (n, 2, D) L2-normalised embeddings of the untrained encoder.
        after: (n, 2, D) of the trained one.
    """
    figure, axes = plt.subplots(1, 2, figsize=(11, 5))
    for axis, embeds, title in zip(axes, (before, after), ("before training", "after training"), strict=True):
        cosines = embeds[:, 0] @ embeds[:, 1].T
        shown = axis.imshow(cosines.numpy(), cmap="magma")
        found = (cosines.argmax(dim=1) == torch.arange(len(cosines))).float().mean()
        axis.set_title(f"{title}: {found:.0%} of the views 1 find their image", fontsize=10)
        axis.set_xlabel("view 2 of image")
        axis.set_ylabel("view 1 of image")
        figure.colorbar(shown, ax=axis, label="cosine", shrink=0.8)
    _finish(figure, path)


def axes_off(axes: list[Axes]) -> None:
    """Hide ticks and frames."""
    for axis in axes:
        axis.axis("off")


def _only_patches(image: Tensor, ids: Tensor, patch_size: tuple[int, int]) -> Tensor:
    height, width = patch_size
    seen = torch.zeros(image.shape[0] // height, image.shape[1] // width)
    seen.view(-1)[ids] = 1
    mask = seen.repeat_interleave(height, 0).repeat_interleave(width, 1)[..., None]
    return image * mask + MASKED_GRAY * (1 - mask)


def _finish(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
