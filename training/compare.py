"""Train the encoder of a recipe by another method: `python -m training.compare --config RECIPE --method mae`.

The images, their order, the optimiser and its schedule are those of `training.pretrain`. It is made for short runs in
one process: there are no checkpoints, and a run that was interrupted begins anew.
"""

import json
import shlex
import sys
import time
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm.auto import tqdm

from modeling_micl.configuration_micl import height_and_width
from training.comparison import ComparisonConfig, Method, build_method, transform_of
from training.data import TrainingBatches, TrainingOrder, batches
from training.labels import class_names
from training.monitor import provenance
from training.optim import build_optimizer, learning_rate, set_learning_rate
from training.parser import parse_settings
from training.processes import start_accelerator
from training.results import save_model
from training.run import Plan, make_plan
from training.source import ImageSource, open_split


def train(config: ComparisonConfig, accelerator: Accelerator, source: ImageSource, model: Method, plan: Plan) -> float:
    """Train to the end of the plan; returns the seconds that it took."""
    model.to(accelerator.device).train()
    optimizer = build_optimizer(model, config.weight_decay, (config.adam_beta1, config.adam_beta2))
    order = TrainingOrder(source, plan.forward_images, config.seed, config.shuffle_window)
    transform = transform_of(config, height_and_width(config.model_config().image_size))
    images = batches(TrainingBatches(order, transform, 0, plan.forward_images), config.num_workers)
    metrics = (Path(config.output_dir) / "metrics.jsonl").open("w")
    start = time.perf_counter()
    for step, batch in enumerate(tqdm(islice(images, plan.total_steps), total=plan.total_steps, unit="step")):
        with accelerator.autocast():
            loss = model(batch.to(accelerator.device))
        if not loss.isfinite():
            raise RuntimeError(f"Step {step + 1}: loss {loss.item()}. Try a lower base_lr or a longer warm-up.")
        loss.backward()
        epoch = step / plan.forwards_per_epoch
        rate = learning_rate(epoch, plan.peak_lr, config.warmup_epochs, config.epochs, config.min_lr)
        set_learning_rate(optimizer, rate)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % config.logging_steps == 0 or step + 1 == plan.total_steps:
            metrics.write(json.dumps({"step": step + 1, "loss": loss.item(), "learning_rate": rate}) + "\n")
    metrics.close()
    return time.perf_counter() - start


def facts(config: ComparisonConfig, source: ImageSource, plan: Plan, seconds: float) -> dict[str, Any]:
    """How the encoder came about, for its eval.json."""
    seen = plan.total_steps * plan.images_per_step
    return {
        "program": "training.compare",
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
    seconds = train(config, accelerator, source, model, plan)
    folder = Path(config.output_dir) / "model"
    save_model(model.encoder(), folder, facts(config, source, plan, seconds))
    print(f"{plan.total_steps} steps of {config.method} in {seconds:.0f} seconds; model: {folder}")  # noqa: T201


if __name__ == "__main__":
    try:
        main(parse_settings(ComparisonConfig, "training.compare"))
    except (ValueError, RuntimeError) as error:
        sys.exit(f"training.compare: {error}")
