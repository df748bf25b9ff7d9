"""Train the encoder of a recipe by another method: `python -m training.compare --config RECIPE --method mae`.

The images, their order, the optimiser, its schedule and the evaluations amid training (`knn_epochs`) are those of
`training.pretrain`. It is made for short runs in one process: there are no checkpoints, and a run that was interrupted
begins anew.
"""

import math
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm.auto import tqdm

from modeling_micl.configuration_micl import height_and_width
from training.batch import Batch
from training.comparison import NAMES, ComparisonConfig, Method, build_method, transform_of
from training.data import TrainingBatches, TrainingOrder, batches
from training.features import Pooling, encoder_features
from training.labels import class_names
from training.log_files import MetricsLog
from training.monitor import provenance
from training.optim import build_optimizer, learning_rate, set_learning_rate
from training.parser import parse_settings
from training.processes import start_accelerator
from training.results import save_model
from training.run import Plan, choose_attention, make_plan
from training.scores import frozen_scores
from training.source import ImageSource, open_evaluation, open_split


class Judge:
    """Judges the frozen features of a method's encoder amid training, [CLS] and the mean of the patches.

    Args:
        config: of the run.
        accelerator: of its one process.
        source: the training images, which vote or are learned from.
    """

    def __init__(self, config: ComparisonConfig, accelerator: Accelerator, source: ImageSource) -> None:
        self.config, self.accelerator = config, accelerator
        asked = config.knn_epochs > 0 and config.knn_images > 0
        evaluation = open_evaluation(config, source) if asked else None
        self.splits = (source, evaluation) if evaluation else None

    def __call__(self, model: Method) -> dict[str, float]:
        """Accuracies as `training.pretrain` logs them; those of the mean have its name at the end."""
        config, accelerator = self.config, self.accelerator
        if self.splits is None:
            return {}
        with torch.random.fork_rng():  # training must go on as if nothing had been
            encoder = model.encoder().to(accelerator.device).eval()
            features = {name: encoder_features(encoder, accelerator, name) for name in get_args(Pooling)}
            size = height_and_width(encoder.config.image_size)
            judging = (config.knn_images, config.num_workers, config.online_probe)
            scores = frozen_scores(accelerator, features, self.splits, size, *judging)
        model.train()
        named = {"knn_accuracy": scores.knn, "probe_accuracy": scores.probe}
        return {
            name if features == "cls" else f"{name}_{features}": value
            for name, values in named.items()
            for features, value in values.items()
        }


def train(
    config: ComparisonConfig, accelerator: Accelerator, source: ImageSource, model: Method, plan: Plan, judge: Judge
) -> float:
    """Train to the end of the plan; returns the seconds that it took, without those of evaluations.

    Raises:
        RuntimeError: if the loss is not finite.
    """
    model.to(accelerator.device).train()
    choose_attention(model.network, accelerator.device)
    if config.torch_compile != "no":
        model.network.compile(mode=config.torch_compile)
    optimizer = build_optimizer(model, config.weight_decay, (config.adam_beta1, config.adam_beta2))
    log = MetricsLog(Path(config.output_dir) / "metrics.jsonl", 0)
    eval_every = config.knn_epochs * plan.forwards_per_epoch
    seconds, start, first = 0.0, time.perf_counter(), 0
    for step, batch in enumerate(training_batches(config, source, plan), 1):
        epoch = (step - 1) / plan.forwards_per_epoch
        rate = learning_rate(epoch, plan.peak_lr, config.warmup_epochs, config.epochs, config.min_lr)
        set_learning_rate(optimizer, rate)
        with accelerator.autocast():
            loss = model(batch.to(accelerator.device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        evaluation_due = bool(eval_every) and step % eval_every == 0
        if step % config.logging_steps == 0 or evaluation_due or step == plan.total_steps:
            value, taken = loss.item(), time.perf_counter() - start  # the device has been waited for
            if not math.isfinite(value):
                raise RuntimeError(f"Step {step}: loss {value}. Try a lower base_lr or a longer warm-up.")
            speed = (step - first) * plan.images_per_step / taken
            log.write({"step": step, "loss": value, "learning_rate": rate, "images_per_second": speed})
            if evaluation_due and (accuracies := judge(model)):
                log.write({"step": step} | accuracies)
            seconds, start, first = seconds + taken, time.perf_counter(), step
    return seconds


def training_batches(config: ComparisonConfig, source: ImageSource, plan: Plan) -> Iterator[Batch]:
    """Those of the whole run, each decoded batch `views_per_decode` times, with a progress bar."""
    order = TrainingOrder(source, plan.forward_images, config.seed, config.shuffle_window)
    transform = transform_of(config, height_and_width(config.model_config().image_size))
    images = batches(TrainingBatches(order, transform, 0, plan.forward_images), config.num_workers)
    used = (batch for batch in images for _ in range(config.views_per_decode))
    yield from tqdm(islice(used, plan.total_steps), total=plan.total_steps, unit="step")


def facts(config: ComparisonConfig, source: ImageSource, plan: Plan, seconds: float) -> dict[str, Any]:
    """How the encoder came about, for its eval.json."""
    seen = plan.total_steps * plan.images_per_step
    return {
        "program": "training.compare",
        "method": NAMES[config.method],
        "protocol": f"pre-training by {NAMES[config.method]}",
        "command": shlex.join(["python", "-m", "training.compare", *sys.argv[1:]]),
        "settings": config.to_dict(),
        "plan": asdict(plan),
        "progress": {"step": plan.total_steps, "forwards": plan.total_steps, "seconds": seconds, "seen": seen},
        "processes": 1,
        "data": {"images": source.num_images, "split": source.split, "fingerprint": source.fingerprint},
        **provenance(),
    }


def main(config: ComparisonConfig) -> None:
    """Train, and write the encoder.

    Raises:
        ValueError: if it is MiCL's own method, or something that only `training.pretrain` does is asked for.
    """
    if config.method == "micl":
        raise ValueError("method='micl' is trained by training.pretrain: use that, or another method.")
    accelerator = start_accelerator(config)
    if accelerator.num_processes > 1 or config.gradient_accumulation_steps > 1 or config.per_device_micro_batch_size:
        raise ValueError("training.compare runs in one process, and a batch in one pass: lower the batch size.")
    if config.decode_on_gpu:
        raise ValueError("decode_on_gpu=True is for training.pretrain alone: leave it out.")
    source = open_split(config, config.split, config.max_images)
    plan = make_plan(config, source.num_images, processes=1)
    set_seed(config.seed)
    num_labels = len(class_names(source)) if config.method == "supervised" else 0
    model = build_method(config, num_labels)
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    seconds = train(config, accelerator, source, model, plan, Judge(config, accelerator, source))
    folder = Path(config.output_dir) / "model"
    save_model(model.encoder(), folder, facts(config, source, plan, seconds))
    print(f"{plan.total_steps} steps of {config.method} in {seconds:.0f} seconds; model: {folder}")  # noqa: T201


if __name__ == "__main__":
    try:
        main(parse_settings(ComparisonConfig, "training.compare"))
    except (ValueError, RuntimeError) as error:
        sys.exit(f"training.compare: {error}")
