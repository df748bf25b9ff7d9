"""Pictures whose class is their colour, a tiny encoder, and runs of the programs that train classifiers on them."""

import io
import json
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification

from modeling_micl import MiclConfig, MiclForPreTraining
from training import finetune, linear_probe
from training.classifier_config import FinetuneConfig, ProbeConfig
from training.log_files import read_metrics
from training.results import save_model


COLOURS = {
    **{"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 60, 220), "yellow": (220, 210, 40)},
    **{"pink": (230, 60, 200), "teal": (30, 200, 200), "grey": (128, 128, 128)},
}
SIZE = 16

# Everything that varies an image, a target or the weights during training
EVERYTHING: dict[str, Any] = {
    **{"crop_min_scale": 0.3, "horizontal_flip": True, "rand_augment": "rand-m9-mstd0.5-inc1", "drop_path_rate": 0.3},
    **{"erasing_probability": 0.5, "mixup_alpha": 0.8, "cutmix_alpha": 1.0, "label_smoothing": 0.1, "ema_decay": 0.9},
}
NOTHING: dict[str, Any] = {
    **{"crop_min_scale": 1.0, "horizontal_flip": False, "rand_augment": "none", "drop_path_rate": 0.0},
    **{"erasing_probability": 0.0, "mixup_alpha": 0.0, "cutmix_alpha": 0.0, "label_smoothing": 0.0},
}
SMALL: dict[str, Any] = {
    **{"per_device_batch_size": 8, "epochs": 4, "warmup_epochs": 1, "mixed_precision": "no", "num_workers": 0},
    **{"logging_steps": 1, "report_to": "none", "eval_epochs": 0},
}


def coloured(labels: Sequence[int], seed: int = 0) -> list[Image.Image]:
    """A noisy picture for each label."""
    rng, colours = np.random.default_rng(seed), np.array(list(COLOURS.values()))
    noise = rng.normal(0, 25, (len(labels), SIZE, SIZE, 3))
    pixels = (colours[list(labels)][:, None, None] + noise).clip(0, 255).astype(np.uint8)
    return [Image.fromarray(each) for each in pixels]


def png(image: Image.Image) -> bytes:
    """An image file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def true_labels(length: int, classes: int, wrong: int = 0) -> list[int]:
    """The classes take turns, but so many images at the beginning have the label of the next class."""
    return [(number + (number < wrong)) % classes for number in range(length)]


def write_colours(
    folder: Path,
    split: str,
    length: int,
    classes: int = 4,
    wrong: int = 0,
    labels: list[Any] | None = None,
    kind: Any = None,
) -> Path:
    """Write a split of coloured PNG images as Parquet, in the Hub's layout.

    Args:
        folder: of the dataset.
        split: its name.
        length: images.
        classes: how many of `COLOURS`.
        wrong: images with a label that is not their colour, see `true_labels`.
        labels: instead of those.
        kind: of the labels; unset, a ClassLabel with the colours' names.
    """
    images = coloured(true_labels(length, classes), seed=length)
    columns = {
        "image": [{"bytes": png(image), "path": None} for image in images],
        "label": true_labels(length, classes, wrong) if labels is None else labels,
    }
    features = {"image": datasets.Image(), "label": kind or datasets.ClassLabel(names=list(COLOURS)[:classes])}
    file = folder / "data" / f"{split}-00000-of-00001.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(file)
    return folder


def save_encoder(folder: Path, **overrides: Any) -> MiclForPreTraining:
    """Write a tiny model as pre-training does, with weights that differ from their initial values."""
    torch.manual_seed(5)
    config = {
        **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
        **{"image_size": SIZE, "patch_size": 4, "mask_ratio": 0.5},
    }
    model = MiclForPreTraining(MiclConfig(**(config | overrides))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    save_model(model, folder)
    return model


@contextmanager
def as_a_new_process(cache: Path) -> Iterator[None]:
    """Forget what accelerate keeps in globals, and give back Ctrl-C, which a run takes over; data is cached here."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        try:
            yield
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
            for number, handler in handlers.items():
                signal.signal(number, handler)


def places(folder: Path) -> dict[str, str]:
    """Settings of a run in `folder/run` on `folder/data` that begins with `folder/encoder`."""
    return {"dataset": str(folder / "data"), "model": str(folder / "encoder"), "output_dir": str(folder / "run")}


def run_finetuning(folder: Path, **overrides: Any) -> Path:
    """Fine-tune in this process, as if it were a new one; nothing is varied unless the keywords say so."""
    config = FinetuneConfig(**(places(folder) | SMALL | NOTHING | {"base_lr": 0.05} | overrides))
    config.validate()
    with as_a_new_process(folder / "cache"):
        finetune.main(config)
    return Path(config.output_dir)


def run_probe(folder: Path, **overrides: Any) -> Path:
    """Fit or train a linear probe in this process, as if it were a new one."""
    config = ProbeConfig(**(places(folder) | SMALL | {"few_shot": []} | overrides))
    config.validate()
    with as_a_new_process(folder / "cache"):
        linear_probe.main(config)
    return Path(config.output_dir)


def course(run: Path) -> list[tuple[float, ...]]:
    """What training went through, exactly."""
    names = ("step", "epoch", "loss", "learning_rate", "grad_norm")
    return [tuple(entry[name] for name in names) for entry in read_metrics(run / "metrics.jsonl") if "loss" in entry]


def losses(run: Path) -> list[float]:
    """The loss of every step."""
    return [loss for _, _, loss, *_ in course(run)]


def logged_accuracies(run: Path) -> list[float]:
    """Top-1 accuracies of all evaluations."""
    entries = read_metrics(run / "metrics.jsonl")
    return [entry["top1_accuracy"] for entry in entries if "top1_accuracy" in entry]


def results(folder: Path) -> list[dict[str, Any]]:
    """The entries of a model folder's eval.json."""
    entries: list[dict[str, Any]] = json.loads((folder / "eval.json").read_text())["results"]
    return entries


@torch.no_grad()
def logits_of(folder: Path, images: Sequence[Image.Image], state: dict[str, Tensor] | None = None) -> Tensor:
    """What a stored classifier, perhaps with other weights, says about images, with its own image processor."""
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    model.load_state_dict(state or model.state_dict())
    logits: Tensor = model(**AutoImageProcessor.from_pretrained(folder)(list(images), return_tensors="pt")).logits
    return logits


def weights(folder: Path) -> dict[str, Tensor]:
    """The weights in a model's or a checkpoint's folder."""
    return load_file(folder / "model.safetensors")


def same(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    """Whether two sets of weights are equal bit for bit."""
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in some)
