"""MiCL model configuration."""

from dataclasses import fields
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

from .masking import visible_patches_per_view


def height_and_width(size: int | list[int] | tuple[int, ...]) -> tuple[int, int]:
    """(height, width) of a size given as one number or as a pair."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width


@strict
class MiclConfig(BackboneConfigMixin, PreTrainedConfig):
    """Configuration of a MiCL Vision Transformer: ViT's geometry plus the masking and the contrastive objective.

    The defaults are ViT-B/16 with the settings that the authors' released program runs with.

    Args:
        hidden_size: width D of the encoder, divisible by `num_attention_heads` and by 4.
        num_hidden_layers: depth.
        num_attention_heads: attention heads of each layer.
        intermediate_size: width of the MLP, 4·D in all published models.
        hidden_act: activation of the MLP; `"gelu"` is the exact one.
        hidden_dropout_prob: dropout in embeddings and residual branches, in [0, 1); 0 as published.
        attention_probs_dropout_prob: dropout of attention weights, in [0, 1); 0 as published.
        initializer_range: standard deviation of the initial [CLS] token.
        layer_norm_eps: epsilon of every LayerNorm.
        image_size: pixels, one number or (height, width), divisible by `patch_size`.
        patch_size: pixels, one number or (height, width).
        num_channels: channels of the image.
        qkv_bias: whether query, key and value have biases.
        mask_ratio: share of the patches that no view sees, in [0, 1).
        num_views: disjoint views V of each image, at least 2.
        temperature: divides the similarities in the softmax, > 0.
        kappa: concentration of the T-SP similarity, > -1/2.
        similarity: `"t-sp"`, or `"cosine"` for plain cosine.
        negatives: `"local"` contrasts the images of one process, `"global"` those of all processes.
        drop_path_rate: stochastic depth of the last layer, in [0, 1), growing linearly from 0 at the first;
            0 in pre-training.
        classifier_pooling: what the classification head sees: `"mean"`, the patch tokens' mean after a fresh
            LayerNorm (fine-tuning), or `"cls"`, the [CLS] token (linear probe, stock ViT).
        apply_layernorm: backbone only: whether feature maps pass the final LayerNorm.
        reshape_hidden_states: backbone only: feature maps as (B, D, h, w), else as tokens.

    Raises:
        ValueError: on any value outside its range, naming the field, the value and the remedy.
    """

    model_type = "micl"

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-6
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 16
    num_channels: int = 3
    qkv_bias: bool = True
    mask_ratio: float | int = 0.9
    num_views: int = 2
    temperature: float | int = 0.07
    kappa: float | int = 1 / 64
    similarity: Literal["t-sp", "cosine"] = "t-sp"
    negatives: Literal["local", "global"] = "local"
    drop_path_rate: float | int = 0.0
    classifier_pooling: Literal["mean", "cls"] = "mean"
    apply_layernorm: bool = True
    reshape_hidden_states: bool = True
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Name the backbone's stages, then check every value."""
        kwargs.pop("stage_names", None)  # stored ones may be those of another depth
        self.stage_names = ["stem"] + [f"stage{layer}" for layer in range(1, self.num_hidden_layers + 1)]
        self.set_output_features_output_indices(
            out_features=kwargs.pop("out_features", None), out_indices=kwargs.pop("out_indices", None)
        )
        super().__post_init__(**kwargs)
        self.validate_micl()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in the base class, but overrides are checked together with the stored values, as at construction."""
        known = {field.name for field in fields(cls)} | {"out_features", "out_indices"}
        overrides = {name: kwargs.pop(name) for name in sorted(known & kwargs.keys())}
        if overrides.keys() & {"num_hidden_layers", "out_features", "out_indices"}:  # the stored stages do not apply
            config_dict = {k: v for k, v in config_dict.items() if k not in ("out_features", "out_indices")}
        return super().from_dict({**config_dict, **overrides}, **kwargs)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Patches in (height, width)."""
        return self.grid_of(*height_and_width(self.image_size))

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Patches in (height, width) of an image of height × width pixels; incomplete ones do not count."""
        patch_height, patch_width = height_and_width(self.patch_size)
        return height // patch_height, width // patch_width

    @property
    def num_patches(self) -> int:
        """Patches L of an image of `image_size`."""
        return self.grid_size[0] * self.grid_size[1]

    def validate_micl(self) -> None:
        """Raise a ValueError that names the first field with an impossible value, and the remedy."""
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if len(self.stage_names) != self.num_hidden_layers + 1:
            raise ValueError(
                f"num_hidden_layers={self.num_hidden_layers} was changed after the config was built with the stages "
                f"{self.stage_names}: build a new config, or pass num_hidden_layers to from_pretrained."
            )
        self._validate_geometry()
        self._validate_objective()
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}; 0 turns it off.")

    def _validate_geometry(self) -> None:
        sizes = {name: getattr(self, name) for name in ("image_size", "patch_size")}
        for name, size in sizes.items():
            if not isinstance(size, int) and len(size) != 2 or min(height_and_width(size)) < 1:
                raise ValueError(f"{name} must be a positive number of pixels or (height, width), got {size}.")
        for side, image, patch in zip(("height", "width"), *map(height_and_width, sizes.values()), strict=True):
            if image % patch:
                raise ValueError(
                    f"The {side} of image_size={self.image_size} is not divisible by patch_size={self.patch_size}: "
                    f"use {max(image // patch, 1) * patch} or {(image // patch + 1) * patch} pixels, or other patches."
                )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not divisible by num_attention_heads={self.num_attention_heads}: "
                "every head needs the same width, so change one of them."
            )
        if self.hidden_size % 4:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not divisible by 4, which the 2-D sin-cos position embeddings "
                f"need (sine and cosine, for width and height): use {(self.hidden_size // 4 + 1) * 4}."
            )

    def _validate_objective(self) -> None:
        if not 0 <= self.mask_ratio < 1:
            raise ValueError(f"mask_ratio must lie in [0, 1), got {self.mask_ratio}; the released default is 0.9.")
        if self.num_views < 2:
            raise ValueError(f"num_views must be at least 2, got {self.num_views}: one view has nothing to contrast.")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}; the released default is 0.07.")
        if not self.kappa > -0.5:
            raise ValueError(
                f"kappa must be > -1/2, got {self.kappa}: at or below that, the T-SP similarity has a "
                "pole; the released default is 1/64."
            )
        visible_patches_per_view(self.num_patches, self.mask_ratio, self.num_views)


MiclConfig.register_for_auto_class()

__all__ = ["MiclConfig"]
