"""The log of a run: metrics.jsonl, the trackers and the progress bar."""

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from tqdm.auto import tqdm

from training.agreement import Told
from training.alarms import Alarm, InputAlarm, SpikeAlarm
from training.batch import Batch
from training.disk import without_stopping
from training.log_files import Met, MetricsLog, SkippedLog
from training.monitor import matmul_peak
from training.processes import cores_without_process
from training.run import Run


# What the progress bar shows of an entry, where it is there.
SHOWN = {
    "loss": ".3f",
    "contrastive_accuracy": ".0%",
    "images_per_second": ".0f",
    "data_wait": ".0%",
    "mfu": ".0%",
    "knn_accuracy": ".1%",
    "probe_accuracy": ".1%",
    "top1_accuracy": ".1%",
}


def end_trackers(accelerator: Accelerator) -> None:
    """Have them write what they hold; all processes call it when the run has come to its end."""
    with without_stopping("what trackers show"):
        accelerator.end_training()


class Logger:
    """Adds up what happens between two entries; writes them to metrics.jsonl, trackers and progress bar.

    Args:
        run: what is logged.
        title: of the progress bar.
        alarm: what may be wrong with the training.
        gigaflop_per_image: of a step; None where utilisation (`mfu`) is not logged.
    """

    def __init__(
        self, run: Run, title: str, alarm: Alarm = lambda *_: None, gigaflop_per_image: float | None = None
    ) -> None:
        self.run, self.alarms = run, (SpikeAlarm().check, _input_alarm(run).check, alarm)
        self.most_images = _most_images_per_second(run, gigaflop_per_image) if gigaflop_per_image else None
        self.bad_in_row = 0
        self.main = run.accelerator.is_main_process
        self.file = MetricsLog(run.folder / "metrics.jsonl", run.progress.step) if self.main else None
        self.skipped = SkippedLog(run.folder / "skipped.jsonl", run.progress.step) if self.main else None
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
        end_trackers(self.run.accelerator)

    def _restart(self) -> None:
        self.loss = torch.zeros((), device=self.run.accelerator.device)
        self.finite = torch.zeros((), device=self.run.accelerator.device)  # losses in the sum
        self.images = 0
        self.broken: list[Met] = []
        self.waited = 0.0  # seconds for batches
        self.since = time.perf_counter()

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches; adds up how long this process waits for them."""
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def add(self, batch: Batch, loss: Tensor) -> None:
        """Take note of one forward pass, without waiting for the device."""
        counts = loss.detach().isfinite() | (not self.run.skips_bad_steps)
        self.loss += torch.where(counts, loss.detach(), 0.0)
        self.finite += counts
        self.images += len(batch.pixels)
        progress = self.run.progress
        epoch = (progress.forwards - 1) // self.run.plan.forwards_per_epoch
        self.broken += [(progress.step + 1, epoch, image) for image in batch.broken]
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
        for name, number in {"images": self.images, "broken": len(self.broken), "waited": self.waited}.items():
            local[name] = torch.tensor(float(number), device=self.loss.device)
        means = accelerator.reduce(torch.stack(list(local.values())).double(), reduction="mean").tolist()
        metrics = dict(zip(local, means, strict=True))
        seconds = time.perf_counter() - self.since
        images = round(metrics.pop("images") * accelerator.num_processes)
        progress.seconds += seconds
        progress.seen += images
        if broken := round(metrics.pop("broken") * accelerator.num_processes):  # the same on all processes
            progress.broken += broken
            self._name_broken()
        finite, waited = metrics.pop("finite"), metrics.pop("waited")
        metrics["loss"] = metrics["loss"] / finite if finite else math.nan
        entry = {"step": progress.step, "epoch": progress.forwards / run.plan.forwards_per_epoch} | metrics
        entry |= {"learning_rate": run.optimizer.param_groups[0]["lr"], "images_per_second": images / seconds}
        entry["data_wait"] = waited / seconds
        if self.most_images is not None:
            entry["mfu"] = images / seconds / self.most_images
        entry |= {"grad_norm": float(grad_norm) if grad_norm is not None else None, "broken_images": progress.broken}
        entry["skipped_steps"] = progress.skipped
        self._publish(entry)
        self._check(entry)
        self._restart()

    def _name_broken(self) -> None:
        """Write the images that any process had to skip since the last entry to skipped.jsonl, and name some."""
        met = gather_object(self.broken)
        for text in self.skipped.add(met) if self.skipped else ():
            self.bar.write(text, file=sys.stderr)

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

    def evaluated(self) -> bool:
        """Whether the step from which a resumed run goes on was evaluated; all processes call it."""
        step, kept = self.run.progress.step, self.file.kept if self.file else []
        there = any(e["step"] == step and "loss" not in e and "processes" not in e for e in kept)
        return bool(broadcast_object_list([there])[0])

    def _publish(self, entry: dict[str, Any]) -> None:
        if self.file:
            self.file.write(entry)
        with without_stopping("what trackers show"):
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
                f"{run.config.max_bad_fraction} allows: repair the data ({run.folder / 'skipped.jsonl'} names each "
                "image and its defect), or raise it."
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


def _input_alarm(run: Run) -> InputAlarm:
    workers = run.config.num_workers
    if run.accelerator.device.type == "cpu":  # the model uses all cores, and while it waits they are not idle
        return InputAlarm(workers, free_cores=0, share=0.5)
    return InputAlarm(workers, cores_without_process(workers))


def _most_images_per_second(run: Run, gigaflop_per_image: float) -> float:
    """Images whose arithmetic all processes could do if it were one large product of matrices; they measure that."""
    accelerator = run.accelerator
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(run.config.mixed_precision, torch.float32)
    accelerator.wait_for_everyone()  # they share a machine's cores while they measure, as in training
    peak = torch.tensor(matmul_peak(accelerator.device, dtype), device=accelerator.device)
    return float(accelerator.reduce(peak, reduction="sum")) / (1e9 * gigaflop_per_image)
