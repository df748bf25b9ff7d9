"""The log of a run: metrics.jsonl, the trackers and the progress bar, and the alarms that watch over them."""

import json
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from training.agreement import Told
from training.data import Batch
from training.run import Run


# What the progress bar shows of an entry, where it is there.
SHOWN = {
    "loss": ".3f",
    "contrastive_accuracy": ".0%",
    "images_per_second": ".0f",
    "knn_accuracy": ".1%",
    "probe_accuracy": ".1%",
    "top1_accuracy": ".1%",
}
# Looks at each logged entry and returns a warning, or None.
Alarm = Callable[[int, dict[str, float]], str | None]


class CollapseAlarm:
    """Warns when the loss stays at ln(contrasted images), the value of guessing.

    Args:
        contrasted_images: images among which a view must find its own.
        patience: logged steps in a row, after `first_step`, that count as staying there.
        first_step: optimiser steps during which a high loss is normal.
    """

    def __init__(self, contrasted_images: int, patience: int = 5, first_step: int = 200) -> None:
        self.guessing = math.log(contrasted_images)
        self.first_step = first_step
        self.recent: deque[bool] = deque(maxlen=patience)

    def check(self, step: int, metrics: dict[str, float]) -> str | None:
        """A warning with the likely cause, or None."""
        self.recent.append(step >= self.first_step and metrics["loss"] > 0.98 * self.guessing)
        if len(self.recent) < (self.recent.maxlen or 0) or not all(self.recent):
            return None
        self.recent.clear()
        text = (
            f"The loss {metrics['loss']:.3f} sits at ln(contrasted images) = {self.guessing:.3f}: nothing is learned. "
        )
        if metrics["negative_cosine"] > 0.98:
            return text + (
                f"All embeddings point the same way (mean cosine of negatives {metrics['negative_cosine']:.3f}). "
                "Likely the views of an image share too little, as with strokes on an empty ground, or the learning "
                "rate is too high: lower mask_ratio or base_lr, use larger patches or a longer warm-up. MiCL wants "
                "natural images."
            )
        return text + "Likely the views are too small or too alike between images: lower mask_ratio or temperature."


class SpikeAlarm:
    """Warns when the loss jumps up.

    Args:
        factor: of the median of the recent entries above which a loss is a spike.
        entries: logged losses to compare with; there is no warning before there are so many.
    """

    def __init__(self, factor: float = 2.0, entries: int = 10) -> None:
        self.factor = factor
        self.recent: deque[float] = deque(maxlen=entries)

    def check(self, step: int, metrics: dict[str, float]) -> str | None:
        """A warning at the first entry of a spike, or None."""
        loss, usual = metrics["loss"], median(self.recent) if self.recent else math.nan
        known, before = len(self.recent) == self.recent.maxlen, self.recent[-1] if self.recent else math.nan
        if math.isfinite(loss):
            self.recent.append(loss)
        if not known or not loss > self.factor * usual or before > self.factor * usual:
            return None
        return (
            f"The loss {loss:.3f} at step {step} is more than {self.factor:g} times the {usual:.3f} of the last "
            f"{len(self.recent)} entries. If it does not come down again, go on from an earlier checkpoint with a "
            "lower base_lr or max_grad_norm=1."
        )


class MetricsLog:
    """`metrics.jsonl`, one object per line; entries beyond the resumed step are dropped, as they come again."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [entry for entry in read_metrics(path) if entry["step"] <= step] if step else []
        unfinished = path.with_name(f".tmp-{path.name}")
        unfinished.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
        unfinished.replace(path)

    def write(self, entry: dict[str, Any]) -> None:
        """Append one entry; it must have a step."""
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The entries of a `metrics.jsonl`; a line that a crash cut short is left out."""
    entries = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries


class Logger:
    """Adds up what happens between two entries; writes them to metrics.jsonl, trackers and progress bar.

    Args:
        run: what is logged.
        title: of the progress bar.
        alarm: what may be wrong with the training.
    """

    def __init__(self, run: Run, title: str, alarm: Alarm = lambda *_: None) -> None:
        self.run, self.alarms = run, (SpikeAlarm().check, alarm)
        self.bad_in_row = 0
        self.main = run.accelerator.is_main_process
        self.file = MetricsLog(run.folder / "metrics.jsonl", run.progress.step) if self.main else None
        self.bar = tqdm(
            total=run.plan.total_steps,
            initial=run.progress.step,
            disable=not self.main,
            desc=title,
            unit="step",
        )
        self._restart()

    def __enter__(self) -> "Logger":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def say_stopped(self) -> None:
        """Tell that a run was stopped, and end its trackers."""
        self.run.accelerator.print(
            f"Stopped at step {self.run.progress.step}, all saved: the same command continues from there."
        )
        self.run.accelerator.end_training()

    def _restart(self) -> None:
        self.loss = torch.zeros((), device=self.run.accelerator.device)
        self.finite = torch.zeros((), device=self.run.accelerator.device)  # losses in the sum
        self.images = self.broken = 0
        self.since = time.perf_counter()

    def add(self, batch: Batch, loss: Tensor) -> None:
        """Take note of one forward pass, without waiting for the device."""
        counts = loss.detach().isfinite() | (not self.run.skips_bad_steps)
        self.loss += torch.where(counts, loss.detach(), 0.0)
        self.finite += counts
        self.images += len(batch.pixels)
        self.broken += len(batch.broken)
        for entry in batch.broken:
            self.bar.write(f"skipped a broken image, another takes its place: {entry}", file=sys.stderr)
        if self.run.accelerator.sync_gradients:
            self.bar.update()

    def follow(self, told: Sequence[Told]) -> bool:
        """Count skipped steps and name the first in a row; returns whether any process was asked to stop.

        Raises:
            RuntimeError: if more than `max_bad_steps` were skipped in a row.
        """
        limit = self.run.config.max_bad_steps
        for step, _, skipped in told:
            self.bad_in_row = self.bad_in_row + 1 if skipped else 0
            self.run.progress.skipped += skipped
            if self.bad_in_row > limit:
                raise RuntimeError(self._bad_numbers(step, f"gradient not finite, {self.bad_in_row} times in a row"))
            if self.bad_in_row == 1:
                self._warn(f"Step {step} is skipped: its gradient is not finite (max_bad_steps={limit} in a row).")
        return any(one.stop for one in told)

    def write(self, measured: dict[str, Tensor], grad_norm: Tensor | None) -> None:
        """Write an entry from all processes.

        Args:
            measured: of this process's last batch, scalars.
            grad_norm: of all processes.

        Raises:
            RuntimeError: if the loss or the gradient is not finite, or too many images are broken.
        """
        run, accelerator, progress = self.run, self.run.accelerator, self.run.progress
        local = {"loss": self.loss, "finite": self.finite} | measured
        for name, number in (("images", self.images), ("broken", self.broken)):
            local[name] = torch.tensor(float(number), device=self.loss.device)
        means = accelerator.reduce(torch.stack(list(local.values())).double(), reduction="mean").tolist()
        metrics = dict(zip(local, means, strict=True))
        seconds = time.perf_counter() - self.since
        images = round(metrics.pop("images") * accelerator.num_processes)
        progress.seconds += seconds
        progress.seen += images
        progress.broken += round(metrics.pop("broken") * accelerator.num_processes)
        finite = metrics.pop("finite")
        metrics["loss"] = metrics["loss"] / finite if finite else math.nan
        entry = {"step": progress.step, "epoch": progress.forwards / run.plan.forwards_per_epoch} | metrics
        entry |= {"learning_rate": run.optimizer.param_groups[0]["lr"], "images_per_second": images / seconds}
        entry |= {"grad_norm": float(grad_norm) if grad_norm is not None else None, "broken_images": progress.broken}
        entry["skipped_steps"] = progress.skipped
        self._publish(entry)
        self._check(entry)
        self._restart()

    def write_facts(self, facts: dict[str, Any]) -> None:
        """Write an entry with what decides the course of training from here on, and the batch as it is shared out."""
        run, plan = self.run, self.run.plan
        batch = {name: getattr(plan, name) for name in ("images_per_process", "images_per_pass", "images_per_step")}
        batch = {"global_batch_size": plan.contrasted_images, "processes": run.accelerator.num_processes} | batch
        if self.file:
            self.file.write({"step": run.progress.step} | facts | batch)

    def write_evaluation(self, evaluate: Callable[[], dict[str, float]]) -> None:
        """Run an evaluation and write an entry with its result; its time does not count as training."""
        start = time.perf_counter()
        if accuracies := evaluate():
            self._publish({"step": self.run.progress.step} | accuracies)
        self.since += time.perf_counter() - start

    def _publish(self, entry: dict[str, Any]) -> None:
        if self.file:
            self.file.write(entry)
        self.run.accelerator.log({k: v for k, v in entry.items() if v is not None}, step=entry["step"])
        self.bar.set_postfix_str(
            ", ".join(f"{name.replace('_', ' ')} {entry[name]:{how}}" for name, how in SHOWN.items() if name in entry)
        )

    def _check(self, entry: dict[str, Any]) -> None:
        run, progress = self.run, self.run.progress
        overflow_handled = run.accelerator.optimizer_step_was_skipped  # fp16's loss scaler backs off by itself
        norm = entry["grad_norm"]
        bad = not math.isfinite(entry["loss"]) or (
            norm is not None and not math.isfinite(norm) and not overflow_handled
        )
        if bad and not run.skips_bad_steps:
            raise RuntimeError(self._bad_numbers(entry["step"], f"loss {entry['loss']}, gradient norm {norm}"))
        tolerated = run.config.max_bad_fraction * max(progress.seen, min(1000, run.source.num_images))
        if progress.broken > tolerated:
            raise RuntimeError(
                f"{progress.broken} of {progress.seen} images were broken, more than max_bad_fraction="
                f"{run.config.max_bad_fraction} allows: repair the data (each image is named above), or raise it."
            )
        for alarm in self.alarms:
            if warning := alarm(entry["step"], entry):
                self._warn(warning)

    def _bad_numbers(self, step: int, what: str) -> str:
        return (
            f"Step {step}: {what}. The run stops; the last checkpoint in {self.run.folder / 'checkpoints'} is good. "
            "Try a lower base_lr, a longer warm-up, max_grad_norm=1, or mixed_precision bf16 or no instead of fp16."
        )

    def _warn(self, warning: str) -> None:
        if self.main:
            self.bar.write(f"WARNING: {warning}", file=sys.stderr)
