"""The training step of the known ViT sizes, as a part of `training.benchmark`: its phases and how well it computes.

How well is the share of a large matmul's rate, of the same precision on the same device and threads, measured in turn
with the steps. The operations of a step are counted while it runs, see `training/arithmetic.py`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from typing import ClassVar

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray

from modeling_micl import MiclConfig
from training.arithmetic import DTYPES, large_matmul
from training.config import setting
from training.cost_settings import MIB, VIT_SIZES, CostSettings, Entry, VitSettings
from training.plain_step import PlainStep, contrastive_loss, micl_model, pretraining_optimizer, random_pixels
from training.processes import use_all_cores
from training.step_cost import peak_memories
from training.timing import Step, per_image, time_phases


PHASES = ("forward", "backward", "optimizer")
ATTENTIONS = ["eager", "sdpa"]  # explicit, and by the fused kernels


@dataclass
class PhaseSettings(CostSettings):
    """Which encoders, and in which variants."""

    sizes: list[str] = setting(["small", "base", "large"], f"of the encoder: {', '.join(VIT_SIZES)}")
    image_size: int = setting(224, "pixels")
    patch_size: int = setting(16, "pixels")
    mask_ratios: list[float] = setting([0.8, 0.9], "shares of the patches that neither of two views sees, in [0, 1)")
    precisions: list[str] = setting(["fp32", "bf16"], "fp32, or bf16 by autocast")
    attentions: list[str] = setting(
        [], f"{' and '.join(ATTENTIONS)}, to compare them; unset, the one that a run chooses"
    )
    compile: bool = setting(False, "also with torch.compile")
    images: int = setting(16, "of a step, contrasted together")
    repetitions: int = setting(3, "timed repetitions of each kind, after one to warm up")
    output: str = setting("runs/benchmark/step.json", "file for all numbers")

    mixed_precision: ClassVar[str] = "no"  # of accelerate; a step has its own

    def model_config(self, size: str, mask_ratio: float) -> MiclConfig:
        """The configuration of one model; raises ValueError on an impossible one."""
        vit = VitSettings(size=size, image_size=self.image_size, patch_size=self.patch_size, mask_ratio=mask_ratio)
        return vit.model_config()

    def validate(self) -> None:
        """Raise a ValueError that names the first impossible setting, its value and the remedy."""
        super().validate()
        self._validate_words("sizes", list(VIT_SIZES))
        self._validate_words("precisions", list(DTYPES))
        if self.attentions:
            self._validate_words("attentions", ATTENTIONS)
        if not self.mask_ratios:
            raise ValueError("mask_ratios is empty: give at least one.")
        for size, mask_ratio in product(self.sizes, self.mask_ratios):
            self.model_config(size, mask_ratio)
        if self.images < 2:
            raise ValueError(f"images must be at least 2, or there is nothing to contrast, got {self.images}.")


@dataclass(frozen=True)
class Variant:
    """One kind of step of a model."""

    mask_ratio: float
    precision: str
    compiled: bool
    attention: str | None  # the one that a run chooses


def size_steps(
    config: PhaseSettings, size: str, variants: Sequence[Variant], device: torch.device
) -> dict[Variant, PlainStep]:
    """Steps of all variants of a size on the same images; those with the same attention share weights."""
    geometry = config.model_config(size, config.mask_ratios[0])
    pixels = random_pixels(config.images, geometry)
    attentions = {variant.attention for variant in variants}
    models = {attention: micl_model(geometry, device, attention) for attention in attentions}
    optimizers = {attention: pretraining_optimizer(model) for attention, model in models.items()}
    steps = {}
    for variant in variants:
        model = models[variant.attention]
        run = torch.compile(model, dynamic=False) if variant.compiled else model
        loss = contrastive_loss(run, config.model_config(size, variant.mask_ratio))
        steps[variant] = PlainStep(loss, optimizers[variant.attention], pixels, variant.precision)
    return steps


def variant_step(config: PhaseSettings, size: str, variant: Variant, device: torch.device) -> Step:
    """A step of a new model, for `peak_memories`."""
    return size_steps(config, size, [variant], device)[variant]


def measure_phases(accelerator: Accelerator, config: PhaseSettings) -> list[Entry]:
    """Every variant of every size; those of one size take turns, with the matmuls that they are compared with."""
    use_all_cores(accelerator)
    return [entry for size in config.sizes for entry in _measure_size(accelerator.device, config, size)]


def _measure_size(device: torch.device, config: PhaseSettings, size: str) -> list[Entry]:
    compiled = (False, True) if config.compile else (False,)
    attentions: Sequence[str | None] = config.attentions or [None]
    variants = [Variant(*chosen) for chosen in product(config.mask_ratios, config.precisions, compiled, attentions)]
    # On the CPU the peak of a compiled step would be that of its compilation.
    measured = [variant for variant in variants if device.type == "cuda" or not variant.compiled]
    builds = [partial(variant_step, config, size, variant, device) for variant in measured]
    peaks = dict(zip(measured, peak_memories(device, builds), strict=True))
    steps = size_steps(config, size, variants, device)
    matmuls = {precision: large_matmul(device, precision) for precision in config.precisions}
    phases: dict[Variant | str, list[Step]] = {name: [multiply] for name, (multiply, _) in matmuls.items()}
    phases |= {variant: step.phases for variant, step in steps.items() if peaks.get(variant, 0) is not None}
    timed = time_phases(phases, config.repetitions, device)
    rates = {name: gigaflop / float(np.median(timed[name])) for name, (_, gigaflop) in matmuls.items()}
    entries: list[Entry] = []
    for variant in variants:
        peak, times = peaks.get(variant), timed.get(variant)
        facts = {"size": size} | asdict(variant) | {"images": config.images}
        facts["peak_memory_mib"] = None if peak is None else peak / MIB
        if times is not None:
            counted = steps[replace(variant, compiled=False)].gigaflop_per_image()
            facts |= step_rates(np.array(times), config.images, counted, rates[variant.precision])
        entries.append(facts)
    return entries


def step_rates(seconds: NDArray[np.float64], images: int, gigaflop_per_image: float, matmul_rate: float) -> Entry:
    """What follows from the times of a step.

    Args:
        seconds: (repetitions, 3), of its phases.
        images: of a step.
        gigaflop_per_image: that it computes.
        matmul_rate: GFLOP per second of a large matmul.
    """
    whole = per_image(seconds.sum(axis=1).tolist(), images)
    rate = gigaflop_per_image / whole["ms_per_image"] * 1000
    rates = {
        "images_per_second": 1000 / whole["ms_per_image"],
        "gigaflop_per_image": gigaflop_per_image,
        "gigaflop_per_second": rate,
        "matmul_gigaflop_per_second": matmul_rate,
        "matmul_share": rate / matmul_rate,
    }
    medians = np.median(seconds, axis=0) * 1000
    phases = {f"{name}_ms": float(ms) for name, ms in zip(PHASES, medians, strict=True)}
    return rates | phases | whole | {"phase_seconds": dict(zip(PHASES, seconds.T.tolist(), strict=True))}
