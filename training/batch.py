"""Decoded images for one step."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.utils.data import default_collate

from training.images import Pixels
from training.skipped import SkippedImage


@dataclass
class Batch:
    """Images for one step, or a worker's part of them.

    Attributes:
        pixels: (n, H, W, 3) uint8.
        labels: (n,) int64, -1 where there is none.
        index: (n,) int64, the images' numbers in the data.
        broken: each image that could not be decoded.
    """

    pixels: Tensor
    labels: Tensor
    index: Tensor
    broken: list[SkippedImage]

    def to(self, device: torch.device) -> "Batch":
        """Copy to a device, without waiting where memory is pinned."""
        pixels, labels = self.pixels.to(device, non_blocking=True), self.labels.to(device, non_blocking=True)
        return replace(self, pixels=pixels, labels=labels)

    def pin_memory(self) -> "Batch":
        """Called by the DataLoader."""
        return replace(self, pixels=self.pixels.pin_memory(), labels=self.labels.pin_memory())


def concatenate(batches: list[Batch]) -> Batch:
    """One batch of several, in their order, in memory of its own: that of workers is used again.

    It is pinned if there is a GPU, which then need not be waited for to copy from it.
    """
    if len(batches) == 1 and not batches[0].pixels.is_shared() and not torch.cuda.is_available():
        return batches[0]
    tensors = {
        f.name: _joined([getattr(b, f.name) for b in batches]) for f in fields(batches[0]) if f.name != "broken"
    }
    return type(batches[0])(broken=[entry for batch in batches for entry in batch.broken], **tensors)


def _joined(parts: list[Tensor]) -> Tensor:
    shape = sum(map(len, parts)), *parts[0].shape[1:]
    return torch.cat(parts, out=torch.empty(shape, dtype=parts[0].dtype, pin_memory=torch.cuda.is_available()))


def stack(images: list[tuple[Pixels, int, int]], broken: list[SkippedImage]) -> Batch:
    """One batch of pixels, labels and numbers of images."""
    if not images:
        return Batch(torch.empty(0, 0, 0, 3).byte(), torch.empty(0).long(), torch.empty(0).long(), broken)
    pixels, labels, index = default_collate(images)  # in a worker straight into the memory that it shares
    return Batch(pixels, labels, index, broken)
