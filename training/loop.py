"""The training loop, the same for pre-training, fine-tuning and the published linear probe."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import islice

from torch import Tensor
from torch.nn.utils import get_total_norm
from transformers.modeling_outputs import ModelOutput

from modeling_micl.configuration_micl import height_and_width
from training.agreement import Agreement
from training.batch import Batch
from training.data import TrainingBatches, TrainingOrder, batches
from training.device_decoding import decode_on_device
from training.encoded import EncodedBatches
from training.images import Transform
from training.log import Logger
from training.optim import set_learning_rate
from training.run import Run, save_run
from training.stop import StopRequest, mark_started, mark_stopped
from training.stream import StreamError
from training.tensors import whole_tensors


class Task(ABC):
    """What a run does with a batch.

    Args:
        run: the run.
        eval_epochs: epochs between evaluations; 0 for none.
        uses: forward passes in a row that each decoded batch is for. An epoch has as many passes as before, so that
            it decodes this part of the images, and each of them counts in it so many times.
        decode_on_device: have JPEGs decoded by the device; `transform` must be a `CropAndFlip` then.
    """

    def __init__(self, run: Run, eval_epochs: int, uses: int = 1, decode_on_device: bool = False) -> None:
        self.run, self.eval_epochs, self.uses, self.decode_on_device = run, eval_epochs, uses, decode_on_device

    @abstractmethod
    def transform(self, size: tuple[int, int]) -> Transform:
        """The random crop to (height, width) pixels."""

    @abstractmethod
    def forward(self, batch: Batch) -> ModelOutput:
        """The model's output, with its loss, on this process's part of a global batch; the CPU may still hold that."""

    def forward_backward(self, batch: Batch) -> ModelOutput:
        """As `forward`, and add the loss's gradient to the parameters."""
        output = self.forward(batch)
        self.run.accelerator.backward(output.loss)
        return output

    def metrics(self, output: ModelOutput) -> dict[str, Tensor]:
        """What to log of a batch beside the loss."""
        return {}

    def evaluate(self) -> dict[str, float]:
        """Results to log, the same on every process."""
        return {}

    def after_checkpoint(self) -> None:  # noqa: B027 (most tasks have nothing to do)
        """What else to do on every process when a checkpoint has been written and training goes on."""


def process_batches(run: Run, task: Task, timed: Callable[[Iterator[Batch]], Iterator[Batch]]) -> Iterator[Batch]:
    """This process's part of every global batch, from where the run stands, without end.

    Args:
        run: the run.
        task: what the batches are for.
        timed: passes on what comes from the workers, and takes the time; the device's own decoding is no waiting.
    """
    config, device = run.config, run.accelerator.device
    order = TrainingOrder(run.source, run.plan.forward_images, config.seed, config.shuffle_window)
    size = height_and_width(run.unwrapped().config.image_size)
    number, used = divmod(run.progress.forwards, task.uses)
    kind = EncodedBatches if task.decode_on_device else TrainingBatches
    places = kind(order, task.transform(size), run.first_place, run.last_place, number)
    decoded = timed(batches(places, config.num_workers))
    if task.decode_on_device:
        decoded = (decode_on_device(batch, size, device, run.source) for batch in decoded)
    return islice((batch for batch in decoded for _ in range(task.uses)), used, None)


def keep_before_failing(run: Run, log: Logger, agreement: Agreement, batches: Iterator[Batch]) -> Iterator[Batch]:
    """The batches; if their stream fails, the steps since the last checkpoint are logged and saved first.

    Not with several processes: the others are in the next step already and would not join.
    """
    first_step = run.progress.step
    try:
        yield from batches
    except StreamError:
        accelerator = run.accelerator
        if accelerator.num_processes == 1 and accelerator.sync_gradients and run.progress.step > first_step:
            log.follow(agreement.read())
            if log.images:
                log.write({}, None)
            save_run(run, stopping=True)
        raise


def gradient_norm(run: Run) -> Tensor:
    """The norm of the averaged gradient, the same on all processes, before it is clipped if that is asked for."""
    parameters, most = list(run.model.parameters()), run.config.max_grad_norm
    if most or run.accelerator.scaler is not None:  # which is to be divided out first
        norm = run.accelerator.clip_grad_norm_(parameters, most or math.inf)
    else:
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    return dict(whole_tensors({"norm": norm}))["norm"]  # FSDP gives each process a part


def learn(run: Run, task: Task, batch: Batch, with_norm: bool) -> tuple[ModelOutput, Tensor | None]:
    """Pass a batch forward and backward, and step when it is due; the gradient's norm if it is needed."""
    config, accelerator = run.config, run.accelerator
    grad_norm = None
    with accelerator.accumulate(run.model):
        output = task.forward_backward(batch)
        if accelerator.sync_gradients and (config.max_grad_norm or with_norm or run.skips_bad_steps):
            grad_norm = gradient_norm(run)
        if grad_norm is not None and run.skips_bad_steps:
            # Fused AdamW reads this on the device and does nothing where it is 1, as for a gradient scaler.
            run.optimizer.optimizer.found_inf = (~grad_norm.isfinite()).float()  # type: ignore[attr-defined]
        set_learning_rate(run.optimizer, run.learning_rate())
        run.optimizer.step()
        run.optimizer.zero_grad()
    if accelerator.sync_gradients and run.averaged is not None:
        run.averaged.update_parameters(run.unwrapped())
    run.progress.forwards += 1
    return output, grad_norm


def evaluate(run: Run, task: Task, log: Logger, stop: StopRequest, saved: bool) -> None:
    """Evaluate amid training; if all is saved, a request to stop is answered at once, and this is done again later."""
    with stop.ending_at_once(run) if saved else nullcontext():
        log.write_evaluation(task.evaluate)
    run.model.train()


def train(run: Run, task: Task, log: Logger, stop: StopRequest) -> bool:
    """Train to the end of the plan; returns False if the run was asked to stop before, and is saved."""
    mark_started(run)
    config, accelerator, progress, total_steps = run.config, run.accelerator, run.progress, run.plan.total_steps
    forwards = task.eval_epochs * run.plan.forwards_per_epoch
    eval_every = max(forwards // config.gradient_accumulation_steps, 1) if forwards else 0  # optimiser steps
    run.model.train()
    if eval_every and progress.step % eval_every == 0 and progress.step < total_steps and not log.evaluated():
        evaluate(run, task, log, stop, saved=True)
    agreement = Agreement(accelerator)
    batches_left = process_batches(run, task, log.timed) if progress.step < total_steps else iter(())
    for batch in keep_before_failing(run, log, agreement, batches_left):
        step = progress.step + 1  # the one that this pass belongs to
        evaluation_due = bool(eval_every) and step % eval_every == 0 and step < total_steps
        save_due = step % config.save_steps == 0 or evaluation_due or step == total_steps
        log_due = step % config.logging_steps == 0 or save_due
        output, grad_norm = learn(run, task, batch, with_norm=log_due)
        log.add(batch, output.loss)
        if not accelerator.sync_gradients:
            continue
        progress.step = step
        bad = ~grad_norm.isfinite() if grad_norm is not None and run.skips_bad_steps else None
        stopping = log.follow(agreement.tell(step, stop.came, bad, at_once=log_due))
        if log_due or stopping:
            log.write(task.metrics(output), grad_norm)
        saved = (save_due or stopping) and save_run(run, stopping, at_once=evaluation_due)
        if stopping:
            mark_stopped(run)
            accelerator.wait_for_everyone()  # the launcher ends the others as soon as one has ended
            return False
        if save_due and step < total_steps:
            task.after_checkpoint()
        if evaluation_due:
            evaluate(run, task, log, stop, saved)
        if step == total_steps:
            break
    stop.end_at_once(run)
    return True
