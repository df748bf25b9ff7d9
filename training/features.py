"""Frozen features: their extraction over processes, and baselines that learn nothing."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, PreTrainedModel
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils import cached_file

from modeling_micl import MiclForImageClassification, MiclModel
from training.batch import Batch
from training.data import EvaluationImages, batches
from training.disk import replace_file
from training.images import central_crop
from training.skipped import SkippedImage
from training.source import ImageSource


# A batch on the device -> (n, d) features of its images
Extractor = Callable[[Batch], Tensor]
Frozen = MiclModel | MiclForImageClassification
Pooling = Literal["cls", "mean"]
# A batch -> the patches (n, 1, K) of each image that an encoder gets to see
Views = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation of red, green and blue in [0, 1] that a model's images are normalised with."""

    mean: list[float]
    std: list[float]


IMAGENET = Normalization(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def stored_normalization(model: str) -> Normalization:
    """What the image processor of a portable folder or Hub id says; ImageNet's where there is no processor.

    Raises:
        ValueError: if the processor cannot be read.
    """
    try:
        if cached_file(model, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False) is None:
            return IMAGENET
        processor = AutoImageProcessor.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(f"The image processor of {model!r} cannot be read: {error}") from error
    white = 255 * processor.rescale_factor if processor.do_rescale else 255  # what the processor makes of 255
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
    return Normalization(*((np.broadcast_to(value, 3) / white).tolist() for value in (mean, std)))


@cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(C, 1, 1) on the device, copied there once: each copy would have the host wait for a GPU."""
    return torch.tensor(values, device=device)[:, None, None]


def normalize_pixels(pixels: Tensor, normalization: Normalization = IMAGENET) -> Tensor:
    """(n, H, W, 3) uint8 → (n, 3, H, W) float32, on the pixels' device."""
    mean, std = (_per_channel(tuple(value), pixels.device) for value in (normalization.mean, normalization.std))
    # Channels first, then in place: on the CPU a fifth of the time of the same with three channels innermost.
    planes = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return planes.div_(255).sub_(mean).div_(std)


def encoder_features(
    model: Frozen,
    accelerator: Accelerator,
    pooling: Pooling = "cls",
    views: Views | None = None,
    normalization: Normalization = IMAGENET,
) -> Extractor:
    """What a frozen model tells about images: features, or a classifier's logits.

    Args:
        model: an encoder in evaluation mode, or a classifier.
        accelerator: for its precision.
        pooling: [CLS] after the final norm, or the mean of the patches after it; classifiers pool as they were built.
        views: draws the visible patches (n, 1, K) of a batch; unset, whole images are seen.
        normalization: the model's own; see `stored_normalization`.
    """
    options = {"cls_only": True} if isinstance(model, MiclModel) and pooling == "cls" else {}

    def extract(batch: Batch) -> Tensor:
        pixels = normalize_pixels(batch.pixels, normalization)
        ids_visible = views(batch) if views else None
        with accelerator.autocast():
            output = model(pixels, ids_visible=ids_visible, **options)
        if isinstance(output, ImageClassifierOutput):
            features: Tensor = output.logits
        else:
            features = output.pooler_output if pooling == "cls" else output.last_hidden_state[:, 1:].mean(dim=1)
        return features.float()

    return extract


def raw_pixels(pixels: Tensor) -> Tensor:
    """The image itself, at most 32 × 32 pixels."""
    size = (min(pixels.shape[1], 32), min(pixels.shape[2], 32))
    return adaptive_avg_pool2d(pixels.permute(0, 3, 1, 2).float(), size).flatten(1)


def colour_histogram(pixels: Tensor) -> Tensor:
    """Square root of the joint histogram of 8 × 8 × 8 colours, so that the cosine is Bhattacharyya's coefficient."""
    red, green, blue = (pixels // 32).long().flatten(1, 2).unbind(2)  # (n, H·W) each
    bins = 64 * red + 8 * green + blue
    counts = torch.zeros(len(pixels), 512, device=pixels.device)
    return counts.scatter_add_(1, bins, torch.ones_like(bins, dtype=counts.dtype)).sqrt()


RAW_PIXELS, CENTRED_PIXELS = "raw pixels", "mean-centred pixels"
BASELINES: dict[str, Extractor] = {
    RAW_PIXELS: lambda batch: raw_pixels(batch.pixels),
    "colour histogram": lambda batch: colour_histogram(batch.pixels),
}


@dataclass
class LabelledFeatures:
    """Features of a split, by the extractor's name, (n, d) each, and the labels (n,)."""

    features: dict[str, Tensor]
    labels: Tensor

    def to(self, device: torch.device) -> "LabelledFeatures":
        """Copy to a device."""
        return LabelledFeatures({k: v.to(device) for k, v in self.features.items()}, self.labels.to(device))


@torch.no_grad()
def extract_features(
    accelerator: Accelerator,
    source: ImageSource,
    extractors: dict[str, Extractor],
    size: tuple[int, int],
    max_images: int | None,
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
    bar = tqdm(
        total=images.num_images, desc="evaluating", unit="image", leave=False, disable=not accelerator.is_main_process
    )
    parts, broken = [], list[SkippedImage]()
    for batch in batches(images, num_workers):
        there = batch.to(accelerator.device)
        parts.append((batch.index, batch.labels, {name: f(there).cpu() for name, f in extractors.items()}))
        bar.update(len(batch.labels) * accelerator.num_processes)
        broken += batch.broken
    bar.close()
    parts, broken = gather_object(parts), gather_object(broken)
    if broken:
        accelerator.print(f"{len(broken)} broken images of {source.split!r} are not counted, as {broken[0]}")
    if not parts:  # all images are broken
        return LabelledFeatures({name: torch.empty(0, 1) for name in extractors}, torch.empty(0, dtype=torch.int64))
    order = torch.cat([index for index, _, _ in parts]).argsort()
    labels = torch.cat([labels for _, labels, _ in parts])[order]
    features = {name: torch.cat([part[name] for _, _, part in parts])[order] for name in extractors}
    return LabelledFeatures({name: values[labels >= 0] for name, values in features.items()}, labels[labels >= 0])


def cached_features(
    accelerator: Accelerator, folder: Path, key: list[Any], extract: Callable[[], LabelledFeatures]
) -> LabelledFeatures:
    """Features from the cache, or extracted by all processes together and kept there.

    Args:
        accelerator: its processes.
        folder: of the cache.
        key: everything that the features depend on, as JSON.
        extract: computes them.
    """
    file = folder / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.safetensors"
    (cached,) = broadcast_object_list([file.exists()])  # the main process decides for all
    if cached:
        tensors = load_file(file)
        return LabelledFeatures({k: v for k, v in tensors.items() if k != "labels"}, tensors["labels"])
    extracted = extract()
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {k: v.contiguous() for k, v in extracted.features.items()} | {"labels": extracted.labels}
        with replace_file(file, file.with_suffix(f".tmp-{os.getpid()}")) as unfinished:  # others may write it, too
            save_file(tensors, unfinished)
    return extracted


def weights_digest(model: PreTrainedModel) -> str:
    """Changes with the weights and what is computed from them."""
    digest = hashlib.sha256(model.config.to_json_string().encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def with_centred_pixels(train: LabelledFeatures, test: LabelledFeatures) -> tuple[LabelledFeatures, LabelledFeatures]:
    """Add raw pixels minus the mean image of the train split, the stronger baseline, where there are raw pixels."""
    if RAW_PIXELS not in train.features:
        return train, test
    mean = train.features[RAW_PIXELS].mean(dim=0)
    centred = [{CENTRED_PIXELS: split.features[RAW_PIXELS] - mean} for split in (train, test)]
    return (
        LabelledFeatures(centred[0] | train.features, train.labels),
        LabelledFeatures(centred[1] | test.features, test.labels),
    )
