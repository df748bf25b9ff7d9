"""What the settings of all parts of `training.benchmark` share, and the sizes of Vision Transformers by name."""

from dataclasses import dataclass
from typing import Any, ClassVar

from modeling_micl import MiclConfig
from training.arithmetic import DTYPES
from training.checks import Checks
from training.config import setting


# width, layers, attention heads
VIT_SIZES = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
MIB = 2**20

Entry = dict[str, Any]


def ratio(value: float | None, reference: float | None) -> float | None:
    """Their ratio, if both could be measured."""
    return None if value is None or reference is None else value / reference


@dataclass
class CostSettings(Checks):
    """How something is measured."""

    repetitions: int = setting(5, "timed repetitions of each kind, after one to warm up")
    output: str = setting("runs/benchmark/cost.json", "file for all numbers")

    def validate(self) -> None:
        """Raise a ValueError that names the first impossible setting, its value and the remedy."""
        self._validate_at_least(1, "repetitions")

    def _validate_sizes(self, name: str, least: int) -> None:
        sizes = getattr(self, name)
        if not sizes or min(sizes) < least or len(set(sizes)) < len(sizes):
            raise ValueError(f"{name} takes different numbers from {least} up, got {sizes}.")

    def _validate_words(self, name: str, known: list[str]) -> None:
        words = getattr(self, name)
        if not words or not set(words) <= set(known) or len(set(words)) < len(words):
            raise ValueError(f"{name} takes different ones of {', '.join(known)}, got {words}.")


@dataclass
class VitSettings(CostSettings):
    """A Vision Transformer by its name."""

    size: str = setting("small", f"of the encoder: {', '.join(VIT_SIZES)}")
    image_size: int = setting(224, "pixels")
    patch_size: int = setting(16, "pixels")
    mask_ratio: float = setting(0.9, "share of the patches that neither of two views sees, in [0, 1)")
    images: int = setting(32, "of a step, contrasted together")

    mixed_precision: ClassVar[str] = "no"  # of accelerate; a step has its own

    def model_config(self, **overrides: Any) -> MiclConfig:
        """The model's configuration; raises ValueError on an impossible one."""
        chosen = {"image_size": self.image_size, "patch_size": self.patch_size, "mask_ratio": self.mask_ratio}
        width, layers, heads = VIT_SIZES[self.size]
        geometry = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
        return MiclConfig(**geometry, intermediate_size=4 * width, **chosen | overrides)

    def validate(self) -> None:
        """Raise a ValueError that names the first impossible setting, its value and the remedy."""
        super().validate()
        if self.size not in VIT_SIZES:
            raise ValueError(f"size takes one of {', '.join(VIT_SIZES)}, got {self.size!r}.")
        self.model_config()
        if self.images < 2:
            raise ValueError(f"images must be at least 2, or there is nothing to contrast, got {self.images}.")

    def _validate_precisions(self) -> None:
        self._validate_words("precisions", list(DTYPES))
