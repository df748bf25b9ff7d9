"""Methods take turns and are set against ours in the same precision. Times are never asserted."""

import json

import pytest
from accelerate import Accelerator

from training import peer_cost
from training.other_methods import METHODS, OURS, Method, naive
from training.peer_cost import PeerSettings, measure_peers


NAIVE = Method("naive", "torch", naive, plain_adamw=True)
MISSING = Method("missing", "no-such-package", naive)

pytestmark = pytest.mark.usefixtures("no_accelerator")


def test_ratios_are_to_ours_in_the_same_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_cost, "METHODS", [OURS, NAIVE, MISSING])
    monkeypatch.setattr(
        peer_cost, "peak_memories", lambda _, builds: [(number + 1) << 20 for number in range(len(builds))]
    )
    config = PeerSettings(size="tiny", image_size=32, patch_size=8, mask_ratio=0.75, images=2, repetitions=1)
    config.validate()
    entries = measure_peers(Accelerator(cpu=True), config)
    assert json.loads(json.dumps(entries)) == entries
    assert [(e["name"], e["precision"]) for e in entries] == [
        (name, precision) for precision in ("fp32", "bf16") for name in ("MiCL", "naive", "missing")
    ]
    for first in (0, 3):
        ours, other, missing = entries[first : first + 3]
        assert (ours["time_ratio"], ours["gigaflop_ratio"], ours["memory_ratio"]) == (1, 1, 1)
        assert other["time_ratio"] == other["ms_per_image"] / ours["ms_per_image"]
        assert other["gigaflop_ratio"] == other["gigaflop_per_image"] / ours["gigaflop_per_image"] > 1
        assert (other["memory_ratio"], other["peak_memory_mib"]) == (2, 2)
        assert missing["program"] == "no-such-package, not installed"
        assert {missing[key] for key in ("ms_per_image", "time_ratio", "gigaflop_ratio", "memory_ratio")} == {None}


def test_what_does_not_fit_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_cost, "METHODS", [OURS, NAIVE])
    monkeypatch.setattr(peer_cost, "peak_memories", lambda _, builds: [1 << 20, None])
    config = PeerSettings(size="tiny", image_size=32, patch_size=4, images=2, repetitions=1, precisions=["fp32"])
    fits, other = measure_peers(Accelerator(cpu=True), config)
    assert fits["ms_per_image"] > 0
    assert other["ms_per_image"] is None
    assert other["program"].startswith("torch ")


def test_the_process_that_measures_memory_makes_the_same_step() -> None:
    config = PeerSettings(size="tiny", image_size=32, patch_size=4, images=2)
    naive_number = next(number for number, method in enumerate(METHODS) if method.plain_adamw)
    step = peer_cost.method_step(naive_number, config.model_config(), 2, "bf16", Accelerator(cpu=True).device)
    assert (len(step.pixels), step.precision) == (2, "bf16")
    assert not step.optimizer.defaults["fused"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": "giant"}, "size takes one of tiny, .*'giant'"),
        ({"images": 1}, "images must be at least 2"),
        ({"precisions": ["fp16"]}, r"precisions takes different ones of fp32, bf16, got \['fp16'\]"),
        ({"precisions": ["fp32", "fp32"]}, "different"),
        ({"repetitions": 0}, "repetitions must be at least 1"),
        ({"image_size": 64}, "mask_ratio=0.9 leaves"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PeerSettings(**settings).validate()  # type: ignore[arg-type]
