"""Memory in which a worker stacks the pixels of its batches, so that the main process need not be sent them."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from training.batch import Batch
from training.images import Pixels
from training.skipped import SkippedImage


# Batches that a worker may be ahead of the one that the main process has taken from it
PREFETCHED = 4
PLACES = PREFETCHED + 2


class ReusedMemory:
    """Places for the pixels of a worker's batches, taken in turns: new pages of shared memory cost more to fill.

    A place is written again `PLACES` batches later. The DataLoader asks a worker for a batch only when the one
    `PREFETCHED` before has been taken, and by then what was taken earlier has been copied (`training.data.batches`).
    In the main process, where batches may be kept, the memory is new each time.
    """

    def __init__(self) -> None:
        self.places: list[Tensor] = []
        self.taken = 0

    def stack(self, images: Sequence[tuple[Pixels, int, int]], broken: list[SkippedImage]) -> Batch:
        """One batch of pixels, labels and numbers of images, equally many of one size each time."""
        pixels, labels, index = zip(*images, strict=True)
        stacked = torch.stack(
            [torch.as_tensor(one) for one in pixels], out=self._place((len(pixels), *pixels[0].shape))
        )
        return Batch(stacked, torch.tensor(labels), torch.tensor(index), broken)

    def _place(self, shape: tuple[int, ...]) -> Tensor:
        if get_worker_info() is None:
            return torch.empty(shape, dtype=torch.uint8)
        if len(self.places) < PLACES:
            self.places.append(torch.empty(shape, dtype=torch.uint8).share_memory_())
        self.taken += 1
        return self.places[(self.taken - 1) % len(self.places)]
