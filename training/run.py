"""A training run: what follows from its settings, how far it is, and how it is saved and resumed."""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import PreTrainedModel

from modeling_micl import MiclForImageClassification, MiclForPreTraining
from training.checkpoint import (
    CheckpointWriter,
    DiskFull,
    find_defect,
    load_checkpoint,
    newest_checkpoint,
    read_state,
    set_aside_later,
)
from training.config import TrainingSettings
from training.disk import put_back
from training.optim import learning_rate, scaled_learning_rate
from training.source import ImageSource
from training.tensors import whole_tensors


Model = MiclForPreTraining | MiclForImageClassification


@dataclass
class Plan:
    """What follows from the recipe, the data and the hardware."""

    forward_images: int  # images of one batch over all processes
    images_per_process: int  # its share of a batch
    images_per_pass: int  # of one process, through the model at once; fewer than its share with the cached loss
    contrasted_images: int  # the pool of negatives; 1 without a contrastive loss
    images_per_step: int  # images per optimiser step
    forwards_per_epoch: int
    total_steps: int  # optimiser steps of this run
    peak_lr: float


def make_plan(config: TrainingSettings, num_images: int, processes: int) -> Plan:
    """Derive the batch sizes, steps and learning rate.

    Raises:
        ValueError: if the batch cannot be shared out to the processes, or the data do not fill one batch or one
            optimiser step.
    """
    contrasted_images, share = config.contrasted_images(processes), config.images_per_process(processes)
    forward_images = share * processes
    if num_images < forward_images:
        name = config.batch_size_name()
        most = num_images // processes * (getattr(config, name) // share)
        raise ValueError(
            f"The {num_images} images do not fill one batch of {share} on {processes} processes: "
            f"lower {name} to at most {most}."
        )
    forwards_per_epoch = num_images // forward_images
    images_per_step = forward_images * config.gradient_accumulation_steps
    forwards = round(config.epochs * forwards_per_epoch)
    total_steps = forwards // config.gradient_accumulation_steps
    if total_steps < 1:
        raise ValueError(
            f"gradient_accumulation_steps={config.gradient_accumulation_steps} are more than the "
            f"{forwards} forward passes of all epochs: lower it, or train for more epochs."
        )
    return Plan(
        forward_images=forward_images,
        images_per_process=share,
        images_per_pass=config.images_per_pass(processes),
        contrasted_images=contrasted_images,
        images_per_step=images_per_step,
        forwards_per_epoch=forwards_per_epoch,
        total_steps=min(total_steps, config.max_steps or total_steps),
        peak_lr=scaled_learning_rate(config.base_lr, images_per_step),
    )


def summary(run: "Run", about_the_model: dict[str, str]) -> str:
    """What the run is going to do, with everything that follows from its settings."""
    config, plan, processes = run.config, run.plan, run.accelerator.num_processes
    left_out = run.source.num_images % plan.forward_images
    passes = f", in passes of {plan.images_per_pass} (cached loss)"
    cached = plan.images_per_pass < plan.images_per_process
    lines = {
        "data": f"{config.dataset}, {run.source.num_images:,} images in {len(run.source.lengths)} shards"
        + (f"; the last {left_out} of each epoch's order are left out" if left_out else ""),
        **about_the_model,
        "images per process": f"{plan.images_per_process}, on {processes} processes" + (passes if cached else ""),
        "images per optimiser step": f"{plan.images_per_step} = {config.gradient_accumulation_steps} × "
        f"{plan.forward_images}",
        "learning rate": f"{plan.peak_lr:.3g} at its peak = {config.base_lr:g} × {plan.images_per_step} / 256",
        "steps": f"{plan.total_steps:,}, {plan.forwards_per_epoch / config.gradient_accumulation_steps:g} per epoch; "
        f"schedule over {config.epochs:g} epochs, {config.warmup_epochs:g} of them warm-up",
    }
    return "\n".join(f"{name:<26} {text}" for name, text in lines.items())


@dataclass
class Progress:
    """What a checkpoint must remember beside the weights and the optimiser."""

    step: int = 0
    forwards: int = 0
    seconds: float = 0.0
    seen: int = 0
    broken: int = 0
    skipped: int = 0


def choose_attention(model: PreTrainedModel, device: torch.device) -> None:
    """Explicit on the CPU, as the fused kernel is slower there on short sequences in bf16."""
    if device.type == "cpu":
        model.set_attn_implementation("eager")


@dataclass
class Run:
    """Everything that the loop works with."""

    config: TrainingSettings
    accelerator: Accelerator
    source: ImageSource
    plan: Plan
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    averaged: AveragedModel | None = None
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        keep, keep_every = self.config.save_total_limit, self.config.keep_every_steps
        self.writer = CheckpointWriter(self.folder / "checkpoints", keep, keep_every)

    @classmethod
    def start(
        cls,
        config: TrainingSettings,
        accelerator: Accelerator,
        source: ImageSource,
        model: Model,
        optimizer: torch.optim.Optimizer,
        ema_decay: float | None = None,
    ) -> "Run":
        """Put the model to work, and go on from the newest checkpoint if there is one.

        Args:
            config: the run's settings.
            accelerator: its processes.
            source: the training images.
            model: as training begins with it.
            optimizer: of its parameters.
            ema_decay: also keep a moving average of the weights with this decay.

        Raises:
            ValueError: if the data do not fill a batch, or the checkpoint is of a run with other settings.
        """
        plan = make_plan(config, source.num_images, accelerator.num_processes)
        choose_attention(model, accelerator.device)
        if config.gradient_checkpointing:
            model.activation_checkpointing_enable()
        if config.torch_compile != "no":
            model.compile(mode=config.torch_compile)
        run = cls(config, accelerator, source, plan, *accelerator.prepare(model, optimizer))
        if ema_decay is not None:
            if accelerator.is_fsdp2:
                raise ValueError(f"ema_decay={ema_decay} does not work with FSDP: leave it out.")
            run.averaged = AveragedModel(run.unwrapped(), multi_avg_fn=get_ema_multi_avg_fn(ema_decay))
        resume_run(run)
        settings = {key: str(value) for key, value in config.to_dict().items()}  # TensorBoard takes no lists, no None
        accelerator.init_trackers("micl", settings)
        return run

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.config.output_dir)

    @property
    def first_place(self) -> int:
        """This process's first place in the global batch."""
        return int(self.accelerator.process_index) * self.plan.images_per_process

    @property
    def last_place(self) -> int:
        """The place behind this process's last."""
        return self.first_place + self.plan.images_per_process

    @property
    def skips_bad_steps(self) -> bool:
        """Whether a gradient that is not finite leaves weights and optimiser alone.

        Fused AdamW does so without the host; fp16's loss scaler has its own way.
        """
        fused = bool(self.optimizer.defaults.get("fused"))
        return self.config.max_bad_steps > 0 and fused and self.accelerator.scaler is None

    def learning_rate(self) -> float:
        """The rate of the optimiser step that the next forward pass belongs to."""
        started = self.progress.forwards - self.progress.forwards % self.config.gradient_accumulation_steps
        epoch = started / self.plan.forwards_per_epoch
        config = self.config
        return learning_rate(epoch, self.plan.peak_lr, config.warmup_epochs, config.epochs, config.min_lr)

    def whole_model(self) -> Model:
        """The model with all its weights on this process, a copy if FSDP shards it; all processes call it."""
        model = self.unwrapped()
        if not self.accelerator.is_fsdp2:
            return model
        kind = MiclForPreTraining if isinstance(model, MiclForPreTraining) else MiclForImageClassification
        copy = kind(model.config)
        copy.load_state_dict(dict(whole_tensors(model.state_dict())))
        copy.to(self.accelerator.device)
        return copy

    def unwrapped(self) -> Model:
        """The model without what accelerate put around it; with FSDP it holds a part of its weights."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        assert isinstance(model, Model)
        return model


def save_run(run: Run, stopping: bool = False, at_once: bool = False) -> bool:
    """Write a resumable checkpoint; with `async_checkpoints` while training goes on, if it does.

    Args:
        run: what to save.
        stopping: whether the run ends before its last step, and all depends on this checkpoint.
        at_once: whether to wait for it.

    Returns:
        Whether it is there now.

    Raises:
        NotSaved: on all processes, if this one or the one before could not be written; not for a full disk where the
            run is to go on.
    """
    state = {
        "progress": asdict(run.progress),
        "config": run.config.to_dict(),
        "data": run.source.fingerprint,
        "forward_images": run.plan.forward_images,
        "contrasted_images": run.plan.contrasted_images,
    }
    going_on = not stopping and run.progress.step < run.plan.total_steps
    in_background = run.config.async_checkpoints and going_on and not at_once
    _finish_saving(run)
    run.writer.begin(run, run.progress.step, state, copy=in_background)
    return not in_background and _finish_saving(run, stopping)


def _finish_saving(run: Run, stopping: bool = False) -> bool:
    try:
        run.writer.finish()
    except DiskFull as error:
        if stopping or run.config.on_full_disk == "stop":
            raise
        run.accelerator.print(f"WARNING: {error} The run goes on without.", file=sys.stderr)
        return False
    return True


def resume_run(run: Run) -> None:
    """Continue where `config.resume` says.

    Raises:
        ValueError: if that run had other settings, naming the keys that differ.
    """
    folder = run.folder / "checkpoints"
    checkpoint: Path | None = None
    if run.config.resume == "auto":
        checkpoint, refused = newest_checkpoint(folder)
        for reason in refused:
            run.accelerator.print(f"not resuming from {reason}")
    elif run.config.resume != "none":
        checkpoint = Path(run.config.resume)
        if defect := find_defect(checkpoint):
            raise ValueError(f"--resume {checkpoint}: {defect}")
    if checkpoint is not None:
        _restore(run, checkpoint)
    run.accelerator.wait_for_everyone()
    if run.accelerator.is_main_process:
        put_back(run.folder / "model")
        if kept := set_aside_later(folder, run.progress.step):
            run.accelerator.print(f"later checkpoints, of an earlier run or damaged, are kept in {kept}")
    run.accelerator.wait_for_everyone()


def _restore(run: Run, checkpoint: Path) -> None:
    state = read_state(checkpoint)
    now: dict[str, Any] = {
        **run.config.to_dict(),
        "data": run.source.fingerprint,
        "forward_images": run.plan.forward_images,
        "contrasted_images": run.plan.contrasted_images,
    }
    # A setting that came after the checkpoint had its default's effect then.
    then = type(run.config)().to_dict() | state["config"]
    then |= {key: state.get(key) for key in ("data", "forward_images", "contrasted_images")}
    differing = [k for k in now if k not in run.config.CHANGEABLE and now[k] != then.get(k)]
    if differing:
        changes = ", ".join(f"{key}: {then.get(key)!r} → {now[key]!r}" for key in differing)
        raise ValueError(
            f"{checkpoint} was trained with other settings ({changes}). Go back to them"
            f"{' and as many processes' if 'forward_images' in differing else ''}, or start anew with another "
            "--output_dir or --resume none."
        )
    load_checkpoint(run, checkpoint)
    run.progress = Progress(**state["progress"])
    run.accelerator.print(f"resuming from {checkpoint}")
