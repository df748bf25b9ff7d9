"""The training step beside that of other programs and methods, as a part of `training.benchmark`.

All have the same encoder, number and size of images, and precision, and take turns. How much is learned from a step
differs between methods; only its cost is compared here.
"""

from dataclasses import dataclass
from functools import partial

import torch
from accelerate import Accelerator

from modeling_micl import MiclConfig
from training.config import setting
from training.cost_settings import MIB, Entry, VitSettings, ratio
from training.other_methods import METHODS, OURS, Method
from training.plain_step import PlainStep
from training.processes import use_all_cores
from training.step_cost import peak_memories
from training.timing import per_image, time_steps


@dataclass
class PeerSettings(VitSettings):
    """The encoder and the images; what the others mask is their own."""

    precisions: list[str] = setting(["fp32", "bf16"], "fp32, or bf16 by autocast")
    repetitions: int = setting(3, "timed repetitions of each kind, after one to warm up")
    output: str = setting("runs/benchmark/peers.json", "file for all numbers")

    def validate(self) -> None:
        """Raise a ValueError that names the first impossible setting, its value and the remedy."""
        super().validate()
        self._validate_precisions()


def method_step(number: int, config: MiclConfig, images: int, precision: str, device: torch.device) -> PlainStep:
    """A step of the method with this number, for `peak_memories`."""
    return METHODS[number].step(config, images, precision, device)


def measure_peers(accelerator: Accelerator, config: PeerSettings) -> list[Entry]:
    """Every method in every precision; ratios are to ours in the same precision."""
    use_all_cores(accelerator)
    return [entry for precision in config.precisions for entry in _measure(accelerator.device, config, precision)]


def _measure(device: torch.device, config: PeerSettings, precision: str) -> list[Entry]:
    model, images = config.model_config(), config.images
    installed = [method for method in METHODS if method.installed]
    builds = [partial(method_step, METHODS.index(m), model, images, precision, device) for m in installed]
    peaks = dict(zip(installed, peak_memories(device, builds), strict=True))
    fitting = [method for method in installed if peaks[method] is not None]
    steps = {method: method.step(model, images, precision, device) for method in fitting}
    seconds = time_steps(steps, config.repetitions, device)
    costs: dict[Method, Entry] = {}
    for method in METHODS:
        costs[method] = {"ms_per_image": None, "gigaflop_per_image": None, "peak_memory_mib": None}
        if method in steps:
            peak, counted = peaks[method], steps[method].gigaflop_per_image()
            costs[method] = {"gigaflop_per_image": counted, "peak_memory_mib": None if peak is None else peak / MIB}
            costs[method] |= per_image(seconds[method], images)
    ratios = {"time": "ms_per_image", "gigaflop": "gigaflop_per_image", "memory": "peak_memory_mib"}
    return [
        {"name": method.name, "program": method.program, "precision": precision, "images": images}
        | {f"{what}_ratio": ratio(cost[key], costs[OURS][key]) for what, key in ratios.items()}
        | cost
        for method, cost in costs.items()
    ]
