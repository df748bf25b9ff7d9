"""The stream of batches: the same images and crops for any number of processes and workers, broken ones or not."""

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from training import data
from training.batch import Batch, concatenate, stack
from training.data import EvaluationImages, TrainingBatches, TrainingOrder, batches
from training.images import CropAndFlip, Transform, central_crop
from training.source import ImageSource, open_source


Write = Callable[..., Path]
GLOBAL_BATCH = 12
CROP = CropAndFlip((8, 8), min_scale=0.2, horizontal_flip=True)
SHARDS = {"equal shards": [33, 33, 33], "unequal shards": [60, 7, 0, 32], "one shard": [99], "random access": [99]}


@pytest.fixture(autouse=True)
def _lanes_for_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lanes of 20 rows, so that 99 rows are read by four."""
    monkeypatch.setattr(data, "MIN_ROWS_PER_LANE", 20)


@pytest.fixture(params=SHARDS)
def source(request: pytest.FixtureRequest, write_shards: Write) -> ImageSource:
    """99 pictures, stored in some way."""
    return open_source(str(write_shards(*SHARDS[request.param])), streaming=request.param != "random access")


def order_of(source: ImageSource, global_batch: int = GLOBAL_BATCH, seed: int = 3, window: int = 8) -> TrainingOrder:
    return TrainingOrder(source, global_batch, seed, window)


def global_batches(
    order: TrainingOrder, steps: int, processes: int = 1, workers: int = 0, step: int = 0, transform: Transform = CROP
) -> list[Batch]:
    """What all processes, one after the other, get."""
    size = order.global_batch_size // processes
    parts = [
        list(islice(batches(TrainingBatches(order, transform, n * size, (n + 1) * size, step), workers), steps))
        for n in range(processes)
    ]
    return [concatenate(list(of_step)) for of_step in zip(*parts, strict=True)]


def differing(batch: Batch, other: Batch) -> str | None:
    """What differs between two batches."""
    if batch.index.tolist() != other.index.tolist():
        return "index"
    if not torch.equal(batch.labels, other.labels):
        return "labels"
    return None if torch.equal(batch.pixels, other.pixels) else "pixels"


def differences(some: list[Batch], others: list[Batch]) -> set[str]:
    return {found for pair in zip(some, others, strict=True) if (found := differing(*pair))}


def indices(found: list[Batch]) -> list[int]:
    return [index for batch in found for index in batch.index.tolist()]


SPLITS = [(1, 2), (2, 1), (2, 2), (3, 0), (4, 0), (12, 0)]


@pytest.mark.parametrize(("processes", "workers"), SPLITS)
def test_processes_and_workers_change_no_batch(processes: int, workers: int, source: ImageSource) -> None:
    alone = global_batches(order_of(source), steps=11)  # more than one epoch of eight steps
    assert {len(batch.index) for batch in alone} == {GLOBAL_BATCH}
    assert differences(alone, global_batches(order_of(source), 11, processes, workers)) == set()


def test_other_places_of_the_workers_would_be_noticed(source: ImageSource, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = global_batches(order_of(source), steps=3)
    ordered = TrainingOrder.draws

    def shifted(self: TrainingOrder, step: int, first: int, last: int) -> Iterator[list[data.Draw]]:
        return ordered(self, step, *((first, last) if first == 0 else (first - 1, last - 1)))

    monkeypatch.setattr(TrainingOrder, "draws", shifted)
    assert differences(alone, global_batches(order_of(source), 3, processes=2)) == {"index"}


def test_crops_by_the_order_of_arrival_would_be_noticed(source: ImageSource) -> None:
    def counting() -> Transform:
        crops = iter(range(1000))
        return lambda image, rng: CROP(image, np.random.default_rng(next(crops)))

    alone = global_batches(order_of(source), steps=3, transform=counting())
    assert differences(alone, global_batches(order_of(source), 3, processes=2, transform=counting())) == {"pixels"}


@pytest.mark.parametrize("step", [1, 5, 8, 11, 17])
def test_starting_at_a_step_gives_what_running_to_it_would(step: int, source: ImageSource) -> None:
    from_start = global_batches(order_of(source), steps=20)
    assert differences(from_start[step:], global_batches(order_of(source), 20 - step, step=step)) == set()


def test_starting_at_a_step_holds_for_workers_too(source: ImageSource) -> None:
    from_start = global_batches(order_of(source), steps=12)
    assert differences(from_start[9:], global_batches(order_of(source), 3, processes=2, workers=2, step=9)) == set()


def test_an_epoch_has_every_image_once_but_those_that_fill_no_batch(source: ImageSource) -> None:
    order = order_of(source)
    assert order.steps_per_epoch == 8
    found = global_batches(order, steps=24)
    for epoch in range(3):
        seen = Counter(indices(found[8 * epoch : 8 * epoch + 8]))
        assert len(seen) == 96
        assert set(seen.values()) == {1}
        assert set(seen) <= set(range(99))


def test_pixels_and_labels_belong_to_the_index(source: ImageSource) -> None:
    whole = CropAndFlip((16, 20), min_scale=1, horizontal_flip=False)
    every = concatenate(list(batches(EvaluationImages(source, central_crop((16, 20))), 0)))
    by_index = dict(zip(every.index.tolist(), every.pixels, strict=True))
    for batch in global_batches(order_of(source), steps=3, transform=whole):
        assert batch.labels.tolist() == [index % 4 for index in batch.index.tolist()]
        for index, pixels in zip(batch.index.tolist(), batch.pixels, strict=True):
            assert torch.equal(pixels, by_index[index])


def test_epochs_differ_in_order_and_crops(source: ImageSource) -> None:
    found = global_batches(order_of(source), steps=16)
    first, second = indices(found[:8]), indices(found[8:])
    assert first != second
    crops: list[dict[int, torch.Tensor]] = [
        {index: pixels for batch in epoch for index, pixels in zip(batch.index.tolist(), batch.pixels, strict=True)}
        for epoch in (found[:8], found[8:])
    ]
    same = [torch.equal(crops[0][index], crops[1][index]) for index in crops[0].keys() & crops[1].keys()]
    assert sum(same) < 5 < len(same)


def test_seeds_differ_in_order_and_crops(source: ImageSource) -> None:
    some, others = (global_batches(order_of(source, seed=seed), steps=8) for seed in (0, 1))
    assert indices(some) != indices(others)


def test_images_are_shuffled_across_shards(source: ImageSource) -> None:
    """A batch of 12 out of 99 spans much of the data, and successive images are hardly ever neighbours."""
    found = global_batches(order_of(source), steps=8)
    assert np.median([np.ptp(batch.index.numpy()) for batch in found]) > 60
    steps = np.abs(np.diff(indices(found)))
    assert (steps == 1).mean() < 0.2


@pytest.mark.parametrize("shards", [[30], [7, 9, 14]])
@pytest.mark.parametrize("streaming", [pytest.param(True, id="stream"), pytest.param(False, id="random access")])
def test_images_that_fill_no_batch_are_others_in_every_epoch(
    shards: list[int], streaming: bool, write_shards: Write
) -> None:
    order = order_of(open_source(str(write_shards(*shards)), streaming=streaming), global_batch=20)
    draws = islice(order.draws(0, 0, 20), 30)
    assert {draw(0)[0] for of_step in draws for draw in of_step} == set(range(30))


@pytest.mark.parametrize(("global_batch", "lanes"), [(12, 4), (10, 2), (7, 1), (3, 3), (64, 4)])
def test_lanes_divide_the_batch(global_batch: int, lanes: int, write_shards: Write) -> None:
    source = open_source(str(write_shards(99)))
    order = order_of(source, global_batch)
    assert order.num_lanes == lanes
    seen = indices(global_batches(order, order.steps_per_epoch))
    assert len(set(seen)) == len(seen) == 99 // global_batch * global_batch


# Broken images: every picture is used in an epoch of eight batches of twelve.

BROKEN = {5, 17, 18, 19, 60, 95}
EXACT = {"stream": [50, 46], "random access": [96]}


@pytest.fixture(params=EXACT)
def mended_and_broken(request: pytest.FixtureRequest, write_shards: Write) -> tuple[ImageSource, ImageSource]:
    """The same data without and with some broken images."""
    streaming = request.param == "stream"
    mended = write_shards(*EXACT[request.param], folder="mended")
    broken = write_shards(*EXACT[request.param], folder="broken", broken=BROKEN)
    return open_source(str(mended), streaming=streaming), open_source(str(broken), streaming=streaming)


def test_another_image_takes_the_place_of_a_broken_one(mended_and_broken: tuple[ImageSource, ImageSource]) -> None:
    mended, broken = (global_batches(order_of(source), steps=16) for source in mended_and_broken)
    replaced = Counter()
    for with_all, batch in zip(mended, broken, strict=True):
        assert len(batch.pixels) == len(batch.labels) == GLOBAL_BATCH
        for place, index in enumerate(with_all.index.tolist()):
            if index in BROKEN:
                replaced[index] += 1
                assert int(batch.index[place]) not in BROKEN
                assert int(batch.labels[place]) == int(batch.index[place]) % 4
            else:
                assert int(batch.index[place]) == index
                assert torch.equal(batch.pixels[place], with_all.pixels[place])
    assert replaced == dict.fromkeys(BROKEN, 2)


def test_a_broken_image_is_reported_once_an_epoch_by_name(
    mended_and_broken: tuple[ImageSource, ImageSource],
) -> None:
    for processes, workers in ((1, 0), (2, 1)):
        found = global_batches(order_of(mended_and_broken[1]), 16, processes, workers)
        for epoch in (found[:8], found[8:]):
            reports = [str(image) for batch in epoch for image in batch.broken]
            assert sorted(int(report.split()[1]) for report in reports) == sorted(BROKEN)
            assert all(f"picture-{report.split()[1]}.png" in report for report in reports)
            assert all("not in any known image format" in report for report in reports)


def test_stand_ins_are_the_same_for_all_processes_and_workers(
    mended_and_broken: tuple[ImageSource, ImageSource],
) -> None:
    alone = global_batches(order_of(mended_and_broken[1]), steps=16)
    for processes, workers in ((1, 2), (3, 0)):
        others = global_batches(order_of(mended_and_broken[1]), 16, processes, workers)
        assert differences(alone, others) == set()
        for batch, other in zip(alone, others, strict=True):
            assert batch.broken == other.broken


def test_leaving_broken_images_out_would_be_noticed(
    mended_and_broken: tuple[ImageSource, ImageSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave_out(self: TrainingBatches, draws: list[data.Draw], epoch: int) -> Batch:
        rows = [(index, row) for index, row in (draw(0) for draw in draws) if index not in BROKEN]
        return stack([(np.zeros((8, 8, 3), np.uint8), 0, index) for index, _ in rows], [])

    monkeypatch.setattr(TrainingBatches, "_decode", leave_out)
    with pytest.raises(AssertionError):
        test_another_image_takes_the_place_of_a_broken_one(mended_and_broken)


@pytest.mark.parametrize(("streaming", "workers"), [(True, 0), (False, 0), (True, 1)])
def test_nothing_but_broken_images_is_an_error(streaming: bool, workers: int, write_shards: Write) -> None:
    source = open_source(str(write_shards(24, broken=range(24))), streaming=streaming)
    with pytest.raises(ValueError, match=r"100 images in a row cannot be decoded, the last: .*picture-\d+.png"):
        global_batches(order_of(source), steps=1, workers=workers)


@pytest.mark.parametrize("good", [0, 4, 11])
@pytest.mark.parametrize("streaming", [True, False])
def test_one_good_image_stands_in_for_all(good: int, streaming: bool, write_shards: Write) -> None:
    source = open_source(str(write_shards(12, broken=set(range(12)) - {good})), streaming=streaming)
    batch = global_batches(order_of(source, window=12), steps=1)[0]
    assert set(batch.index.tolist()) == {good}
    assert len(batch.broken) == 11


def test_a_broken_image_that_is_left_alone_in_the_last_window_is_replaced(write_shards: Write) -> None:
    source = open_source(str(write_shards(9, broken={8})))
    batch = global_batches(order_of(source, global_batch=9, window=8), steps=1)[0]
    assert 8 not in batch.index.tolist()


# Evaluation


def evaluated(source: ImageSource, processes: int, workers: int, max_images: int | None = None) -> list[Batch]:
    return [
        batch
        for n in range(processes)
        for batch in batches(EvaluationImages(source, central_crop((8, 8)), max_images, (n, processes), 10), workers)
    ]


@pytest.mark.parametrize(("processes", "workers"), [(1, 2), (2, 1), (3, 0), (7, 0)])
@pytest.mark.parametrize("max_images", [None, 40])
def test_evaluation_sees_every_image_once(
    processes: int, workers: int, max_images: int | None, source: ImageSource
) -> None:
    alone = evaluated(source, 1, 0, max_images)
    assert indices(alone) == sorted(set(indices(alone)))
    assert len(indices(alone)) == (max_images or 99)
    found = concatenate(evaluated(source, processes, workers, max_images))
    order = found.index.argsort()
    assert found.index[order].tolist() == indices(alone)
    assert torch.equal(found.pixels[order], concatenate(alone).pixels)
    assert found.labels[order].tolist() == [index % 4 for index in indices(alone)]


def test_a_part_of_the_images_comes_from_all_over_the_data(source: ImageSource) -> None:
    found = indices(evaluated(source, 1, 0, max_images=33))
    ends = np.cumsum([0, *SHARDS["unequal shards"]]) if len(source.lengths) == 4 else [0, 33, 66, 99]
    if source.lengths == [99] and not source.random_access:
        assert found == list(range(33))  # a single shard is read from its beginning
        return
    for begin, end in zip(ends[:-1], ends[1:], strict=True):
        assert abs(sum(begin <= index < end for index in found) - (end - begin) / 3) <= 1


def test_evaluation_passes_over_broken_images_and_names_them(write_shards: Write) -> None:
    source = open_source(str(write_shards(20, 25, broken={3, *range(20, 31)})))
    found = evaluated(source, 1, 0)
    assert indices(found) == [index for index in range(45) if index != 3 and not 20 <= index < 31]
    reports = [str(image) for batch in found for image in batch.broken]
    assert "picture-3.png" in reports[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_moving_a_batch_keeps_what_it_holds(workers: int, write_shards: Write) -> None:
    batch = next(iter(batches(EvaluationImages(open_source(str(write_shards(9))), central_crop((8, 8))), workers)))
    moved = batch.to(torch.device("cpu"))
    assert differing(batch, moved) is None
    assert batch.pixels.dtype == torch.uint8
    assert batch.pixels.shape[1:] == (8, 8, 3)


def test_unlabelled_images_have_label_minus_one(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    assert evaluated(open_source(str(tmp_path)), 1, 0)[0].labels.tolist() == [-1]
