"""Settings of the two training loops: what both share, pre-training's and fine-tuning's own, and their checks."""

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from modeling_micl import MiclConfig


REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # USER/NAME on the Hub


def setting(default: Any, text: str) -> Any:
    """A dataclass field with its description for --help."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class DataSettings:
    """Which images; shared by every entry point."""

    dataset: str = setting("ILSVRC/imagenet-1k", "Hub id, local folder or file, or 'photos' for the demonstration")
    dataset_config: str | None = setting(None, "configuration of a Hub dataset that has several")
    split: str = setting("train", "split to train on")
    eval_split: str | None = setting(None, "split to evaluate on; unset, 'validation' or 'test' if there is one")
    streaming: bool | None = setting(None, "read while running; unset, everything but folders of images streams")
    image_column: str | None = setting(None, "unset, the only image column")
    label_column: str | None = setting(None, "unset, the only class label column if there is one")
    max_images: int | None = setting(None, "use only so many images of a split, from all over it, for a quick look")
    num_workers: int = setting(4, "decoding processes for each process of the program; 0 decodes in that itself")

    def validate(self) -> None:
        """Raise a ValueError that names the first impossible setting, its value and the remedy."""
        self._validate_at_least(1, "max_images")
        self._validate_at_least(0, "num_workers")

    def to_dict(self) -> dict[str, Any]:
        """All settings, ready for JSON."""
        return asdict(self)

    def _validate_at_least(self, least: int, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ValueError(f"{name} must be at least {least}, got {value}.")

    def _validate_few_shot(self, shares: list[float]) -> None:
        for share in shares:
            if not 0 < share <= 1:
                raise ValueError(f"few_shot takes shares in (0, 1], got {share}; 1 alone turns it off.")

    def _validate_share(self, *names: str, zero: bool = True, one: bool = True) -> None:
        for name in names:
            value = getattr(self, name)
            if not (0 <= value <= 1) or (value == 0 and not zero) or (value == 1 and not one):
                interval = f"{'[' if zero else '('}0, 1{']' if one else ')'}"
                raise ValueError(f"{name} must lie in {interval}, got {value}.")


@dataclass
class TrainingSettings(DataSettings):
    """What pre-training, fine-tuning and the published linear probe have in common."""

    crop_min_scale: float = setting(0.2, "smallest share of the image in a random crop, in (0, 1]; 1 does not crop")
    horizontal_flip: bool = setting(True, "mirror every other crop")
    shuffle_window: int = setting(256, "images that each of the up to 64 readers of a stream holds to shuffle them")
    max_bad_fraction: float = setting(0.1, "stop when more than this share of the images is broken, in [0, 1]")

    gradient_checkpointing: bool = setting(False, "save memory: recompute each layer in the backward pass")
    per_device_batch_size: int = setting(256, "images of each process in one forward pass")
    gradient_accumulation_steps: int = setting(1, "forward passes per optimiser step; adds no negatives")
    epochs: int = setting(200, "passes over the data that the learning-rate schedule spans")
    warmup_epochs: float = setting(10, "epochs of linear warm-up from 0")
    max_steps: int | None = setting(None, "end after so many optimiser steps; the schedule still spans all epochs")
    base_lr: float = setting(5e-5, "learning rate for 256 images per optimiser step")
    min_lr: float = setting(0.0, "learning rate at the end of the schedule")
    weight_decay: float = setting(0.05, "for all parameters but biases and others of one dimension")
    max_grad_norm: float | None = setting(None, "clip gradients to this norm; unset, no clipping")

    output_dir: str = setting("runs/pretrain", "folder for checkpoints/, metrics.jsonl, figures/ and model/")
    seed: int = setting(0, "of everything random")
    mixed_precision: Literal["no", "bf16", "fp16"] = setting("bf16", "autocast of the forward pass")
    logging_steps: int = setting(10, "optimiser steps between entries of metrics.jsonl")
    save_steps: int = setting(1000, "optimiser steps between checkpoints")
    save_total_limit: int = setting(3, "newest checkpoints to keep")
    resume: str = setting(
        "auto", "'auto' continues from the newest valid checkpoint if there is one, 'none', or a path"
    )
    report_to: str = setting("tensorboard", "trackers, comma-separated, or 'none'")

    push_to_hub: str | None = setting(None, "send model/ to this repository at the end: USER/NAME, made at the start")
    push_checkpoints: bool = setting(False, "with push_to_hub, also send the model of every checkpoint")
    push_private: bool = setting(False, "with push_to_hub, make a new repository private; an existing one must be")

    # What may differ when a run is resumed: it changes neither the model nor the course of training.
    CHANGEABLE: ClassVar[set[str]] = {
        *("output_dir", "resume", "max_steps", "save_steps", "save_total_limit", "logging_steps", "report_to"),
        *("num_workers", "max_bad_fraction", "gradient_checkpointing", "eval_split"),
        *("push_to_hub", "push_checkpoints", "push_private"),
    }

    def trackers(self) -> list[str]:
        """Names of the trackers asked for."""
        return [] if self.report_to == "none" else [name.strip() for name in self.report_to.split(",")]

    def validate(self) -> None:
        """Raise a ValueError that names the first impossible setting, its value and the remedy."""
        super().validate()
        self._validate_at_least(1, "per_device_batch_size", "gradient_accumulation_steps", "epochs", "logging_steps")
        self._validate_at_least(1, "save_steps", "max_steps", "save_total_limit", "shuffle_window")
        self._validate_at_least(0, "warmup_epochs", "base_lr", "min_lr", "seed", "weight_decay", "max_grad_norm")
        self._validate_share("crop_min_scale", zero=False)
        self._validate_share("max_bad_fraction")
        if not self.warmup_epochs < self.epochs:
            raise ValueError(f"warmup_epochs={self.warmup_epochs} must be less than epochs={self.epochs}.")
        if self.push_to_hub is not None and not REPOSITORY.fullmatch(self.push_to_hub):
            raise ValueError(f"push_to_hub={self.push_to_hub!r} is no place on the Hub: write USER/NAME.")
        if (self.push_checkpoints or self.push_private) and self.push_to_hub is None:
            raise ValueError("push_checkpoints and push_private go with push_to_hub: name the repository there, too.")
        if self.resume not in ("auto", "none") and not Path(self.resume).is_dir():
            raise ValueError(f"resume={self.resume!r} is neither 'auto', 'none' nor a checkpoint's folder.")


@dataclass
class PretrainConfig(TrainingSettings):
    """One pre-training run. The defaults are those of the authors' released program where it has one."""

    label_column: str | None = setting(None, "labels for the evaluation only; unset, the only class label column")

    image_size: list[int] = setting([224], "pixels of the crops: one number, or height and width")
    patch_size: list[int] = setting([16], "pixels of a patch: one number, or height and width")
    hidden_size: int = setting(768, "width of the encoder")
    num_hidden_layers: int = setting(12, "depth of the encoder")
    num_attention_heads: int = setting(12, "attention heads of each layer")
    layer_norm_eps: float = setting(1e-6, "added to the variance in every LayerNorm; stock ViT has 1e-12")
    init_from: str | None = setting(
        None, "start from the encoder of this MiCL or stock ViT (portable folder or Hub id) instead of random weights"
    )

    mask_ratio: float = setting(0.9, "share of the patches that no view sees, in [0, 1)")
    num_views: int = setting(2, "disjoint views of each image, at least 2")
    temperature: float = setting(0.07, "divides the similarities, > 0")
    kappa: float = setting(1 / 64, "concentration of the T-SP similarity, > -1/2")
    similarity: Literal["t-sp", "cosine"] = setting("t-sp", "similarity of two views")
    negatives: Literal["local", "global"] = setting("local", "contrast the images of one process, or of all")

    adam_beta1: float = setting(0.9, "in [0, 1)")
    adam_beta2: float = setting(0.95, "in [0, 1)")

    knn_epochs: int = setting(0, "epochs between kNN evaluations; 0 evaluates only at the end")
    knn_images: int = setting(10_000, "labelled images for kNN, from each of the two splits; 0 turns it off")
    online_probe: bool = setting(False, "with every kNN evaluation, also fit a linear probe to the same features")

    CHANGEABLE: ClassVar[set[str]] = TrainingSettings.CHANGEABLE | {
        *("label_column", "knn_epochs", "knn_images", "online_probe"),
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
            layer_norm_eps=self.layer_norm_eps,
            mask_ratio=self.mask_ratio,
            num_views=self.num_views,
            temperature=self.temperature,
            kappa=self.kappa,
            similarity=self.similarity,
            negatives=self.negatives,
        )

    def contrasted_images(self, processes: int) -> int:
        """Images among which a view must find its own: the pool of negatives.

        Raises:
            ValueError: if there would be no negatives.
        """
        images = self.per_device_batch_size * (processes if self.negatives == "global" else 1)
        if images < 2:
            raise ValueError("per_device_batch_size=1 leaves no negatives, and the loss would be 0: use at least 2.")
        return images

    def validate(self) -> None:
        """Raise a ValueError that names the first impossible setting, its value and the remedy."""
        for name in ("image_size", "patch_size"):
            if len(getattr(self, name)) not in (1, 2):
                raise ValueError(f"{name} takes one number, or height and width, got {getattr(self, name)}.")
        self.model_config()
        self._validate_at_least(0, "knn_epochs", "knn_images", "layer_norm_eps")
        self._validate_share("adam_beta1", "adam_beta2", one=False)
        if self.online_probe and (self.knn_epochs == 0 or self.knn_images < 10):
            raise ValueError(
                "online_probe goes with the kNN evaluations, of at least 10 images: raise "
                f"knn_epochs={self.knn_epochs} or knn_images={self.knn_images}."
            )
        super().validate()


@dataclass
class ClassifierSettings(TrainingSettings):
    """What fine-tuning and the published linear probe have in common: they train a classifier on a given encoder."""

    model: str | None = setting(None, "pre-trained encoder: a portable folder or Hub id")
    random_init: bool = setting(False, "keep only the architecture of --model, with random weights: the comparison")
    crop_min_scale: float = setting(0.08, "smallest share of the image in a random crop, in (0, 1]; 1 does not crop")
    gradient_accumulation_steps: int = setting(1, "forward passes per optimiser step")
    eval_epochs: int = setting(1, "epochs between evaluations; 0 evaluates only at the end")

    CHANGEABLE: ClassVar[set[str]] = TrainingSettings.CHANGEABLE | {"eval_epochs"}

    def validate(self) -> None:
        """Raise a ValueError that names the first impossible setting, its value and the remedy."""
        if self.model is None:
            raise ValueError("model is not set: name a portable folder or a Hub id with --model.")
        self._validate_at_least(0, "eval_epochs")
        super().validate()


@dataclass
class ProbeConfig(ClassifierSettings):
    """One linear probe. The defaults of the published protocol are MAE's for ViT-B."""

    protocol: Literal["fast", "published"] = setting(
        "fast", "fast: fitted to features extracted once; published: trained on random crops with LARS"
    )
    features: Literal["cls", "mean"] = setting("cls", "fast: [CLS], or the patches' mean; published takes [CLS]")
    few_shot: list[float] = setting([0.01, 0.1], "fast: also with these shares of each class's labels; 1 turns it off")
    features_cache: str | None = setting(None, "fast: folder for extracted features; unset, beside the datasets")

    per_device_batch_size: int = setting(512, "images of each process in one forward pass")
    epochs: int = setting(90, "passes over the data that the learning-rate schedule spans")
    base_lr: float = setting(0.1, "learning rate for 256 images per optimiser step")
    weight_decay: float = setting(0.0, "of the head's weight")
    output_dir: str = setting("runs/linear_probe", "folder for the classifier in model/, and published: the rest")

    def validate(self) -> None:
        """Raise a ValueError that names the first impossible setting, its value and the remedy."""
        super().validate()
        self._validate_few_shot(self.few_shot)
        if self.push_to_hub:
            raise ValueError("push_to_hub is for pre-training and fine-tuning: publish a probe with training.publish.")
        if self.protocol == "published" and self.features == "mean":
            raise ValueError("features='mean' goes with protocol='fast' only: the published protocol probes [CLS].")


@dataclass
class FinetuneConfig(ClassifierSettings):
    """One fine-tuning run. The defaults are MAE's for ViT-B, which MiCL's fine-tuning follows."""

    new_head: bool = setting(False, "give a model that is a classifier already a fresh head")
    classifier_pooling: Literal["mean", "cls"] = setting("mean", "what the head sees: the patches' mean, or [CLS]")

    rand_augment: str = setting("rand-m9-mstd0.5-inc1", "RandAugment policy in timm's notation, or 'none'")
    erasing_probability: float = setting(0.25, "share of the images with a random box of noise, in [0, 1]")
    mixup_alpha: float = setting(0.8, "mixup; 0 turns it off")
    cutmix_alpha: float = setting(1.0, "cutmix, instead of mixup in half of the batches where both are on; 0 is off")
    label_smoothing: float = setting(0.1, "in [0, 1)")
    drop_path_rate: float = setting(0.1, "stochastic depth of the last layer, in [0, 1)")

    per_device_batch_size: int = setting(128, "images of each process in one forward pass")
    epochs: int = setting(100, "passes over the data that the learning-rate schedule spans")
    warmup_epochs: float = setting(5, "epochs of linear warm-up from 0")
    base_lr: float = setting(5e-4, "learning rate of the head for 256 images per optimiser step")
    min_lr: float = setting(1e-6, "learning rate of the head at the end of the schedule")
    layer_decay: float = setting(0.65, "factor of the learning rate from each layer to the one before, in (0, 1]")
    adam_beta1: float = setting(0.9, "in [0, 1)")
    adam_beta2: float = setting(0.999, "in [0, 1)")
    ema_decay: float | None = setting(None, "evaluate and keep a moving average of the weights with this decay")
    output_dir: str = setting("runs/finetune", "folder for checkpoints/, metrics.jsonl, figures/ and model/")

    def validate(self) -> None:
        """Raise a ValueError that names the first impossible setting, its value and the remedy."""
        self._validate_share("erasing_probability")
        self._validate_share("label_smoothing", "drop_path_rate", "adam_beta1", "adam_beta2", one=False)
        self._validate_share("layer_decay", zero=False)
        self._validate_at_least(0, "mixup_alpha", "cutmix_alpha")
        if self.ema_decay is not None:
            self._validate_share("ema_decay", one=False)
        if (self.mixup_alpha or self.cutmix_alpha) and self.per_device_batch_size % 2:
            raise ValueError(
                f"per_device_batch_size={self.per_device_batch_size} must be even: mixup and cutmix pair the images. "
                "Change it, or turn both off with mixup_alpha=0 and cutmix_alpha=0."
            )
        super().validate()


def _one_or_pair(size: list[int]) -> int | list[int]:
    return size[0] if len(size) == 1 else size
