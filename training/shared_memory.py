"""Memory in which a worker leaves the largest part of a batch, used again and again: it need not be sent.

To send a tensor takes a socket, a file descriptor and a mapping of new pages each time. So the main process is given
each place once; then a number says where a tensor is. What is small travels as it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import prod
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from training.batch import Batch
from training.skipped import SkippedImage


# Batches that a worker may be ahead of the one that the main process has taken from it
PREFETCHED = 4
PLACES = PREFETCHED + 2


@dataclass(frozen=True)
class Place:
    """Where a tensor of bytes is.

    Attributes:
        number: of the place, one of its worker's.
        shape: of the tensor, which begins where the place does.
        memory: the place itself, only where the main process has not been given it.
    """

    number: int
    shape: tuple[int, ...]
    memory: Tensor | None


@dataclass(frozen=True)
class Sent:
    """A batch on its way from a worker: its class, and its values with places and arrays instead of tensors."""

    worker: int
    kind: type[Batch]
    values: dict[str, Any]


class ReusedMemory:
    """The places of a worker, taken in turns, one for each batch.

    A place is written again `PLACES` batches later. The DataLoader asks a worker for a batch only when the one
    `PREFETCHED` before has been taken, and by then what was taken earlier has been copied (`training.data.batches`).
    In the main process, where batches may be kept, the memory is new each time.
    """

    def __init__(self) -> None:
        self.places: dict[int, Tensor] = {}
        self.given: dict[int, Tensor] = {}  # those that the main process has
        self.taken = 0

    def take(self, *shape: int) -> Tensor:
        """Room for a tensor of bytes, with anything in it."""
        size = prod(shape)
        if get_worker_info() is None:
            return torch.empty(shape, dtype=torch.uint8)
        self.taken += 1
        if self._number not in self.places or self.places[self._number].numel() < size:
            self.places[self._number] = torch.empty(size, dtype=torch.uint8).share_memory_()
        return self.places[self._number][:size].view(shape)

    @property
    def _number(self) -> int:
        """That of the place that was taken last."""
        return self.taken % PLACES

    def stack(self, images: Sequence[tuple[Image.Image, int, int]], broken: list[SkippedImage]) -> Batch:
        """One batch of RGB images, labels and numbers, equally many of one size each time."""
        crops, labels, index = zip(*images, strict=True)
        pixels = self.take(len(crops), crops[0].height, crops[0].width, 3)
        for place, crop in zip(pixels.numpy(), crops, strict=True):
            place[:] = crop  # Pillow's bytes are copied here, and nowhere else
        return Batch(pixels, torch.tensor(labels), torch.tensor(index), broken)

    def pack(self, worker: int, batch: Batch) -> Sent:
        """A batch to be sent, of which one tensor at most is in the place that was taken last."""
        return Sent(
            worker, type(batch), {field.name: self._packed(getattr(batch, field.name)) for field in fields(batch)}
        )

    def _packed(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        place = self.places.get(self._number)
        if place is None or value.data_ptr() != place.data_ptr():
            return value.numpy()
        known = self.given.get(self._number) is place
        self.given[self._number] = place
        return Place(self._number, tuple(value.shape), None if known else place)


class InReusedMemory(IterableDataset[Batch]):
    """Batches of which each has a tensor in a place of `memory`."""

    memory: ReusedMemory


class Receiver:
    """The main process's end: makes batches of what comes, and keeps the places that workers have given."""

    def __init__(self) -> None:
        self.places: dict[tuple[int, int], Tensor] = {}

    def unpack(self, sent: Sent) -> Batch:
        """The batch, which stays what it is until its worker comes round to that place."""
        return sent.kind(**{name: self._unpacked(sent.worker, value) for name, value in sent.values.items()})

    def _unpacked(self, worker: int, value: Any) -> Any:
        if isinstance(value, Place):
            if value.memory is not None:
                self.places[worker, value.number] = value.memory
            return self.places[worker, value.number][: prod(value.shape)].view(value.shape)
        return value if isinstance(value, list) else torch.from_numpy(value)
