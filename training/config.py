"""Settings of training: what all entry points share, pre-training's own, and their checks."""

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from modeling_micl import MiclConfig
from training.batch_size import check_contrasted, check_micro_batch, share_of
from training.checks import Checks


REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # USER/NAME on the Hub


def setting(default: Any, text: str) -> Any:
    """A dataclass field with its description for --help."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class DataSettings(Checks):
    """Which images; shared by every entry point."""

    dataset: str = setting("ILSVRC/imagenet-1k", "Hub id, local folder or file, or 'photos' for the demonstration")
    dataset_config: str | None = setting(None, "configuration of a Hub dataset that has several")
    split: str = setting("train", "split to train on")
    eval_split: str | None = setting(None, "split to evaluate on; unset, 'validation' or 'test' if there is one")
    streaming: bool | None = setting(None, "read while running; unset, everything but folders of images streams")
    image_column: str | None = setting(None, "unset, the only image column")
    label_column: str | None = setting(None, "unset, the only class label column if there is one")
    max_images: int | None = setting(None, "use only so many images of a split, from all over it, for a quick look")
    stream_timeout: float = setting(600, "seconds that a stream over a network may give nothing before the run ends")
    num_workers: int = setting(4, "decoding processes for each process of the program; 0 decodes in that itself")

    def validate(self) -> None:
        """Raise a ValueError that names the first impossible setting, its value and the remedy."""
        self._validate_at_least(1, "max_images")
        self._validate_at_least(0, "num_workers")
        if not self.stream_timeout > 0:
            raise ValueError(f"stream_timeout must be more than 0 seconds, got {self.stream_timeout}.")

    def to_dict(self) -> dict[str, Any]:
        """All settings, ready for JSON."""
        return asdict(self)


@dataclass
class TrainingSettings(DataSettings):
    """What pre-training, fine-tuning and the published linear probe have in common."""

    crop_min_scale: float = setting(0.2, "smallest share of the image in a random crop, in (0, 1]; 1 does not crop")
    horizontal_flip: bool = setting(True, "mirror every other crop")
    shuffle_window: int = setting(256, "images that each of the up to 64 readers of a stream holds to shuffle them")
    max_bad_fraction: float = setting(0.1, "stop when more than this share of the images is broken, in [0, 1]")

    gradient_checkpointing: bool = setting(False, "save memory: recompute each layer in the backward pass")
    torch_compile: Literal["no", "default", "reduce-overhead"] = setting("no", "mode to compile the model in, if any")
    gradient_accumulation_steps: int = setting(1, "batches per optimiser step; adds no negatives")
    epochs: float = setting(200, "passes over the data that the learning-rate schedule spans")
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
    keep_every_steps: int = setting(0, "also keep the checkpoints whose step is a multiple of this; 0 for none")
    async_checkpoints: bool = setting(False, "write checkpoints while training goes on, from a copy in CPU memory")
    on_full_disk: Literal["stop", "go_on"] = setting("stop", "when a checkpoint does not fit: end, or try the next")
    process_timeout: int = setting(1800, "seconds that a process waits for the others before it ends the run")
    max_bad_steps: int = setting(3, "skip so many steps in a row whose gradient is not finite before stopping; 0 none")
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
        *("num_workers", "max_bad_fraction", "gradient_checkpointing", "torch_compile", "eval_split"),
        *("push_to_hub", "push_checkpoints", "push_private", "process_timeout", "stream_timeout"),
        *("keep_every_steps", "async_checkpoints", "on_full_disk", "max_bad_steps"),
    }

    def trackers(self) -> list[str]:
        """Names of the trackers asked for."""
        return [] if self.report_to == "none" else [name.strip() for name in self.report_to.split(",")]

    def images_per_process(self, processes: int) -> int:
        """Images that each process brings to a batch.

        Raises:
            ValueError: if they cannot be shared out to so many processes.
        """
        raise NotImplementedError

    def images_per_pass(self, processes: int) -> int:
        """Images of one process that go through the model at once."""
        return self.images_per_process(processes)

    def contrasted_images(self, processes: int) -> int:
        """Images whose losses depend on each other; 1 where each image has its own."""
        return 1

    def batch_size_name(self) -> str:
        """The setting that decides how many images a batch has."""
        return "per_device_batch_size"

    def validate(self) -> None:
        """Raise a ValueError that names the first impossible setting, its value and the remedy."""
        super().validate()
        self._validate_at_least(1, "gradient_accumulation_steps", "logging_steps")
        self._validate_at_least(1, "save_steps", "max_steps", "save_total_limit", "shuffle_window", "process_timeout")
        self._validate_at_least(0, "keep_every_steps", "max_bad_steps")
        self._validate_at_least(0, "warmup_epochs", "base_lr", "min_lr", "seed", "weight_decay", "max_grad_norm")
        self._validate_share("crop_min_scale", zero=False)
        self._validate_share("max_bad_fraction")
        if not self.epochs > 0:
            raise ValueError(f"epochs must be more than 0, got {self.epochs}.")
        if not self.warmup_epochs < self.epochs:
            raise ValueError(f"warmup_epochs={self.warmup_epochs:g} must be less than epochs={self.epochs:g}.")
        if self.keep_every_steps % self.save_steps:
            raise ValueError(
                f"keep_every_steps={self.keep_every_steps} must be a multiple of save_steps={self.save_steps}, as "
                "there are no other checkpoints."
            )
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
    init_from: str | None = setting(None, "start from this MiCL or stock ViT (folder or Hub id), not random weights")

    mask_ratio: float = setting(0.9, "share of the patches that no view sees, in [0, 1)")
    num_views: int = setting(2, "disjoint views of each image, at least 2")
    views_per_decode: int = setting(1, "forward passes in a row that use each decoded batch, with new views each time")
    decode_on_gpu: bool = setting(
        False, "workers only read, and JPEGs are decoded and cropped on the GPU, a CUDA one; changes pixels a little"
    )
    temperature: float = setting(0.07, "divides the similarities, > 0")
    kappa: float = setting(1 / 64, "concentration of the T-SP similarity, > -1/2")
    similarity: Literal["t-sp", "cosine"] = setting("t-sp", "similarity of two views")
    negatives: Literal["local", "global"] = setting("local", "contrast the images of one process, or of all")

    per_device_batch_size: int | None = setting(
        None, "images of each process, all in one pass; unset, 256 or by contrastive_batch_size"
    )
    contrastive_batch_size: int | None = setting(
        None, "images contrasted together: with global negatives those of all processes, with local of each one"
    )
    per_device_micro_batch_size: int | None = setting(
        None, "images of each process in one pass; fewer than its share means the cached loss; unset, its whole share"
    )
    find_micro_batch: bool = setting(False, "begin by finding the largest per_device_micro_batch_size that fits")

    adam_beta1: float = setting(0.9, "in [0, 1)")
    adam_beta2: float = setting(0.95, "in [0, 1)")

    knn_epochs: int = setting(0, "epochs between kNN evaluations; 0 evaluates only at the end")
    knn_images: int = setting(10_000, "labelled images for kNN, from each of the two splits; 0 turns it off")
    online_probe: bool = setting(False, "with every kNN evaluation, also fit a linear probe to the same features")

    CHANGEABLE: ClassVar[set[str]] = TrainingSettings.CHANGEABLE | {
        *("label_column", "knn_epochs", "knn_images", "online_probe"),
        # Only the batch that they make must stay (see Plan); how it is shared out changes the time alone.
        *("per_device_batch_size", "contrastive_batch_size", "per_device_micro_batch_size", "find_micro_batch"),
    }

    def __post_init__(self) -> None:
        """Have one of the two batch sizes."""
        if self.per_device_batch_size is None and self.contrastive_batch_size is None:
            self.per_device_batch_size = 256

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

    def batch_size_name(self) -> str:
        """The setting that decides how many images a batch has."""
        return "per_device_batch_size" if self.contrastive_batch_size is None else "contrastive_batch_size"

    def images_per_process(self, processes: int) -> int:
        """Images that each process brings to a contrastive batch.

        Raises:
            ValueError: if the batch cannot be shared out evenly.
        """
        images, micro_batch = self.contrastive_batch_size, self.per_device_micro_batch_size
        if images is None:
            assert self.per_device_batch_size is not None
            return self.per_device_batch_size
        if self.negatives == "global":
            images = share_of(images, processes, micro_batch)
        if micro_batch is not None:
            check_micro_batch(micro_batch, images, f"the {images} images of each process")
        return images

    def images_per_pass(self, processes: int) -> int:
        """Images of one process that go through the model at once; fewer than its share with the cached loss."""
        return self.per_device_micro_batch_size or self.images_per_process(processes)

    def contrasted_images(self, processes: int) -> int:
        """Images among which a view must find its own: the pool of negatives.

        Raises:
            ValueError: if there would be no negatives, or the batch cannot be shared out evenly.
        """
        images = self.images_per_process(processes) * (processes if self.negatives == "global" else 1)
        check_contrasted(images, self.batch_size_name(), getattr(self, self.batch_size_name()))
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
        self._validate_batch()
        super().validate()

    def _validate_batch(self) -> None:
        """What can be said about the batch sizes before the number of processes is known."""
        names = ("per_device_batch_size", "contrastive_batch_size", "per_device_micro_batch_size", "views_per_decode")
        self._validate_at_least(1, *names)
        if self.contrastive_batch_size is None:
            for name in ("per_device_micro_batch_size", "find_micro_batch"):
                if value := getattr(self, name):
                    raise ValueError(
                        f"{name}={value} goes with contrastive_batch_size: give that in place of "
                        f"per_device_batch_size={self.per_device_batch_size}."
                    )
            return
        if self.per_device_batch_size is not None:
            raise ValueError(
                f"per_device_batch_size={self.per_device_batch_size} and contrastive_batch_size="
                f"{self.contrastive_batch_size} both say how large the batch is: give only one of them. A flag can "
                "change the one of a recipe, not remove it."
            )
        check_contrasted(self.contrastive_batch_size, "contrastive_batch_size", self.contrastive_batch_size)
        if self.torch_compile == "reduce-overhead" and (self.per_device_micro_batch_size or self.find_micro_batch):
            raise ValueError(
                "torch_compile='reduce-overhead' replays its outputs in place, and the cached loss has to keep those "
                "of all micro-batches: use 'default', or leave out the micro-batch."
            )
        if self.per_device_micro_batch_size is not None:
            whole = f"contrastive_batch_size={self.contrastive_batch_size}"
            check_micro_batch(self.per_device_micro_batch_size, self.contrastive_batch_size, whole)
            if self.find_micro_batch:
                raise ValueError(
                    f"find_micro_batch would replace per_device_micro_batch_size={self.per_device_micro_batch_size}: "
                    "give only one of them."
                )


def _one_or_pair(size: list[int]) -> int | list[int]:
    return size[0] if len(size) == 1 else size
