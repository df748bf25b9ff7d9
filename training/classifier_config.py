"""Settings of training with labels: fine-tuning, the linear probe, and what both share."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from training.config import TrainingSettings, setting


@dataclass
class ClassifierSettings(TrainingSettings):
    """What fine-tuning and the published linear probe have in common: they train a classifier on a given encoder."""

    model: str | None = setting(None, "pre-trained encoder: a portable folder or Hub id")
    random_init: bool = setting(False, "keep only the architecture of --model, with random weights: the comparison")
    crop_min_scale: float = setting(0.08, "smallest share of the image in a random crop, in (0, 1]; 1 does not crop")
    per_device_batch_size: int = setting(256, "images of each process in one forward pass")
    gradient_accumulation_steps: int = setting(1, "forward passes per optimiser step")
    eval_epochs: int = setting(1, "epochs between evaluations; 0 evaluates only at the end")

    CHANGEABLE: ClassVar[set[str]] = TrainingSettings.CHANGEABLE | {"eval_epochs"}

    def images_per_process(self, processes: int) -> int:
        """Images that each process brings to a batch."""
        return self.per_device_batch_size

    def validate(self) -> None:
        """Raise a ValueError that names the first impossible setting, its value and the remedy."""
        if self.model is None:
            raise ValueError("model is not set: name a portable folder or a Hub id with --model.")
        self._validate_at_least(0, "eval_epochs")
        self._validate_at_least(1, "per_device_batch_size")
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
    epochs: float = setting(90, "passes over the data that the learning-rate schedule spans")
    base_lr: float = setting(0.1, "learning rate for 256 images per optimiser step")
    weight_decay: float = setting(0.0, "of the head's weight")
    max_bad_steps: int = setting(0, "only 0: a step whose gradient is not finite stops the probe")
    output_dir: str = setting("runs/linear_probe", "folder for the classifier in model/, and published: the rest")

    def validate(self) -> None:
        """Raise a ValueError that names the first impossible setting, its value and the remedy."""
        super().validate()
        self._validate_few_shot(self.few_shot)
        if self.push_to_hub:
            raise ValueError("push_to_hub is for pre-training and fine-tuning: publish a probe with training.publish.")
        if self.max_bad_steps:
            raise ValueError(
                f"max_bad_steps={self.max_bad_steps} is for pre-training and fine-tuning: the probe's BatchNorm would "
                "keep what is not finite. Set it to 0."
            )
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
    epochs: float = setting(100, "passes over the data that the learning-rate schedule spans")
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
