"""Every variant of every size is measured, with the rate of the matmul of its precision. Times are never asserted."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from training import phase_cost
from training.phase_cost import PhaseSettings, Variant, measure_phases, size_steps, step_rates, variant_step


CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"sizes": ["tiny"], "image_size": 32, "patch_size": 4, "images": 2, "repetitions": 1}

pytestmark = pytest.mark.usefixtures("no_accelerator")


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peaks without processes; the largest batch of bf16 fits nowhere. Small matmuls."""

    def peak_memories(_: torch.device, builds: Sequence[Any]) -> list[int | None]:
        return [None if build.args[2] == Variant(0.5, "bf16", False, None) else 3 << 20 for build in builds]

    large_matmul = phase_cost.large_matmul
    monkeypatch.setattr(phase_cost, "peak_memories", peak_memories)
    monkeypatch.setattr(
        phase_cost, "large_matmul", lambda device, precision: large_matmul(device, precision, width=64)
    )


def test_every_variant_is_measured() -> None:
    config = PhaseSettings(**SMALL, mask_ratios=[0.5, 0.9])
    config.validate()
    entries = measure_phases(Accelerator(cpu=True), config)
    assert json.loads(json.dumps(entries)) == entries
    variants = [(e["size"], e["mask_ratio"], e["precision"], e["compiled"]) for e in entries]
    assert variants == [("tiny", r, p, False) for r in (0.5, 0.9) for p in ("fp32", "bf16")]
    fits = [entry for entry in entries if "ms_per_image" in entry]
    assert [entry["peak_memory_mib"] for entry in entries] == [3, None, 3, 3]
    assert [entries.index(entry) for entry in fits] == [0, 2, 3]
    assert fits[0]["gigaflop_per_image"] > 4 * fits[1]["gigaflop_per_image"] == 4 * fits[2]["gigaflop_per_image"]
    assert fits[0]["matmul_gigaflop_per_second"] == fits[1]["matmul_gigaflop_per_second"]
    for entry in fits:
        phases = entry["phase_seconds"]
        assert list(phases) == ["forward", "backward", "optimizer"]
        assert entry["seconds"] == [pytest.approx(sum(times[0] for times in phases.values()))]


def test_compiled_steps_are_of_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[torch.nn.Module] = []

    def compile_model(model: torch.nn.Module, dynamic: bool) -> Callable[..., Any]:
        assert not dynamic
        compiled.append(model)
        return model

    monkeypatch.setattr(torch, "compile", compile_model)
    config = PhaseSettings(**SMALL, mask_ratios=[0.9], precisions=["fp32"], compile=True)
    plain, other = measure_phases(Accelerator(cpu=True), config)
    assert (plain["compiled"], other["compiled"]) == (False, True)
    assert plain["gigaflop_per_image"] == other["gigaflop_per_image"]
    assert other["peak_memory_mib"] is None  # on the CPU it would be the compiler's
    assert len(compiled) == 1
    variants = [Variant(0.9, "fp32", compiled, None) for compiled in (False, True)]
    steps = size_steps(config, "tiny", variants, CPU)
    assert len({id(step.optimizer) for step in steps.values()}) == 1


def test_both_kinds_of_attention_are_compared() -> None:
    config = PhaseSettings(**SMALL, mask_ratios=[0.9], precisions=["bf16"], attentions=["sdpa", "eager"])
    config.validate()
    fused, explicit = measure_phases(Accelerator(cpu=True), config)
    assert (fused["attention"], explicit["attention"]) == ("sdpa", "eager")
    assert fused["gigaflop_per_image"] == explicit["gigaflop_per_image"]
    assert measure_phases(Accelerator(cpu=True), dataclasses.replace(config, attentions=[]))[0]["attention"] is None

    variants = [Variant(0.9, "bf16", False, attention) for attention in ("sdpa", "eager", None)]
    for variant, step in size_steps(config, "tiny", variants, CPU).items():
        with torch.profiler.profile() as profile:
            step()
        kernels = [event.key for event in profile.key_averages() if "flash_attention_for_cpu" in event.key]
        assert bool(kernels) == (variant.attention == "sdpa"), variant  # a run has it explicit on the CPU


def test_the_process_that_measures_memory_makes_the_same_step() -> None:
    step = variant_step(PhaseSettings(**SMALL), "tiny", Variant(0.9, "bf16", False, "sdpa"), CPU)
    assert isinstance(step, phase_cost.PlainStep)
    assert (step.pixels.shape, step.precision) == ((2, 32, 32, 3), "bf16")


def test_rates_follow_from_times() -> None:
    seconds = np.array([[0.1, 0.2, 0.1], [0.1, 0.3, 0.1], [0.2, 0.3, 0.2]])
    rates = step_rates(seconds, images=10, gigaflop_per_image=4.0, matmul_rate=160.0)
    assert rates["ms_per_image"] == pytest.approx(50)
    assert rates["images_per_second"] == pytest.approx(20)
    assert rates["gigaflop_per_second"] == pytest.approx(80)
    assert rates["matmul_share"] == pytest.approx(0.5)
    assert [rates[f"{name}_ms"] for name in ("forward", "backward", "optimizer")] == pytest.approx([100, 300, 100])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sizes": ["giant"]}, "sizes takes different ones of tiny"),
        ({"precisions": []}, "precisions takes different ones of fp32, bf16"),
        ({"mask_ratios": []}, "mask_ratios is empty"),
        ({"mask_ratios": [0.9, 1.5]}, "mask_ratio must lie in"),
        ({"attentions": ["flash"]}, "attentions takes different ones of eager, sdpa"),
        ({"images": 1}, "images must be at least 2"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PhaseSettings(**settings).validate()
