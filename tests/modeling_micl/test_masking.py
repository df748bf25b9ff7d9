from typing import Any

import pytest
import torch

from modeling_micl import sample_views, visible_patches_per_view


@pytest.mark.parametrize(
    ("num_patches", "mask_ratio", "num_views", "expected"),
    [
        (196, 0.9, 2, 9),
        (196, 0.8, 2, 19),
        (196, 0.75, 2, 24),
        (100, 0.9, 2, 4),  # 100 * (1 - 0.9) is a little under 10
        (64, 0.85, 2, 4),
        (196, 0, 2, 98),
        (196, 0.75, 4, 12),
        (15, 0, 2, 7),
    ],
)
def test_patches_per_view_are_the_released_programs(
    num_patches: int, mask_ratio: float, num_views: int, expected: int
) -> None:
    assert visible_patches_per_view(num_patches, mask_ratio, num_views) == expected
    assert sample_views(2, num_patches, mask_ratio, num_views).shape == (2, num_views, expected)


def test_views_are_disjoint_and_lie_on_the_grid() -> None:
    ids_visible = sample_views(50, 30, 0.2, num_views=3)
    assert ids_visible.dtype == torch.int64
    assert ids_visible.min() >= 0
    assert ids_visible.max() < 30
    assert all(len(set(image.flatten().tolist())) == 24 for image in ids_visible)


def test_without_masking_the_views_share_out_all_patches() -> None:
    ids_visible = sample_views(5, 16, 0.0)
    assert torch.equal(ids_visible.flatten(1).sort().values, torch.arange(16).expand(5, -1))


@pytest.mark.parametrize("view", [0, 1])
def test_every_patch_is_seen_equally_often(view: int) -> None:
    images, patches, patches_per_view = 4000, 16, 4
    ids_visible = sample_views(images, patches, 0.5, generator=torch.Generator().manual_seed(0))
    expected = images * patches_per_view / patches
    counts = ids_visible[:, view].flatten().bincount(minlength=patches)
    # K patches of an image are drawn without replacement, which narrows Pearson's statistic by (L - K) / (L - 1).
    statistic = ((counts - expected) ** 2 / expected).sum() / ((patches - patches_per_view) / (patches - 1))
    assert 2.0 < statistic < 37.7  # χ² with 15 degrees of freedom: 0.003 % below, 0.1 % above


def test_images_get_different_views() -> None:
    ids_visible = sample_views(20, 196, 0.9)
    assert len({tuple(image.flatten().tolist()) for image in ids_visible}) == 20


def test_patches_are_dealt_in_the_order_of_their_noise() -> None:
    noise = torch.tensor([[0.9, 0.1, 0.5, 0.3, 0.7, 0.2], [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]])
    assert sample_views(2, 6, 0.3, noise=noise).tolist() == [[[1, 5], [3, 2]], [[0, 1], [2, 3]]]


def test_the_same_seed_draws_the_same_views() -> None:
    first, again, other = (sample_views(4, 196, 0.9, generator=torch.Generator().manual_seed(s)) for s in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_generator_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    sample_views(4, 196, 0.9, generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_generator_the_global_seed_decides() -> None:
    torch.manual_seed(5)
    first = sample_views(4, 196, 0.9)
    torch.manual_seed(5)
    assert torch.equal(sample_views(4, 196, 0.9), first)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"mask_ratio": 0.9}, ["mask_ratio=0.9", "num_views=2", "1 of 16", "lower mask_ratio"]),
        ({"mask_ratio": 0.8, "num_views": 4}, ["mask_ratio=0.8", "num_views=4", "3 of 16", "num_views"]),
        ({"mask_ratio": 0.5, "noise": torch.rand(2, 15)}, ["noise", "(2, 16)", "(2, 15)"]),
        ({"mask_ratio": 0.5, "noise": torch.rand(16)}, ["noise", "(2, 16)", "(16,)"]),
    ],
    ids=["too few", "too many views", "wrong length", "no batch"],
)
def test_an_impossible_request_says_what_is_wrong(arguments: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match="must have shape|at least one") as error:
        sample_views(2, 16, **arguments)
    assert [word for word in words if word not in str(error.value)] == []
