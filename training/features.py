"""What an encoder's features are worth: extraction over processes, kNN, and baselines that learn nothing."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, normalize
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from modeling_micl import MiclModel
from training.data import EvaluationImages, batches
from training.images import central_crop
from training.source import ImageSource


# (n, H, W, 3) uint8 pixels -> (n, d) features
Extractor = Callable[[Tensor], Tensor]


def normalize_pixels(pixels: Tensor) -> Tensor:
    """(n, H, W, 3) uint8 → (n, 3, H, W) float32 with ImageNet's mean and standard deviation, on the pixels' device."""
    mean = torch.tensor(IMAGENET_DEFAULT_MEAN, device=pixels.device)
    std = torch.tensor(IMAGENET_DEFAULT_STD, device=pixels.device)
    return ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)


def encoder_features(model: MiclModel, accelerator: Accelerator) -> Extractor:
    """[CLS] features of the whole, unmasked image."""

    def extract(pixels: Tensor) -> Tensor:
        with accelerator.autocast():
            features: Tensor = model(normalize_pixels(pixels)).pooler_output
        return features.float()

    return extract


def raw_pixels(pixels: Tensor) -> Tensor:
    """The image itself, at most 32 × 32 pixels."""
    size = (min(pixels.shape[1], 32), min(pixels.shape[2], 32))
    return adaptive_avg_pool2d(pixels.permute(0, 3, 1, 2).float(), size).flatten(1)


def colour_histogram(pixels: Tensor) -> Tensor:
    """Square root of the joint histogram of 8 × 8 × 8 colours, so that the cosine is Bhattacharyya's coefficient."""
    bins = (pixels // 32).long().flatten(1, 2) @ torch.tensor([64, 8, 1], device=pixels.device)  # (n, H·W)
    counts = torch.zeros(len(pixels), 512, device=pixels.device)
    return counts.scatter_add_(1, bins, torch.ones_like(bins, dtype=counts.dtype)).sqrt()


RAW_PIXELS = "raw pixels"
BASELINES: dict[str, Extractor] = {RAW_PIXELS: raw_pixels, "colour histogram": colour_histogram}


@dataclass
class LabelledFeatures:
    """Features of a split, by the extractor's name, (n, d) each, and the labels (n,)."""

    features: dict[str, Tensor]
    labels: Tensor


@torch.no_grad()
def extract_features(
    accelerator: Accelerator,
    source: ImageSource,
    extractors: dict[str, Extractor],
    size: tuple[int, int],
    max_images: int,
    num_workers: int,
) -> LabelledFeatures:
    """Features of a split's labelled images, the same on every process, in the order of the data.

    Args:
        accelerator: its processes share the work.
        source: the images, with labels.
        extractors: what to compute, by name.
        size: (height, width) of the images in pixels.
        max_images: take only so many, from all over the data.
        num_workers: decoding processes.
    """
    share = (accelerator.process_index, accelerator.num_processes)
    images = EvaluationImages(source, central_crop(size), max_images, share)
    parts = []
    for batch in batches(images, num_workers):
        pixels = batch.pixels.to(accelerator.device)
        parts.append(
            (batch.index, batch.labels, {name: extract(pixels).cpu() for name, extract in extractors.items()})
        )
    parts = gather_object(parts)
    order = torch.cat([index for index, _, _ in parts]).argsort()
    labels = torch.cat([labels for _, labels, _ in parts])[order]
    features = {name: torch.cat([part[name] for _, _, part in parts])[order] for name in extractors}
    return LabelledFeatures({name: values[labels >= 0] for name, values in features.items()}, labels[labels >= 0])


def with_centred_pixels(train: LabelledFeatures, test: LabelledFeatures) -> tuple[LabelledFeatures, LabelledFeatures]:
    """Add raw pixels minus the mean image of the train split, the stronger baseline, where there are raw pixels."""
    if RAW_PIXELS not in train.features:
        return train, test
    mean = train.features[RAW_PIXELS].mean(dim=0)
    centred = [{"mean-centred pixels": split.features[RAW_PIXELS] - mean} for split in (train, test)]
    return (
        LabelledFeatures(centred[0] | train.features, train.labels),
        LabelledFeatures(centred[1] | test.features, test.labels),
    )


def knn_accuracy(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, k: int = 20, temperature: float = 0.07
) -> float:
    """Top-1 accuracy, in [0, 1], of a vote of the k nearest by cosine, weighted by exp(cosine / temperature).

    This is the protocol of DINO (arXiv 2104.14294) and, before it, of instance discrimination (arXiv 1805.01978).

    Args:
        train: (n, d) features to vote.
        train_labels: (n,) their labels.
        test: (m, d) features to classify.
        test_labels: (m,) their labels.
        k: voters; all of them if there are fewer.
        temperature: of the weights.
    """
    train = normalize(train, dim=1)
    num_classes = int(train_labels.max()) + 1
    correct = 0
    for queries, labels in zip(normalize(test, dim=1).split(1024), test_labels.split(1024), strict=True):
        cosines, nearest = (queries @ train.T).topk(min(k, len(train)), dim=1)  # (n, k)
        votes = torch.zeros(len(queries), num_classes)
        votes.scatter_add_(1, train_labels[nearest], (cosines / temperature).exp())
        correct += int((votes.argmax(dim=1) == labels).sum())
    return correct / len(test_labels)
