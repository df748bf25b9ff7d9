"""The stream of image batches: which image is where in which batch, and the worker processes that decode them.

The order of the images is a function of the seed, the epoch and the shards' lengths alone. Neither the number of
processes nor that of workers changes it: they only share out the places of each batch.
"""

import signal
from bisect import bisect_right
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, islice
from typing import Any, TypeVar

import fsspec.asyn
import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from training.allocator import keep_freed_memory
from training.batch import Batch, concatenate, stack
from training.images import Transform, decode_rgb, to_pixels
from training.shared_memory import PREFETCHED, InReusedMemory, Receiver, ReusedMemory, Sent
from training.skipped import SkippedImage, skipped_image
from training.source import ImageSource, Row, evaluation_numbers
from training.stream import StreamError


# A lane is one reader of a stream. More lanes mix more shards into each batch but hold more files open.
MAX_LANES = 64
MIN_ROWS_PER_LANE = 512
MAX_STAND_INS = 100
# A worker that is told to end waits so long for the main process to come to the end of its step.
SECONDS_AFTER_SIGTERM = 20
# Freed memory that a worker keeps, in bytes
KEPT_BY_WORKER = 2**27

# A draw gives an image's number and its row for one place of a batch. Attempt 0 is the planned image, the following
# attempts are stand-ins for when it is broken.
Draw = Callable[[int], tuple[int, Row]]
Item = TypeVar("Item")


class TrainingOrder:
    """The images of every global batch of every epoch.

    Data with random access is permuted as a whole. A stream is cut into lanes, equal contiguous parts of its shuffled
    shards; each lane is shuffled in windows, and every batch takes equally many rows from each lane. The last images
    of an epoch that do not fill a global batch are left out; they are others in every epoch.

    Args:
        source: the images.
        global_batch_size: images of one step over all processes, G.
        seed: of the shuffling.
        window: rows that a lane holds in memory to shuffle them.
    """

    def __init__(self, source: ImageSource, global_batch_size: int, seed: int, window: int) -> None:
        self.source, self.global_batch_size, self.seed, self.window = source, global_batch_size, seed, window
        self.steps_per_epoch = source.num_images // global_batch_size
        most = max(1, min(MAX_LANES, source.num_images // MIN_ROWS_PER_LANE))
        self.num_lanes = max(n for n in range(1, most + 1) if global_batch_size % n == 0)

    def draws(self, step: int, first: int, last: int) -> Iterator[list[Draw]]:
        """For each step from `step` on, without end: draws for the places first ≤ p < last of the global batch."""
        one_epoch = self._permuted if self.source.random_access else self._streamed
        for epoch in count(step // self.steps_per_epoch):
            yield from one_epoch(epoch, step % self.steps_per_epoch, first, last)
            step = 0

    def _permuted(self, epoch: int, start: int, first: int, last: int) -> Iterator[list[Draw]]:
        order = np.random.default_rng((self.seed, epoch)).permutation(self.source.num_images)

        def draw(place: int, attempt: int) -> tuple[int, Row]:
            index = int(order[_stand_in(place, attempt, len(order))])
            return index, self.source.rows[index]

        for step in range(start, self.steps_per_epoch):
            yield [partial(draw, step * self.global_batch_size + place) for place in range(first, last)]

    def _streamed(self, epoch: int, start: int, first: int, last: int) -> Iterator[list[Draw]]:
        rows_per_step = self.global_batch_size // self.num_lanes
        lanes = range(first // rows_per_step, -(-last // rows_per_step))
        readers = [self._lane(epoch, lane, start * rows_per_step) for lane in lanes]
        before = first - lanes.start * rows_per_step
        for _ in range(start, self.steps_per_epoch):
            draws = [draw for reader in readers for draw in islice(reader, rows_per_step)]
            yield draws[before : before + last - first]

    def _lane(self, epoch: int, lane: int, start: int) -> Iterator[Draw]:
        """Rows of one lane in shuffled order, from number `start` on."""
        begin, end = (edge * self.source.num_images // self.num_lanes for edge in (lane, lane + 1))
        windows = -(-(end - begin) // self.window)  # of equal size: in a small one a broken image could be alone
        edges = [number * (end - begin) // windows for number in range(windows + 1)]
        first_window = bisect_right(edges, start) - 1
        place = start - edges[first_window]
        rows = self._rows_of_shuffled_shards(epoch, begin + edges[first_window], end)
        for window in range(first_window, windows):
            block = list(islice(rows, edges[window + 1] - edges[window]))
            order = np.random.default_rng((self.seed, epoch, lane, window)).permutation(len(block))
            draw = partial(_draw_from_window, [block[i] for i in order])
            yield from (partial(draw, p) for p in range(place, len(block)))
            place = 0

    def _rows_of_shuffled_shards(self, epoch: int, begin: int, end: int) -> Iterator[tuple[int, Row]]:
        """Numbers and rows begin ≤ i < end of the shards, laid one behind the other in the epoch's order."""
        lengths = self.source.lengths
        number_of_first = np.cumsum([0, *lengths])
        rng = np.random.default_rng((self.seed, epoch))
        shards = rng.permutation(len(lengths))
        position = -int(rng.integers(sum(lengths)))  # begin anywhere and go round, so that no row is always the last
        for shard in [*shards, *shards]:
            start, stop = max(begin - position, 0), min(end - position, lengths[shard])
            if start < stop:
                yield from enumerate(self.source.read(int(shard), start, stop), int(number_of_first[shard]) + start)
            position += lengths[shard]


def _draw_from_window(window: list[tuple[int, Row]], place: int, attempt: int) -> tuple[int, Row]:
    return window[_stand_in(place, attempt, len(window))]


def _stand_in(place: int, attempt: int, length: int) -> int:
    """The place itself, or one about half the length away, where an image is hardly ever in the same batch."""
    return place if attempt == 0 else (place + length // 2 + attempt) % length


class TrainingBatches(InReusedMemory):
    """A process's places of every global batch, decoded and cropped; each worker does a contiguous part of them.

    Args:
        order: which images are where.
        transform: the random crop; its randomness depends on the seed, the epoch and the image only.
        first: first place of this process in the global batch.
        last: the place behind its last.
        step: step to begin with, counted from the start of training.
    """

    def __init__(self, order: TrainingOrder, transform: Transform, first: int, last: int, step: int = 0) -> None:
        self.order, self.transform, self.first, self.last, self.step = order, transform, first, last, step
        self.memory = ReusedMemory()

    def __iter__(self) -> Iterator[Batch]:
        worker, workers = worker_number()
        size = self.last - self.first
        first, last = (self.first + part * size // workers for part in (worker, worker + 1))
        for step, draws in enumerate(self.order.draws(self.step, first, last), self.step):
            yield self._decode(draws, step // self.order.steps_per_epoch)

    def _decode(self, draws: list[Draw], epoch: int) -> Batch:
        source = self.order.source
        broken: list[SkippedImage] = []
        images = []
        for draw in draws:
            for attempt in range(MAX_STAND_INS):
                index, row = draw(attempt)
                try:
                    crop = self.read(source.image_of(row))
                except Exception as error:  # Pillow's plugins raise nearly anything
                    if attempt == 0:
                        broken.append(skipped_image(source, index, row, error))
                    continue
                rng = np.random.default_rng((self.order.seed, epoch, index, attempt))
                images.append((crop(rng), source.label_of(row), index))
                break
            else:
                raise ValueError(f"{MAX_STAND_INS} images in a row cannot be decoded, the last: {broken[-1]}")
        return self.stack(images, broken)

    def read(self, stored: dict[str, Any] | None) -> Callable[[np.random.Generator], Any]:
        """Decode an image; returns what crops it."""
        image = decode_rgb(stored)
        return lambda rng: self.transform(image, rng)

    def stack(self, images: list[tuple[Any, int, int]], broken: list[SkippedImage]) -> Batch:
        """One batch of crops, labels and numbers."""
        return self.memory.stack(images, broken)


class EvaluationImages(IterableDataset[Batch]):
    """Every image of a source once, or a part of them; process and worker n of N take every N-th.

    Args:
        source: the images.
        transform: the crop.
        max_images: take only so many, from all over the data.
        process: this process's number and how many there are.
        batch_size: images in a batch.
    """

    def __init__(
        self,
        source: ImageSource,
        transform: Transform,
        max_images: int | None = None,
        process: tuple[int, int] = (0, 1),
        batch_size: int = 128,
    ) -> None:
        self.source, self.transform, self.process, self.batch_size = source, transform, process, batch_size
        self.num_images = min(max_images or source.num_images, source.num_images)

    def __iter__(self) -> Iterator[Batch]:
        (process, processes), (worker, workers) = self.process, worker_number()
        numbers = evaluation_numbers(self.source, self.num_images)
        mine = self.source.rows_at(numbers[process * workers + worker :: processes * workers])
        while rows := list(islice(mine, self.batch_size)):
            batch = decode(self.source, self.transform, rows)
            if len(batch.labels):
                yield batch


def decode(source: ImageSource, transform: Transform, rows: list[tuple[int, Row]]) -> Batch:
    """Numbered rows to one batch; broken images are named and left out, so that it may have no images."""
    images, broken = [], []
    for index, row in rows:
        try:
            image = transform(decode_rgb(source.image_of(row)), np.random.default_rng(0))
            images.append((to_pixels(image), source.label_of(row), index))
        except Exception as error:  # Pillow's plugins raise nearly anything
            broken.append(skipped_image(source, index, row, error))
    return stack(images, broken)


def batches(dataset: IterableDataset[Batch], num_workers: int) -> Iterator[Batch]:
    """Run a dataset in worker processes; the workers' parts of a step are put together in order."""
    if not isinstance(dataset, TrainingBatches):
        yield from run_in_workers(dataset, num_workers, pin_memory=torch.cuda.is_available())
        return
    num_workers = min(num_workers, dataset.last - dataset.first)
    loaded = received(dataset, num_workers)
    while parts := list(islice(loaded, max(num_workers, 1))):
        yield concatenate(parts)


def received(dataset: InReusedMemory, num_workers: int) -> Iterator[Batch]:
    """The workers' parts of each step, taking turns, in memory that they use again: copy what is to be kept."""
    if num_workers == 0:
        return run_in_workers(dataset, 0)
    return map(Receiver().unpack, run_in_workers(Packed(dataset), num_workers))


def run_in_workers(dataset: IterableDataset[Item], num_workers: int, pin_memory: bool = False) -> Iterator[Item]:
    """What a dataset yields in worker processes, taking turns; 0 runs it in this one."""
    loader = DataLoader(
        WithErrors(dataset),
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        prefetch_factor=PREFETCHED if num_workers else None,
    )
    for item in loader:
        if isinstance(item, StreamError):
            raise item
        yield item


class Packed(IterableDataset[Sent]):
    """Batches as a worker sends them."""

    def __init__(self, dataset: InReusedMemory) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[Sent]:
        worker, _ = worker_number()
        return (self.dataset.memory.pack(worker, batch) for batch in self.dataset)


class WithErrors(IterableDataset[Item | StreamError]):
    """Gives a stream's failure as the last item: the DataLoader would put a worker's traceback before its words."""

    def __init__(self, dataset: IterableDataset[Item]) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[Item | StreamError]:
        try:
            yield from self.dataset
        except StreamError as error:
            yield error


def _start_worker(_: int) -> None:
    keep_freed_memory(KEPT_BY_WORKER)
    fsspec.asyn.reset_lock()  # a lock held while forking would never be released here
    # Signals often reach all processes at once; the main one must still get batches to stop in good order.
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_later)


def _end_later(number: int, frame: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.alarm(SECONDS_AFTER_SIGTERM)


def worker_number() -> tuple[int, int]:
    """This worker's number and how many there are."""
    info = get_worker_info()
    return (info.id, info.num_workers) if info else (0, 1)
