"""Augmentation for training classifiers: timm's RandAugment in the workers, erasing and mixing on the device."""

import random
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from timm.data.auto_augment import posterize, rand_augment_transform
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers.image_utils import IMAGENET_DEFAULT_MEAN

from training.batch import Batch
from training.features import normalize_pixels
from training.images import CropAndFlip, Transform


# timm itself passes over parts of a policy that it does not know.
POLICY = re.compile(r"rand(-(m|n|inc|mmax)\d+|-(mstd|p)\d+(\.\d+)?|-t(weights|3aw?))*")


@dataclass
class Augmentation:
    """How the images and labels of a classifier are varied while it is trained; by default hardly.

    Attributes:
        crop_min_scale: smallest share of the image in a random crop.
        horizontal_flip: whether to mirror every other crop.
        rand_augment: policy in timm's notation, or "none".
        erasing_probability: share of the images with a box of noise.
        mixup_alpha: of mixup's Beta distribution; 0 is off.
        cutmix_alpha: of cutmix's; where both are on, each does half of the batches.
        label_smoothing: share of the target that is spread over all classes.

    Raises:
        ValueError: if timm has no such RandAugment policy.
    """

    crop_min_scale: float = 0.08
    horizontal_flip: bool = True
    rand_augment: str = "none"
    erasing_probability: float = 0.0
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        """Check the policy."""
        if self.rand_augment != "none" and not POLICY.fullmatch(self.rand_augment):
            raise ValueError(
                f"rand_augment={self.rand_augment!r} is no policy of timm's, as 'rand-m9-mstd0.5-inc1', nor 'none'."
            )

    def transform(self, size: tuple[int, int]) -> Transform:
        """Crop, flip and RandAugment, as timm's training transform up to the tensor.

        Args:
            size: (height, width) of the result in pixels.
        """
        crop = CropAndFlip(size, self.crop_min_scale, self.horizontal_flip)
        if self.rand_augment == "none":
            return crop
        settings = {
            "img_mean": tuple(min(255, round(255 * channel)) for channel in IMAGENET_DEFAULT_MEAN),
            "interpolation": Image.Resampling.BICUBIC,
        }
        policy = rand_augment_transform(self.rand_augment, settings)
        for operation in policy.ops:
            if operation.aug_fn is posterize:
                operation.aug_fn = _posterize

        def augment(image: Image.Image, rng: np.random.Generator) -> Image.Image:
            cropped = crop(image, rng)
            seed = int(rng.integers(2**32))  # timm draws from the global generators
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            augmented: Image.Image = policy(cropped)
            return augmented

        return augment

    def loss_inputs(self, batch: Batch, num_classes: int) -> tuple[Tensor, Tensor]:
        """Pixels (n, 3, H, W), normalised, erased and mixed, and what the loss compares the logits with.

        The targets are labels (n,), or where images are mixed shares of the classes (n, C), already smoothed. All
        draws are from the global generators.
        """
        pixels = normalize_pixels(batch.pixels).contiguous()
        if self.erasing_probability:
            pixels = RandomErasing(self.erasing_probability, mode="pixel", device=pixels.device)(pixels)
        if self.mixup_alpha or self.cutmix_alpha:
            mixup = Mixup(
                self.mixup_alpha, self.cutmix_alpha, label_smoothing=self.label_smoothing, num_classes=num_classes
            )
            pixels, targets = mixup(pixels, batch.labels)
            return pixels, targets
        return pixels, batch.labels

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of `loss_inputs`' targets."""
        smoothing = self.label_smoothing if targets.ndim == 1 else 0.0  # mixed targets are smoothed already
        return cross_entropy(logits.float(), targets, label_smoothing=smoothing)


def _posterize(image: Image.Image, bits: int, **ignored: Any) -> Image.Image:
    """As timm's, which at full strength keeps no bit at all: Pillow gives black for that before 13, then an error."""
    posterized: Image.Image = posterize(image, bits, **ignored) if bits else Image.new(image.mode, image.size)
    return posterized
