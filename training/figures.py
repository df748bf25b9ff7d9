"""Pictures of a run: the views of images, the curves, the similarities of a batch."""

from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor
from torch.nn.functional import normalize, pad

from modeling_micl import MiclForPreTraining
from modeling_micl.configuration_micl import height_and_width
from training.batch import Batch
from training.data import EvaluationImages, batches
from training.features import normalize_pixels
from training.images import central_crop
from training.source import ImageSource


matplotlib.use("Agg")
MASKED_GRAY = 0.92
FIGURE_ROWS = 6
SIMILARITY_IMAGES = 64


@torch.no_grad()
def save_figures(
    folder: Path, untrained: MiclForPreTraining, trained: MiclForPreTraining, source: ImageSource
) -> None:
    """Write views.png and similarity.png of a few images to `folder/figures`."""
    config = trained.config
    images = EvaluationImages(source, central_crop(height_and_width(config.image_size)), SIMILARITY_IMAGES)
    batch: Batch = next(batches(images, num_workers=0))
    pixels = batch.pixels.to(trained.device)
    ids_visible = trained.sample_views(
        normalize_pixels(pixels), generator=torch.Generator(trained.device).manual_seed(0)
    )
    # The encoder alone: with global negatives the loss would wait for the other processes.
    cls = [m.vit.eval()(normalize_pixels(pixels), ids_visible).pooler_output for m in (untrained, trained)]
    embeds = [normalize(each.float(), dim=-1).unflatten(0, ids_visible.shape[:2]) for each in cls]
    patch_size = height_and_width(config.patch_size)
    figures = folder / "figures"
    save_views(figures / "views.png", batch.pixels[:FIGURE_ROWS], ids_visible[:FIGURE_ROWS].cpu(), patch_size)
    save_similarities(figures / "similarity.png", *(each.cpu() for each in embeds))


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
            axis.imshow(only_patches(image, view, patch_size).numpy())
        in_no_view = image - only_patches(image, views.flatten(), patch_size) + MASKED_GRAY
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


def save_occlusion(
    path: Path,
    hidden_shares: list[float],
    curves: dict[str, list[float]],
    relative_times: list[float],
    chance: float,
    seen: list[Tensor],
) -> None:
    """What the model sees; below, accuracy against the share of hidden patches and against the time per image.

    Args:
        path: PNG to write.
        hidden_shares: n shares in [0, 1), rising.
        curves: accuracies in [0, 1] at these shares, by the name of the curve.
        relative_times: of the model for an image, 1 for a whole one.
        chance: accuracy of guessing.
        seen: (H, W, 3) in [0, 1], an image at each share.
    """
    figure, axes = plt.subplot_mosaic([["seen", "seen"], ["hidden", "time"]], figsize=(9, 5), height_ratios=[1, 2.6])
    labels = [f"{100 * share:.3g}%" for share in hidden_shares]
    gap = seen[0].shape[1] // 16
    axes["seen"].imshow(torch.cat([pad(image, (0, 0, gap, gap), value=1.0) for image in seen], dim=1).numpy())
    axes["seen"].set_xticks([(n + 0.5) * (seen[0].shape[1] + 2 * gap) for n in range(len(seen))], labels)
    axes["seen"].set_title("what the model sees when this share of the patches is hidden", fontsize=10)
    axes["seen"].set_yticks([])
    axes["seen"].tick_params(length=0)
    axes["seen"].spines[:].set_visible(False)

    for panel, places in (("hidden", hidden_shares), ("time", relative_times)):
        for name, values in curves.items():
            axes[panel].plot(places, values, marker="o", markersize=4, label=name)
        axes[panel].axhline(chance, color="gray", linestyle=":", label="chance")
        axes[panel].grid(alpha=0.3)
    highest = [max(values) for values in zip(*curves.values(), strict=True)]
    axes["hidden"].set_xlabel("patches hidden")
    axes["hidden"].set_ylabel("top-1 accuracy")
    axes["hidden"].set_ylim(0, 1.15 * max(*highest, chance))
    axes["hidden"].xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes["hidden"].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes["hidden"].legend(fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False)
    axes["time"].sharey(axes["hidden"])
    axes["time"].tick_params(labelleft=False)
    axes["time"].set_xscale("log", base=2)
    axes["time"].xaxis.set_major_formatter(lambda time, _: f"{time:g}" if time >= 1 else f"1/{1 / time:.0f}")
    axes["time"].set_xlabel("time per image, as a share of the whole image's")
    for label, time, value in zip(labels, relative_times, highest, strict=True):
        axes["time"].annotate(label, (time, value), (0, 6), textcoords="offset points", ha="center", fontsize=8)
    _finish(figure, path)


def save_courses(path: Path, curves: dict[str, tuple[list[float], list[float], list[float]]]) -> None:
    """Accuracy against the time and the compute of training, a curve for each method and way to judge it.

    Args:
        path: PNG to write.
        curves: minutes, GFLOP and accuracies in [0, 1], by the curve's name: method, colon, what it shows.
    """
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    methods = list(dict.fromkeys(name.split(":")[0] for name in curves))
    shown = list(dict.fromkeys(name.split(":")[1] for name in curves))
    for name, (minutes, gigaflop, values) in curves.items():
        method, what = name.split(":")
        style = {"color": f"C{methods.index(method)}", "linestyle": ("-", "--", ":", "-.")[shown.index(what)]}
        for axis, places in zip(axes, (minutes, gigaflop), strict=True):
            axis.plot(places, values, label=name, marker="o", markersize=3, **style)
    for axis, title in zip(axes, ("minutes of training", "GFLOP of training"), strict=True):
        axis.set_xlabel(title)
        axis.grid(alpha=0.3)
        axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes[0].set_ylabel("top-1 accuracy")
    axes[1].legend(fontsize=8)
    _finish(figure, path)


def axes_off(axes: list[Axes]) -> None:
    """Hide ticks and frames."""
    for axis in axes:
        axis.axis("off")


def only_patches(image: Tensor, ids: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """An image (H, W, 3) in [0, 1] whose patches other than `ids` (K,) are gray."""
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
