"""Which patches of an image are visible."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from training.data import EvaluationImages, batches
from training.images import central_crop
from training.source import open_source
from training.visible import num_visible, patch_order, visible_patches


Write = Callable[..., Path]


@pytest.mark.parametrize(
    ("patches", "share", "visible"), [(64, 0.0, 64), (64, 0.95, 3), (196, 0.9, 20), (16, 0.75, 4), (4, 0.99, 1)]
)
def test_at_least_one_patch_is_visible(patches: int, share: float, visible: int) -> None:
    assert num_visible(patches, share) == visible


def test_what_is_seen_when_more_is_hidden_is_a_part_of_what_is_seen_when_less_is(write_shards: Write) -> None:
    source = open_source(str(write_shards(9)))
    (batch,) = batches(EvaluationImages(source, central_crop((32, 32))), 0)
    before = None
    for share in (0.0, 0.25, 0.5, 0.75, 0.9, 0.95):
        seen = [set(ids.flatten().tolist()) for ids in visible_patches(share, 64, seed=0)(batch)]
        assert all(len(ids) == num_visible(64, share) and ids <= set(range(64)) for ids in seen)
        assert before is None or all(less < more for less, more in zip(seen, before, strict=True))
        assert share == 0 or len({frozenset(ids) for ids in seen}) == 9  # every image has its own
        before = seen


def test_every_patch_is_as_likely_to_be_visible() -> None:
    counts = patch_order(torch.arange(4000), 16, seed=0)[:, :4].flatten().bincount(minlength=16)
    assert (counts - 1000).abs().max() < 5 * (4000 * 0.25 * 0.75) ** 0.5
    assert not torch.equal(patch_order(torch.arange(9), 16, seed=0), patch_order(torch.arange(9), 16, seed=1))


def test_what_is_seen_of_an_image_depends_on_neither_batches_nor_workers_nor_processes(write_shards: Write) -> None:
    source = open_source(str(write_shards(13, 8, 4)))
    views = visible_patches(0.75, 64, seed=3)

    def seen(processes: int, workers: int, batch_size: int) -> dict[int, list[int]]:
        found = {}
        for process in range(processes):
            share = (process, processes)
            images = EvaluationImages(source, central_crop((32, 32)), process=share, batch_size=batch_size)
            for batch in batches(images, workers):
                found |= dict(zip(batch.index.tolist(), views(batch)[:, 0].tolist(), strict=True))
        return found

    expected = seen(1, 0, 128)
    assert len(expected) == 25
    assert seen(1, 0, 4) == seen(2, 0, 3) == seen(3, 2, 5) == expected
