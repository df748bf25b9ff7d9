"""How the time of an image grows, as a part of `training.benchmark`: one thing is varied at a time.

Visible patches (by the mask ratio), images of a step, and the size of the images; and the number of processes that
share out one contrastive batch with global negatives: with gloo on the CPU, one thread each, or as many of a machine's
CUDA GPUs.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import set_forkserver_preload
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.nn.parallel import DistributedDataParallel

from modeling_micl import MiclConfig, visible_patches_per_view
from training.config import setting
from training.cost_settings import Entry, VitSettings
from training.monitor import gigaflop_per_image
from training.plain_step import PlainStep, contrastive_loss, micl_model, pretraining_optimizer, random_pixels
from training.processes import use_all_cores
from training.timing import per_image, time_steps


@dataclass
class ScaleSettings(VitSettings):
    """What is varied, around one encoder and step."""

    mask_ratios: list[float] = setting([0.5, 0.75, 0.8, 0.9, 0.95], "shares of the patches that no view sees")
    batches: list[int] = setting([8, 16, 32, 64, 128], "images of a step")
    image_sizes: list[int] = setting([112, 160, 224, 288], "pixels")
    processes: list[int] = setting([1, 2], "that share out the images of a step; on CUDA one for each GPU")
    precision: str = setting("bf16", "fp32, or bf16 by autocast")
    output: str = setting("runs/benchmark/scale.json", "file for all numbers")

    def validate(self) -> None:
        """Raise a ValueError that names the first impossible setting, its value and the remedy."""
        super().validate()
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision takes fp32 or bf16, got {self.precision!r}.")
        if self.batches and min(self.batches) < 2:
            raise ValueError(f"batches takes numbers from 2 up, got {self.batches}.")
        for mask_ratio in self.mask_ratios:
            self.model_config(mask_ratio=mask_ratio)
        for image_size in self.image_sizes:
            self.model_config(image_size=image_size)
        for processes in self.processes:
            if processes < 1 or self.images % processes:
                raise ValueError(f"images={self.images} cannot be shared out to processes={processes}.")

    def points(self) -> dict[tuple[str, float], tuple[MiclConfig, int]]:
        """Model and images of a step by what is varied in one process, and its value."""
        points: dict[tuple[str, float], tuple[MiclConfig, int]] = {}
        for mask_ratio in self.mask_ratios:
            points["mask ratio", mask_ratio] = self.model_config(mask_ratio=mask_ratio), self.images
        for images in self.batches:
            points["images of a step", images] = self.model_config(), images
        for image_size in self.image_sizes:
            points["image size", image_size] = self.model_config(image_size=image_size), self.images
        return points


def measure_scale(accelerator: Accelerator, config: ScaleSettings) -> list[Entry]:
    """Every point of one process, interleaved, then every number of processes; ratios are to the first of a kind."""
    use_all_cores(accelerator)
    device = accelerator.device
    steps = {point: _step(*chosen, config.precision, device) for point, chosen in config.points().items()}
    seconds = time_steps(steps, config.repetitions, device)
    del steps
    entries: list[Entry] = []
    for (varied, value), (model, images) in config.points().items():
        entries.append(_entry(varied, value, model, images, seconds[varied, value]))
    for processes in config.processes:
        if device.type == "cpu" or processes <= torch.cuda.device_count():
            times = process_seconds(processes, config, device)
            entries.append(_entry("processes", processes, config.model_config(), config.images, times))
    first: dict[str, Entry] = {}
    for entry in entries:
        reference = first.setdefault(entry["varied"], entry)
        entry["time_ratio"] = entry["ms_per_image"] / reference["ms_per_image"]
        entry["gigaflop_ratio"] = entry["gigaflop_per_image"] / reference["gigaflop_per_image"]
    return entries


def _entry(varied: str, value: float, model: MiclConfig, images: int, seconds: list[float]) -> Entry:
    facts = {
        "varied": varied,
        "value": value,
        "images": images,
        "patches_per_view": visible_patches_per_view(model.num_patches, model.mask_ratio),
        "gigaflop_per_image": gigaflop_per_image(model),
    }
    return facts | per_image(seconds, images)


def _step(
    model_config: MiclConfig,
    images: int,
    precision: str,
    device: torch.device,
    wrap: Callable[[torch.nn.Module], torch.nn.Module] = lambda model: model,
) -> PlainStep:
    model = micl_model(model_config, device)
    loss = contrastive_loss(wrap(model), model_config)
    return PlainStep(loss, pretraining_optimizer(model), random_pixels(images, model_config), precision)


def process_seconds(processes: int, config: ScaleSettings, device: torch.device) -> list[float]:
    """Seconds of every repetition of a step that so many new processes share out, as torchrun starts them."""
    here: dict[str, Any] = {
        "run_id": "benchmark",
        "rdzv_backend": "c10d",
        "rdzv_endpoint": "localhost:0",
        "max_restarts": 0,
    }
    # The fork server imports torch once for all; CUDA cannot be used in a fork.
    here["start_method"] = "spawn" if device.type == "cuda" else "forkserver"
    set_forkserver_preload([__name__])
    launch = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=processes, **here)
    results: dict[int, list[float]] = elastic_launch(launch, shared_step_seconds)(config, device.type)
    return results[0]


def shared_step_seconds(config: ScaleSettings, device_type: str) -> list[float]:
    """What one of the processes does; they wait for each other in every step, so that all measure the same."""
    device = torch.device(device_type, int(os.environ["LOCAL_RANK"])) if device_type == "cuda" else torch.device("cpu")
    if device_type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=timedelta(minutes=10))
    try:
        share = config.images // dist.get_world_size()
        model_config = config.model_config(negatives="global")
        step = _step(model_config, share, config.precision, device, DistributedDataParallel)
        return time_steps({"step": step}, config.repetitions, device)["step"]
    finally:
        dist.destroy_process_group()
