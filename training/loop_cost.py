"""What the training loop adds to the bare step, as a part of `training.benchmark`.

The loop is `training.pretrain` itself, in a process of its own, with everything that it does beside the step: reading
and decoding images, learning rate, agreement of processes, skipping of bad steps, metrics and log. The bare step is
timed before and after it, on images in memory. How much of the loop's time is spent waiting for images is what the run
logs as `data_wait`.
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from training.batch_cost import BatchSettings
from training.config import setting
from training.cost_settings import Entry
from training.log_files import read_metrics
from training.step_cost import Learner, Way
from training.timing import per_image, time_steps


ROOT = Path(__file__).parents[1]


@dataclass
class LoopSettings(BatchSettings):
    """The model, the images and how they are read."""

    dataset: str = setting("photos", "Hub id, local folder or file, or 'photos' for the demonstration")
    num_workers: list[int] = setting([0, 2], "decoding processes; 0 decodes in the program itself")
    logging_steps: int = setting(10, "optimiser steps between entries of metrics.jsonl, each a timed repetition")
    repetitions: int = setting(4, "timed entries of the log, after one to warm up, and steps before and after")
    output: str = setting("runs/benchmark/loop.json", "file for all numbers")

    def validate(self) -> None:
        """Raise a ValueError that names the first impossible setting, its value and the remedy."""
        super().validate()
        self._validate_sizes("num_workers", least=0)
        self._validate_at_least(1, "logging_steps")

    def run_flags(self, images: int, num_workers: int) -> list[str]:
        """Flags of `training.pretrain` for the same step; it is made so many times as the log's entries take."""
        same = ["image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "mask_ratio"]
        same += ["mixed_precision", "dataset", "logging_steps"]
        flags = {name: getattr(self, name) for name in same}
        flags |= {"contrastive_batch_size": images, "num_workers": num_workers}
        flags |= {"max_steps": self.logging_steps * (1 + self.repetitions), "epochs": 1_000_000, "warmup_epochs": 0}
        flags |= {"save_steps": 10**9, "knn_images": 0, "report_to": "none", "resume": "none"}
        return [f"--{name}={value}" for name, value in flags.items()]


def measure_loop(accelerator: Accelerator, config: LoopSettings) -> list[Entry]:
    """A run for every batch and number of workers; the bare step is that of the same batch."""
    entries = []
    learner = Learner(accelerator, config.model_config(), max(config.contrastive_batch_sizes))
    for images in config.contrastive_batch_sizes:
        step = {"step": partial(learner.step, Way(images, images))}
        for num_workers in config.num_workers:
            before = time_steps(step, config.repetitions, accelerator.device)["step"]
            logged = run_log(config.run_flags(images, num_workers))
            after = time_steps(step, config.repetitions, accelerator.device)["step"]
            entries.append(loop_entry(images, num_workers, before + after, logged))
    return entries


def run_log(flags: list[str]) -> list[dict[str, Any]]:
    """Entries of the log of a new run, without the one that warms up.

    Raises:
        RuntimeError: with its complaint, if the run fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "training.pretrain", *flags, f"--output_dir={folder}/run"]
        done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the run has failed: {' '.join(command)}\n{done.stderr}")
        entries = read_metrics(Path(folder, "run", "metrics.jsonl"))
    return [entry for entry in entries if "images_per_second" in entry][1:]


def loop_entry(images: int, num_workers: int, step_seconds: list[float], logged: list[dict[str, Any]]) -> Entry:
    """Times of an image in the loop and in the bare step, and what the loop spends in waiting and in the rest.

    Args:
        images: of a step.
        num_workers: of the run.
        step_seconds: of bare steps.
        logged: entries of the run's log; `data_wait` is a share of the time, in [0, 1], if it is there.
    """
    step = per_image(step_seconds, images)
    whole = per_image([images / entry["images_per_second"] for entry in logged], images)
    shares = [entry["data_wait"] for entry in logged if "data_wait" in entry]
    wait = float(np.median(shares)) if shares else None
    loop_ms, step_ms = whole["ms_per_image"], step["ms_per_image"]
    overhead = None if wait is None else loop_ms * (1 - wait) / step_ms - 1
    facts = {"images": images, "num_workers": num_workers, "time_ratio": loop_ms / step_ms}
    return (
        facts | {"data_wait": wait, "overhead": overhead} | whole | {"bare_step": step, "step_ms_per_image": step_ms}
    )
