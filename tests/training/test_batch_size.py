"""How many images are contrasted, and how they are shared out to processes and passes."""

from typing import Any

import pytest

from training.batch_size import divisors
from training.config import PretrainConfig


def test_divisors_are_all_sizes_of_equal_parts() -> None:
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert divisors(7) == [1, 7]


def test_the_pool_of_negatives_is_the_batch_of_one_process_or_of_all() -> None:
    assert PretrainConfig(per_device_batch_size=8).contrasted_images(2) == 8
    assert PretrainConfig(per_device_batch_size=8, negatives="global").contrasted_images(2) == 16


def test_a_batch_without_negatives_is_refused() -> None:
    for processes in (1, 2):
        with pytest.raises(ValueError, match="per_device_batch_size=1 leaves no negatives"):
            PretrainConfig(per_device_batch_size=1).contrasted_images(processes)
    assert PretrainConfig(per_device_batch_size=1, negatives="global").contrasted_images(2) == 2


def test_a_contrastive_batch_is_shared_out_only_where_negatives_are_global() -> None:
    shares = {"global": 16, "local": 64}
    for negatives, share in shares.items():
        config = PretrainConfig(contrastive_batch_size=64, negatives=negatives)
        config.validate()
        assert (config.images_per_process(4), config.images_per_pass(4)) == (share, share)
        assert config.contrasted_images(4) == 64
        cached = PretrainConfig(contrastive_batch_size=64, negatives=negatives, per_device_micro_batch_size=8)
        cached.validate()
        assert (cached.images_per_process(4), cached.images_per_pass(4)) == (share, 8)


def test_without_batch_sizes_each_process_has_256_images() -> None:
    assert PretrainConfig().per_device_batch_size == 256
    assert PretrainConfig(contrastive_batch_size=8).per_device_batch_size is None


MICRO = "per_device_micro_batch_size"
CONFLICTING: dict[str, tuple[dict[str, Any], str]] = {
    "two sizes": (
        {"per_device_batch_size": 8, "contrastive_batch_size": 16},
        "per_device_batch_size=8 and contrastive_batch_size=16 both say .* give only one",
    ),
    "one image": ({"contrastive_batch_size": 1}, "contrastive_batch_size=1 leaves no negatives.*at least 2"),
    "no image": ({"contrastive_batch_size": 0}, "contrastive_batch_size must be at least 1, got 0"),
    "empty passes": ({"contrastive_batch_size": 8, MICRO: 0}, f"{MICRO} must be at least 1, got 0"),
    "uneven passes": (
        {"contrastive_batch_size": 60, MICRO: 8},
        f"{MICRO}=8 does not divide contrastive_batch_size=60: use 6 or 10",
    ),
    "passes too large": (
        {"contrastive_batch_size": 60, MICRO: 61},
        f"{MICRO}=61 is more than contrastive_batch_size=60: use at most 60",
    ),
    "passes of a share": ({MICRO: 8}, f"{MICRO}=8 goes with contrastive_batch_size.*per_device_batch_size=256"),
    "search for a share": ({"find_micro_batch": True}, "find_micro_batch=True goes with contrastive_batch_size"),
    "search for nothing": (
        {"contrastive_batch_size": 8, MICRO: 4, "find_micro_batch": True},
        f"find_micro_batch would replace {MICRO}=4",
    ),
    "passes on one place": (
        {"contrastive_batch_size": 8, MICRO: 4, "torch_compile": "reduce-overhead"},
        "torch_compile='reduce-overhead' replays its outputs in place.*use 'default'",
    ),
}


@pytest.mark.parametrize(("given", "message"), CONFLICTING.values(), ids=CONFLICTING)
def test_batch_sizes_that_cannot_be_are_refused_at_once(given: dict[str, Any], message: str) -> None:
    for negatives in ("local", "global"):
        with pytest.raises(ValueError, match=message):
            PretrainConfig(negatives=negatives, **given).validate()


@pytest.mark.parametrize(
    ("given", "processes", "message"),
    [
        ({"contrastive_batch_size": 100}, 3, "contrastive_batch_size=100 .* equally to 3 processes: use 99 or 102"),
        ({"contrastive_batch_size": 2}, 4, "contrastive_batch_size=2 .* 4 processes: use 4"),
        ({"contrastive_batch_size": 64, MICRO: 8}, 3, "contrastive_batch_size=64 .* 3 processes: use 48 or 72"),
        ({"contrastive_batch_size": 64, MICRO: 32}, 4, f"{MICRO}=32 is more than the 16 images of each process"),
        ({"contrastive_batch_size": 48, MICRO: 8}, 4, f"{MICRO}=8 .* the 12 images of each process: use 6 or 12"),
    ],
)
def test_batch_sizes_that_do_not_suit_the_processes_are_refused(
    given: dict[str, Any], processes: int, message: str
) -> None:
    config = PretrainConfig(negatives="global", **given)
    config.validate()
    with pytest.raises(ValueError, match=message):
        config.contrasted_images(processes)
    PretrainConfig(**given).contrasted_images(processes)  # local: each process has all of them
