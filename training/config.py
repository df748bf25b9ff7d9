"""Settings of a pre-training run: a YAML recipe and one flag per field, checked before anything is loaded."""

import difflib
import sys
from argparse import SUPPRESS
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn

import yaml
from transformers.hf_argparser import HfArgumentParser, string_to_bool

from modeling_micl import MiclConfig


def _field(default: Any, text: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class PretrainConfig:
    """One pre-training run. The defaults are those of the authors' released program where it has one."""

    # Data
    dataset: str = _field("ILSVRC/imagenet-1k", "Hub id, local folder or file, or 'photos' for the demonstration data")
    dataset_config: str | None = _field(None, "configuration of a Hub dataset that has several")
    split: str = _field("train", "split to train on")
    eval_split: str | None = _field(None, "split for kNN; unset, 'validation' or 'test' if there is one")
    streaming: bool | None = _field(None, "read while training; unset, everything but folders of images streams")
    image_column: str | None = _field(None, "unset, the only image column")
    label_column: str | None = _field(None, "labels for kNN only; unset, the only class label column if there is one")
    max_images: int | None = _field(None, "use only the first so many images of the split")
    crop_min_scale: float = _field(0.2, "smallest share of the image in a random crop, in (0, 1]; 1 does not crop")
    horizontal_flip: bool = _field(True, "mirror every other crop")
    shuffle_window: int = _field(256, "images that each of the up to 64 readers of a stream holds to shuffle them")
    max_bad_fraction: float = _field(0.1, "stop when more than this share of the images is broken, in [0, 1]")
    num_workers: int = _field(4, "decoding processes for each training process; 0 decodes in the training process")

    # Model
    image_size: list[int] = _field([224], "pixels of the crops: one number, or height and width")
    patch_size: list[int] = _field([16], "pixels of a patch: one number, or height and width")
    hidden_size: int = _field(768, "width of the encoder")
    num_hidden_layers: int = _field(12, "depth of the encoder")
    num_attention_heads: int = _field(12, "attention heads of each layer")
    gradient_checkpointing: bool = _field(False, "save memory: recompute each layer in the backward pass")

    # Objective
    mask_ratio: float = _field(0.9, "share of the patches that no view sees, in [0, 1)")
    num_views: int = _field(2, "disjoint views of each image, at least 2")
    temperature: float = _field(0.07, "divides the similarities, > 0")
    kappa: float = _field(1 / 64, "concentration of the T-SP similarity, > -1/2")
    similarity: Literal["t-sp", "cosine"] = _field("t-sp", "similarity of two views")
    negatives: Literal["local", "global"] = _field("local", "contrast the images of one process, or of all")

    # Optimisation
    per_device_batch_size: int = _field(256, "images of each process in one forward pass")
    gradient_accumulation_steps: int = _field(1, "forward passes per optimiser step; adds no negatives")
    epochs: int = _field(200, "passes over the data that the learning-rate schedule spans")
    warmup_epochs: float = _field(10, "epochs of linear warm-up from 0")
    max_steps: int | None = _field(None, "end after so many optimiser steps; the schedule still spans all epochs")
    base_lr: float = _field(5e-5, "learning rate for 256 images per optimiser step")
    weight_decay: float = _field(0.05, "for all parameters but biases and others of one dimension")
    adam_beta1: float = _field(0.9, "in [0, 1)")
    adam_beta2: float = _field(0.95, "in [0, 1)")
    max_grad_norm: float | None = _field(None, "clip gradients to this norm; unset, no clipping")

    # Run
    output_dir: str = _field("runs/pretrain", "folder for checkpoints/, metrics.jsonl, figures/ and model/")
    seed: int = _field(0, "of initialisation, order, crops and masks")
    mixed_precision: Literal["no", "bf16", "fp16"] = _field("bf16", "autocast of the forward pass")
    logging_steps: int = _field(10, "optimiser steps between entries of metrics.jsonl")
    save_steps: int = _field(1000, "optimiser steps between checkpoints")
    save_total_limit: int = _field(3, "newest checkpoints to keep")
    resume: str = _field(
        "auto", "'auto' continues from the newest valid checkpoint if there is one, 'none', or a path"
    )
    knn_epochs: int = _field(0, "epochs between kNN evaluations; 0 evaluates only at the end")
    knn_images: int = _field(10_000, "labelled images for kNN, from each of the two splits; 0 turns it off")
    report_to: str = _field("tensorboard", "trackers, comma-separated, or 'none'")

    # What may differ when a run is resumed: it changes neither the model nor the course of training.
    CHANGEABLE: ClassVar[set[str]] = {
        *("output_dir", "resume", "max_steps", "save_steps", "save_total_limit", "logging_steps", "report_to"),
        *("eval_split", "label_column", "knn_epochs", "knn_images"),
        *("num_workers", "max_bad_fraction", "gradient_checkpointing"),
    }

    def model_config(self) -> MiclConfig:
        """The model's configuration; raises ValueError on an impossible one."""
        return MiclConfig(
            image_size=_one_or_pair(self.image_size),
            patch_size=_one_or_pair(self.patch_size),
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=4 * self.hidden_size,
            mask_ratio=self.mask_ratio,
            num_views=self.num_views,
            temperature=self.temperature,
            kappa=self.kappa,
            similarity=self.similarity,
            negatives=self.negatives,
        )

    def trackers(self) -> list[str]:
        """Names of the trackers asked for."""
        return [] if self.report_to == "none" else [name.strip() for name in self.report_to.split(",")]

    def validate(self) -> None:
        """Raise a ValueError that names the first impossible setting, its value and the remedy."""
        for name in ("image_size", "patch_size"):
            if len(getattr(self, name)) not in (1, 2):
                raise ValueError(f"{name} takes one number, or height and width, got {getattr(self, name)}.")
        self.model_config()
        self._validate_ranges()
        if not self.warmup_epochs < self.epochs:
            raise ValueError(f"warmup_epochs={self.warmup_epochs} must be less than epochs={self.epochs}.")
        if self.resume not in ("auto", "none") and not Path(self.resume).is_dir():
            raise ValueError(f"resume={self.resume!r} is neither 'auto', 'none' nor a checkpoint's folder.")

    def _validate_ranges(self) -> None:
        at_least = dict.fromkeys(
            ("per_device_batch_size", "gradient_accumulation_steps", "epochs", "logging_steps", "save_steps"), 1
        )
        at_least |= dict.fromkeys(("max_images", "max_steps", "save_total_limit", "shuffle_window"), 1)
        at_least |= dict.fromkeys(("num_workers", "knn_epochs", "knn_images", "warmup_epochs", "base_lr", "seed"), 0)
        at_least |= dict.fromkeys(("weight_decay", "max_grad_norm"), 0)
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ValueError(f"{name} must be at least {least}, got {value}.")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}.")
        if not 0 < self.crop_min_scale <= 1:
            raise ValueError(f"crop_min_scale must lie in (0, 1], got {self.crop_min_scale}.")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction must lie in [0, 1], got {self.max_bad_fraction}.")

    def to_dict(self) -> dict[str, Any]:
        """All settings, ready for JSON."""
        return asdict(self)


def _one_or_pair(size: list[int]) -> int | list[int]:
    return size[0] if len(size) == 1 else size


class _Parser(HfArgumentParser):
    """Reports mistakes in one line instead of printing every flag there is."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}", file=sys.stderr)  # noqa: T201
        raise SystemExit(2)


def parse_pretrain_config(argv: Sequence[str] | None = None) -> PretrainConfig:
    """Settings from `--config recipe.yaml` and flags, which win over the recipe.

    Raises:
        SystemExit: with status 2 and one line that says what is wrong: an unknown key and the nearest valid one, a
            value of a wrong type, or an impossible setting.
    """
    parser = _Parser(PretrainConfig, prog="training.pretrain", allow_abbrev=False, conflict_handler="resolve")
    parser.add_argument("--config", help="YAML recipe; flags win over it")
    # HfArgumentParser gives an optional boolean neither a bare --flag nor a --no-flag.
    parser.add_argument("--streaming", nargs="?", const=True, type=string_to_bool)
    parser.add_argument("--no_streaming", "--no-streaming", dest="streaming", action="store_false", default=SUPPRESS)
    flags = list(sys.argv[1:] if argv is None else argv)
    recipe = parser.parse_known_args(flags)[0].config
    try:
        flags = _recipe_flags(recipe) + flags if recipe else flags
        config, _, unknown = parser.parse_args_into_dataclasses(
            flags, return_remaining_strings=True, look_for_args_file=False
        )
        if unknown:
            raise ValueError(f"unknown flag {unknown[0]}{_nearest(unknown[0])}")
        config.validate()
    except ValueError as error:
        parser.error(str(error))
    assert isinstance(config, PretrainConfig)
    return config


def _recipe_flags(path: str) -> list[str]:
    """A YAML recipe as flags, so that the parser checks its types, too (YAML takes 5e-5 for a string)."""
    try:
        recipe = yaml.load(Path(path).read_text(), Loader=yaml.BaseLoader)  # strings: `no` may be a word
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read --config {path}: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"--config {path} must hold 'key: value' lines")
    known = {f.name for f in fields(PretrainConfig)}
    flags = []
    for key, value in recipe.items():
        if key not in known:
            raise ValueError(f"unknown key {key!r} in {path}{_nearest(str(key))}")
        several = isinstance(value, list) and isinstance(getattr(PretrainConfig(), key), list)
        if value not in ("", "~", "null"):
            flags += [f"--{key}", *value] if several else [f"--{key}={value}"]
    return flags


def _nearest(name: str) -> str:
    name = name.lstrip("-").split("=")[0].replace("-", "_")
    nearest = difflib.get_close_matches(name, [f.name for f in fields(PretrainConfig)], n=1)
    return f": did you mean {nearest[0]!r}?" if nearest else "; --help lists all"
