"""Batches in memory that workers use again: nothing that is kept, or still to be read, is written over."""

import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import IterableDataset

from training import shared_memory
from training.batch import Batch
from training.data import TrainingBatches, TrainingOrder, batches, run_in_workers
from training.images import CropAndFlip
from training.shared_memory import PLACES, ReusedMemory
from training.source import open_source


Write = Callable[..., Path]
STEPS = 3 * PLACES


class Places(IterableDataset[tuple[bool, int]]):
    """Whether a worker stacks images where they are shared, and in which memory."""

    def __iter__(self) -> Iterator[tuple[bool, int]]:
        memory = ReusedMemory()
        for value in range(STEPS):
            stacked = memory.stack([(Image.new("RGB", (2, 2), (value,) * 3), 0, 0)] * 3, []).pixels
            assert stacked.eq(value).all()
            yield stacked.is_shared(), stacked.data_ptr()


@pytest.fixture
def images(write_shards: Write) -> TrainingBatches:
    """Batches of four crops each."""
    order = TrainingOrder(open_source(str(write_shards(64))), 4, seed=3, window=16)
    return TrainingBatches(order, CropAndFlip((8, 8), 0.2, True), 0, 4)


def pixels(stream: Iterator[Batch]) -> list[torch.Tensor]:
    return [batch.pixels for batch in islice(stream, STEPS)]


def test_a_worker_takes_a_few_places_in_turns() -> None:
    found = list(run_in_workers(Places(), 1))
    assert all(shared for shared, _ in found)
    places = [place for _, place in found]
    assert len(set(places)) == PLACES
    assert places == 3 * places[:PLACES]


def test_the_main_process_shares_nothing() -> None:
    assert not any(shared for shared, _ in run_in_workers(Places(), 0))


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_that_are_kept_stay_as_they_were(workers: int, images: TrainingBatches) -> None:
    expected = pixels(batches(images, 0))
    assert len({found.sum().item() for found in expected}) > PLACES
    for kept, value in zip(pixels(batches(images, workers)), expected, strict=True):
        assert torch.equal(kept, value)


def slowly(images: TrainingBatches) -> list[bool]:
    """Whether each batch is still the right one after the worker went on as far as it may."""
    same = []
    for part, expected in zip(islice(run_in_workers(images, 1), STEPS), pixels(batches(images, 0)), strict=True):
        time.sleep(0.05)
        same.append(torch.equal(part.pixels, expected))
    return same


def test_a_worker_does_not_run_into_what_is_to_be_read(images: TrainingBatches) -> None:
    assert all(slowly(images))


def test_fewer_places_would_be_noticed(images: TrainingBatches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "PLACES", PLACES - 2)
    assert not all(slowly(images))
