"""Pre-train a MiCL encoder: `accelerate launch -m training.pretrain --config training/recipes/photos.yaml`."""

import math
import os
import sys
from collections.abc import Callable, Iterator

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import set_seed
from torch import Tensor

from modeling_micl import MiclForPreTraining, MiclForPreTrainingOutput
from modeling_micl.configuration_micl import height_and_width
from training.card import write_card
from training.config import PretrainConfig, parse_pretrain_config
from training.data import Batch, TrainingBatches, TrainingOrder, batches
from training.features import encoder_features, normalize_pixels
from training.figures import save_curves
from training.images import random_resized_crop
from training.log import Logger, read_metrics
from training.optim import build_optimizer, set_learning_rate
from training.results import (
    TRAINED,
    final_scores,
    knn_results,
    knn_scores,
    save_figures,
    save_model,
    table,
    write_results,
)
from training.run import Run, StopRequest, make_plan, resume_run, save_run, summary
from training.source import ImageSource, available_splits, open_source


def view_noise(seed: int, forward: int, images: int, num_patches: int, device: torch.device) -> Tensor:
    """Masking noise (images, L) of a whole global batch, a function of the seed and the number of the forward pass.

    Every process draws all of it and takes the rows of its own places, so that the views of an image do not depend on
    how many processes there are; it is a few bytes for each image.
    """
    generator = torch.Generator(device)
    generator.manual_seed(int(np.random.SeedSequence((seed, forward)).generate_state(1, np.uint64)[0]))
    return torch.rand(images, num_patches, generator=generator, device=device)


def process_batches(run: Run) -> Iterator[Batch]:
    """This process's part of every global batch, from where the run stands, without end."""
    config = run.config
    order = TrainingOrder(run.source, run.plan.forward_images, config.seed, config.shuffle_window)
    size = height_and_width(run.unwrapped().config.image_size)
    transform = random_resized_crop(size, config.crop_min_scale, config.horizontal_flip)
    places = TrainingBatches(order, transform, run.first_place, run.last_place, run.progress.forwards)
    return batches(places, min(config.num_workers, config.per_device_batch_size))


def forward_backward(run: Run, batch: Batch, with_norm: bool) -> tuple[MiclForPreTrainingOutput, Tensor | None]:
    """One forward and backward pass, and the optimiser's step when it is due; the gradient's norm if asked for."""
    config, accelerator, progress = run.config, run.accelerator, run.progress
    pixels = normalize_pixels(batch.to(accelerator.device).pixels)
    num_patches = run.unwrapped().config.num_patches
    noise = view_noise(config.seed, progress.forwards, run.plan.forward_images, num_patches, pixels.device)
    grad_norm = None
    with accelerator.accumulate(run.model):
        output: MiclForPreTrainingOutput = run.model(pixels, noise=noise[run.first_place : run.last_place])
        accelerator.backward(output.loss)
        if accelerator.sync_gradients and (config.max_grad_norm or with_norm):
            grad_norm = accelerator.clip_grad_norm_(run.model.parameters(), config.max_grad_norm or math.inf)
        set_learning_rate(run.optimizer, run.learning_rate())
        run.optimizer.step()
        run.optimizer.zero_grad()
    progress.forwards += 1
    return output, grad_norm


def train(run: Run, log: Logger, stop: StopRequest, evaluate: Callable[[], dict[str, float]]) -> bool:
    """The training loop; returns whether it went to the end, rather than being asked to stop."""
    config, accelerator, progress, total_steps = run.config, run.accelerator, run.progress, run.plan.total_steps
    knn_every = config.knn_epochs * run.plan.forwards_per_epoch // config.gradient_accumulation_steps
    if knn_every and progress.step == 0:
        log.write_evaluation(evaluate)
    run.model.train()
    for batch in process_batches(run) if progress.step < total_steps else ():
        step = progress.step + 1  # the one that this pass belongs to
        save_due = (
            step % config.save_steps == 0 or step == total_steps or (stop.came and accelerator.num_processes == 1)
        )
        log_due = step % config.logging_steps == 0 or save_due
        output, grad_norm = forward_backward(run, batch, with_norm=log_due)
        log.add(batch, output)
        if not accelerator.sync_gradients:
            continue
        progress.step = step
        stopping = log.write(output, grad_norm) if log_due else False
        if save_due or stopping:
            save_run(run)
        if stopping:
            return False
        if knn_every and step % knn_every == 0 and step < total_steps:
            log.write_evaluation(evaluate)
            run.model.train()
        if step == total_steps:
            break
    return True


def open_sources(config: PretrainConfig) -> tuple[ImageSource, ImageSource | None]:
    """The training images and, if there is a labelled split for it, those that kNN classifies."""
    where = (config.dataset_config, config.streaming, config.image_column, config.label_column)
    train_source = open_source(config.dataset, config.split, *where, max_images=config.max_images)
    splits = available_splits(config.dataset, config.dataset_config)
    eval_split = config.eval_split or next((name for name in ("validation", "test") if name in splits), None)
    if config.knn_images == 0 or train_source.label_column is None or eval_split is None:
        return train_source, None
    return train_source, open_source(config.dataset, eval_split, *where)


def untrained_model(config: PretrainConfig) -> MiclForPreTraining:
    """The model as the run starts with it; the same every time."""
    set_seed(config.seed)
    return MiclForPreTraining(config.model_config())


def start_accelerator(config: PretrainConfig) -> Accelerator:
    """Processes, precision and trackers.

    Raises:
        ValueError: if a tracker is not installed, or fp16 is asked for without a GPU; accelerate itself would pass
            over both in silence.
    """
    missing = set(config.trackers()) - {str(tracker) for tracker in get_available_trackers()}
    if missing:
        raise ValueError(
            f"report_to={config.report_to!r}: {sorted(missing)} not installed (or unknown to accelerate)."
        )
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=config.trackers() or None,
        project_dir=config.output_dir,
    )
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("mixed_precision='fp16' needs a GPU, for its loss scaling: use 'bf16' or 'no' on the CPU.")
    if accelerator.device.type == "cpu" and torch.get_num_threads() == 1:
        # Launchers leave a process one thread, however many cores there are.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // accelerator.num_processes))
    return accelerator


def start_run(config: PretrainConfig, accelerator: Accelerator, source: ImageSource) -> Run:
    """Build the model and the optimiser, or restore them from the newest checkpoint."""
    plan = make_plan(config, source.num_images, accelerator.num_processes)
    model = untrained_model(config)
    if accelerator.device.type == "cpu":
        model.set_attn_implementation("eager")  # on short sequences the fused kernel's backward pass is slower
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable()
    optimizer = build_optimizer(model, config.weight_decay, (config.adam_beta1, config.adam_beta2))
    run = Run(config, accelerator, source, plan, *accelerator.prepare(model, optimizer))
    resume_run(run)
    accelerator.print(summary(run))
    settings = {key: str(value) for key, value in config.to_dict().items()}  # TensorBoard takes no lists and no None
    accelerator.init_trackers("pretrain", settings)
    return run


def finish(run: Run, log: Logger, eval_source: ImageSource | None) -> None:
    """Write the portable model, evaluate it, write its eval.json and the figures, and print the table."""
    config, accelerator = run.config, run.accelerator
    untrained, trained = untrained_model(config).to(accelerator.device), run.unwrapped()
    if accelerator.is_main_process:
        save_model(trained, run.folder / "model")
        save_figures(run.folder, untrained, trained, eval_source or run.source)
    if eval_source:
        splits = (run.source, eval_source)
        scores = final_scores(accelerator, untrained, trained, splits, config.knn_images, config.num_workers)
        log.write_evaluation(lambda: {"knn_accuracy": scores.accuracies[TRAINED]} if scores.accuracies else {})
        if accelerator.is_main_process:
            write_results(run.folder / "model", knn_results(scores, config.dataset, splits, config.seed))
        accelerator.print(table(scores))
    if accelerator.is_main_process:
        write_card(run, run.folder / "model")
        save_curves(run.folder / "figures" / "curves.png", read_metrics(run.folder / "metrics.jsonl"))
    accelerator.print(f"model: {run.folder / 'model'}, figures: {run.folder / 'figures'}")
    accelerator.end_training()


def main(config: PretrainConfig) -> None:
    """One run from its settings to its model."""
    accelerator = start_accelerator(config)
    with accelerator.main_process_first():  # the others find what the first has prepared
        source, eval_source = open_sources(config)
    run = start_run(config, accelerator, source)
    stop = StopRequest()
    log = Logger(run, stop)

    def evaluate() -> dict[str, float]:
        if eval_source is None:
            return {}
        extractor = {"knn_accuracy": encoder_features(run.unwrapped().vit.eval(), accelerator)}
        size = height_and_width(run.unwrapped().config.image_size)
        splits = (source, eval_source)
        return knn_scores(accelerator, extractor, splits, size, config.knn_images, config.num_workers).accuracies

    try:
        completed = train(run, log, stop, evaluate)
    finally:
        log.bar.close()
    if completed:
        finish(run, log, eval_source)
    else:
        accelerator.print(f"Stopped at step {run.progress.step}, all saved: the same command continues from there.")
        accelerator.end_training()


if __name__ == "__main__":
    try:
        main(parse_pretrain_config())
    except (ValueError, RuntimeError) as error:
        sys.exit(f"training.pretrain: {error}")
