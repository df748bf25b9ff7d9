"""MiCL on transformers' Vision Transformer.

The encoder is a stock ViT with stock parameter names. This file adds what MiCL needs: only the visible patches are
embedded, positions are fixed, the initialisation is the released program's, layers may be dropped, and the [CLS]
tokens of disjoint views are contrasted.

Shapes in the comments: B images, V views, K visible patches per view, L patches per image, D embedding width.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ViTModel
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
    ModelOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.dinov2.modeling_dinov2 import Dinov2DropPath
from transformers.models.vit.modeling_vit import (
    ViTAttention,
    ViTLayer,
    ViTPatchEmbeddings,
    ViTPreTrainedModel,
    eager_attention_forward,
)
from transformers.processing_utils import Unpack
from transformers.utils.generic import TransformersKwargs, can_return_tuple, maybe_autocast, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_micl import MiclConfig, height_and_width
from .losses import micl_loss
from .masking import sample_views


@dataclass
class MiclForPreTrainingOutput(ModelOutput):
    """Output of `MiclForPreTraining`.

    Args:
        loss: with `return_loss`, a scalar, the contrastive loss of this process's images.
        logits: with `return_loss`, (B, G), similarities over temperature of view 0 of the B own images against view 1
            of all G contrasted images; for V > 2 (V·(V-1), B, G).
        view_embeds: (B, V, D), the L2-normalised [CLS] embeddings of the views.
        ids_visible: (B, V, K) int64, the patches that each view saw.
        hidden_states: with `output_hidden_states=True`, the embeddings and every layer's output, (B·V, 1+K, D) each.
        attentions: with `output_attentions=True`, every layer's attention weights, (B·V, heads, 1+K, 1+K) each.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    view_embeds: Tensor | None = None
    ids_visible: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


def sincos_position_embeddings(hidden_size: int, height: int, width: int) -> Tensor:
    """Fixed 2-D sine-cosine table (1, 1 + height·width, D) in MAE's layout.

    A patch's row is [sin_w | cos_w | sin_h | cos_h]: the width half comes first, which is historical and kept because
    published weights depend on it. The [CLS] row is zero.
    """
    frequencies = 10_000 ** -(torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size // 4))
    rows = torch.arange(height, dtype=torch.float64).repeat_interleave(width)
    columns = torch.arange(width, dtype=torch.float64).repeat(height)
    angles_w, angles_h = columns.outer(frequencies), rows.outer(frequencies)  # (L, D/4)
    table = torch.cat([angles_w.sin(), angles_w.cos(), angles_h.sin(), angles_h.cos()], dim=1)
    return torch.cat([torch.zeros(1, hidden_size), table.float()])[None]


class PatchProjection(nn.Conv2d):
    """The stock projection of all patches of an image, which can also project patches that were cut out before."""

    def forward(self, pixels: Tensor) -> Tensor:
        """Images (B, C, H, W) → (B, D, h, w) as in the base class; patches (B, N, C, p, p) → (B, N, D)."""
        if pixels.ndim == 4:
            return super().forward(pixels)
        return nn.functional.linear(pixels.flatten(2), self.weight.flatten(1), self.bias)


class MiclPatchEmbeddings(ViTPatchEmbeddings):
    """The stock patch embeddings with that projection; always called as a module, on which FSDP relies."""

    def __init__(self, config: MiclConfig) -> None:
        super().__init__(config)
        patch_size = height_and_width(config.patch_size)
        self.projection = PatchProjection(
            config.num_channels, config.hidden_size, kernel_size=patch_size, stride=patch_size
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """Images (B, C, H, W) → (B, L, D) as in the base class; patches (B, N, C, p, p) → (B, N, D)."""
        embedded: Tensor = super().forward(pixels) if pixels.ndim == 4 else self.projection(pixels)
        return embedded


class MiclEmbeddings(nn.Module):
    """[CLS] and patch tokens with their fixed positions: all patches, or only those that a view sees."""

    def __init__(self, config: MiclConfig) -> None:
        super().__init__()
        self.config = config
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.patch_embeddings = MiclPatchEmbeddings(config)
        # A frozen parameter rather than a buffer: stock ViT has its learned positions in this place.
        self.position_embeddings = nn.Parameter(
            torch.empty(1, 1 + config.num_patches, config.hidden_size), requires_grad=False
        )
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self, pixel_values: Tensor, ids_visible: Tensor | None = None, interpolate_pos_encoding: bool = False
    ) -> Tensor:
        """Embed all patches, (B, 1+L, D), or those of the views, (B·V, 1+K, D) with an image's views side by side."""
        self.check_size(pixel_values, interpolate_pos_encoding)
        positions = self.positions(*pixel_values.shape[2:])
        if ids_visible is None:
            patches = self.patch_embeddings(pixel_values) + positions[:, 1:]
        else:
            batch_size, num_views, patches_per_view = ids_visible.shape
            ids = ids_visible.flatten(1)  # (B, V·K)
            patches = self._embed_visible(pixel_values, ids) + positions[0, 1:][ids]
            patches = patches.reshape(batch_size * num_views, patches_per_view, -1)
        cls_tokens = (self.cls_token + positions[:, :1]).expand(patches.shape[0], -1, -1)
        tokens: Tensor = self.dropout(torch.cat([cls_tokens, patches], dim=1))
        return tokens

    def _embed_visible(self, pixel_values: Tensor, ids: Tensor) -> Tensor:
        """Project only the patches with the given ids, (B, N) -> (B, N, D): pixels are gathered first."""
        patch_height, patch_width = height_and_width(self.config.patch_size)
        height, width = self.config.grid_of(*pixel_values.shape[2:])
        grid = pixel_values[:, :, : height * patch_height, : width * patch_width]
        grid = grid.unflatten(3, (width, patch_width)).unflatten(2, (height, patch_height))
        images = torch.arange(ids.shape[0], device=ids.device)[:, None]
        pixels = grid[images, :, ids // width, :, ids % width]  # (B, N, C, patch height, patch width)
        embedded: Tensor = self.patch_embeddings(pixels)
        return embedded

    def positions(self, height: int, width: int) -> Tensor:
        """Position table for images of height × width pixels, bicubic from the stored one where the size differs."""
        if (height, width) == height_and_width(self.config.image_size):
            return self.position_embeddings
        table = self.position_embeddings[:, 1:].unflatten(1, self.config.grid_size).permute(0, 3, 1, 2)
        table = nn.functional.interpolate(
            table, size=self.config.grid_of(height, width), mode="bicubic", align_corners=False
        )
        return torch.cat([self.position_embeddings[:, :1], table.flatten(2).transpose(1, 2)], dim=1)

    def check_size(self, pixel_values: Tensor, interpolate_pos_encoding: bool) -> None:
        """Raise a ValueError unless these are images (B, C, H, W) that fit the positions."""
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.config.num_channels:
            raise ValueError(
                f"pixel_values must have shape (batch_size, num_channels={self.config.num_channels}, height, width), "
                f"got {tuple(pixel_values.shape)}."
            )
        size = height_and_width(self.config.image_size)
        if tuple(pixel_values.shape[2:]) != size and not interpolate_pos_encoding:
            raise ValueError(
                f"pixel_values are {tuple(pixel_values.shape[2:])} pixels, but the model's image_size is {size}: "
                "resize the images, or pass interpolate_pos_encoding=True."
            )
        if min(self.config.grid_of(*pixel_values.shape[2:])) < 1:
            raise ValueError(
                f"pixel_values are {tuple(pixel_values.shape[2:])} pixels, less than one patch of "
                f"patch_size={self.config.patch_size}: resize the images."
            )


class MiclLayer(ViTLayer):
    """Stock pre-norm layer with stochastic depth on both residual branches, for all tokens or [CLS] alone."""

    def __init__(self, config: MiclConfig, drop_path_rate: float) -> None:
        super().__init__(config)
        self.drop_path = Dinov2DropPath(drop_path_rate)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, cls_only: bool = False, **kwargs: Any
    ) -> Tensor:
        """(N, T, D) -> the same, or with `cls_only` (N, 1, D), its first row without computing the others."""
        normalized = self.layernorm_before(hidden_states)
        if cls_only:
            attended, hidden_states = self._attended_by_cls(normalized, **kwargs), hidden_states[:, :1]
        else:
            attended, _ = self.attention(normalized, attention_mask, **kwargs)
        hidden_states = hidden_states + self.drop_path(self.dropout(attended))
        transformed: Tensor = self.drop_path(self.dropout(self.mlp(self.layernorm_after(hidden_states))))
        return hidden_states + transformed

    def _attended_by_cls(self, tokens: Tensor, **kwargs: Any) -> Tensor:
        """The first row of the attention's output, (N, T, D) -> (N, 1, D): every token has a key, only [CLS] asks."""
        attention = self.attention
        projected = (attention.q_proj(tokens[:, :1]), attention.k_proj(tokens), attention.v_proj(tokens))
        query, key, value = (part.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for part in projected)
        dropout = attention.attention_dropout if self.training else 0.0
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention_forward)
        attended, _ = attend(attention, query, key, value, None, dropout=dropout, scaling=attention.scaling, **kwargs)
        output: Tensor = attention.o_proj(attended.flatten(2))
        return output


# What `output_hidden_states` and `output_attentions` record.
RECORDED = {"hidden_states": MiclLayer, "attentions": ViTAttention}


class MiclPreTrainedModel(ViTPreTrainedModel):
    """Loading, saving and the released program's initialisation for all MiCL models."""

    config_class = MiclConfig
    config: MiclConfig
    _no_split_modules = ["MiclEmbeddings", "MiclLayer"]
    _can_record_outputs = RECORDED

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # For code outside transformers the base class skips every module without parameters of its own, as attention
        # and the classification model are. Its guard against overwriting loaded weights is not needed:
        # `transformers.initialization` has the same for each parameter.
        super()._initialize_weights(module, is_custom_code=False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Xavier-uniform projections with zero biases, as the released program's `initialize_weights`."""
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, ViTAttention):
            # The released qkv is one (3D, D) matrix, whose Xavier bound is sqrt(6 / 4D) instead of sqrt(6 / 2D).
            for projection in (module.q_proj, module.k_proj, module.v_proj):
                init.xavier_uniform_(projection.weight, gain=1 / math.sqrt(2))
        elif isinstance(module, MiclEmbeddings):
            self._init_embeddings(module)
        elif isinstance(module, MiclForImageClassification) and isinstance(module.classifier, nn.Linear):
            # MAE's fine-tuning starts from a head near zero (main_finetune.py).
            init.trunc_normal_(module.classifier.weight, std=2e-5)

    def _init_embeddings(self, embeddings: MiclEmbeddings) -> None:
        init.normal_(embeddings.cls_token, std=self.config.initializer_range)
        init.copy_(
            embeddings.position_embeddings,
            sincos_position_embeddings(self.config.hidden_size, *self.config.grid_size),
        )
        embeddings.position_embeddings.requires_grad_(False)  # loading a checkpoint makes every parameter trainable
        projection = embeddings.patch_embeddings.projection
        fan_in, fan_out = projection.weight[0].numel(), projection.weight.shape[0]
        bound = math.sqrt(6 / (fan_in + fan_out))  # Xavier on the (D, C·p·p) view
        init.uniform_(projection.weight, -bound, bound)
        # The released program leaves this one bias at the Conv2d default.
        init.uniform_(projection.bias, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))


class MiclModel(MiclPreTrainedModel, ViTModel):
    """The encoder: features of whole images, or of views when told which patches are visible."""

    def __init__(self, config: MiclConfig, add_final_norm: bool = True) -> None:
        """Build the encoder.

        Args:
            config: its geometry.
            add_final_norm: False leaves out the final LayerNorm, for heads that normalise after pooling.
        """
        config.validate_micl()  # it may have been changed since it was built
        super(ViTModel, self).__init__(config)  # ViTModel's own __init__ would build stock layers first
        self.embeddings = MiclEmbeddings(config)
        last = max(config.num_hidden_layers - 1, 1)
        self.layers = nn.ModuleList(
            MiclLayer(config, config.drop_path_rate * layer / last) for layer in range(config.num_hidden_layers)
        )
        norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layernorm = norm if add_final_norm else nn.Identity()
        if not add_final_norm:
            self._keys_to_ignore_on_load_unexpected = [r"^(vit\.)?layernorm\."]
        self.pooler = None
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: Tensor,
        ids_visible: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        cls_only: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Encode images.

        Args:
            pixel_values: (B, C, H, W), floating point, normalised.
            ids_visible: (B, V, K) int64 patch indices, row-major over the patch grid. When given, only these patches
                are embedded and each view is a sequence of its own; otherwise nothing is masked.
            interpolate_pos_encoding: accept images of another size than `config.image_size`.
            cls_only: only [CLS] is wanted, so `last_hidden_state` has but that row. The last layer does not compute
                the others then, unless all hidden states or attentions are asked for.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Returns:
            `last_hidden_state`, after the final norm, (B, 1+L, D), or (B·V, 1+K, D) with image b's view v in row
            b·V + v; `pooler_output`, its [CLS] row.

        Raises:
            ValueError: on integer pixels, or wrong shapes.
        """
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"pixel_values must be floating point and normalised, got {pixel_values.dtype}: "
                "use the image processor, or divide by 255 and normalise with its mean and std."
            )
        if ids_visible is not None and (ids_visible.ndim != 3 or ids_visible.shape[0] != pixel_values.shape[0]):
            raise ValueError(
                "ids_visible must have shape (batch_size, num_views, patches_per_view) with batch_size="
                f"{len(pixel_values)}, got {tuple(ids_visible.shape)}."
            )
        pixel_values = pixel_values.to(self.embeddings.patch_embeddings.projection.weight.dtype)
        hidden_states = self.embeddings(pixel_values, ids_visible, interpolate_pos_encoding)
        recorded = any(kwargs.get(f"output_{name}", getattr(self.config, f"output_{name}")) for name in RECORDED)
        *layers, last_layer = self.layers
        for layer in layers:
            hidden_states = layer(hidden_states, **kwargs)
        hidden_states = last_layer(hidden_states, cls_only=cls_only and not recorded, **kwargs)
        hidden_states = self.layernorm(hidden_states[:, :1] if cls_only else hidden_states)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=hidden_states[:, 0])


class MiclForPreTraining(MiclPreTrainedModel):
    """Masked image contrastive learning: the encoder alone, without projector or decoder."""

    def __init__(self, config: MiclConfig) -> None:
        super().__init__(config)
        self.vit = MiclModel(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        noise: Tensor | None = None,
        ids_visible: Tensor | None = None,
        generator: torch.Generator | None = None,
        interpolate_pos_encoding: bool = False,
        return_loss: bool = True,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MiclForPreTrainingOutput:
        """Draw the views of every image, embed them, and contrast them in the batch.

        Args:
            pixel_values: (B, C, H, W), floating point, normalised.
            noise: (B, L), decides the views in place of random numbers: the smallest values are visible.
            ids_visible: (B, V, K) int64, the views themselves; V ≥ 2.
            generator: source of the random views, on the images' device.
            interpolate_pos_encoding: accept images of another size than `config.image_size`.
            return_loss: False only embeds the views; `contrast` can compare them later, with those of other batches.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Raises:
            ValueError: on integer pixels, wrong shapes, or both `noise` and `ids_visible`.

        Example:
            >>> model = MiclForPreTraining(MiclConfig())
            >>> loss = model(torch.randn(8, 3, 224, 224)).loss
        """
        self.vit.embeddings.check_size(pixel_values, interpolate_pos_encoding)  # before their size decides the views
        if ids_visible is None:
            ids_visible = self.sample_views(pixel_values, noise, generator)
        elif noise is not None:
            raise ValueError("noise and ids_visible both say which patches are visible: pass only one of them.")
        elif ids_visible.ndim != 3 or ids_visible.shape[1] < 2:
            raise ValueError(f"ids_visible must have shape (B, V, K) with V >= 2, got {tuple(ids_visible.shape)}.")
        outputs = self.vit(pixel_values, ids_visible, interpolate_pos_encoding, cls_only=True, **kwargs)

        # The similarities decide everything: in full precision even under autocast or with half-precision weights.
        with maybe_autocast(pixel_values.device.type, enabled=False):
            cls = outputs.pooler_output
            cls = cls.float() if cls.dtype in (torch.float16, torch.bfloat16) else cls
            view_embeds = (cls / cls.norm(dim=-1, keepdim=True)).unflatten(0, ids_visible.shape[:2])  # (B, V, D)
            loss, logits = self.contrast(view_embeds) if return_loss else (None, None)
        return MiclForPreTrainingOutput(
            loss=loss,
            logits=logits,
            view_embeds=view_embeds,
            ids_visible=ids_visible,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def contrast(self, view_embeds: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and the logits of embedded views (B, V, D); see `micl_loss`."""
        return micl_loss(
            view_embeds,
            temperature=self.config.temperature,
            kappa=self.config.kappa,
            similarity=self.config.similarity,
            negatives=self.config.negatives,
        )

    def sample_views(
        self, pixel_values: Tensor, noise: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Random disjoint views (B, V, K) of the images, by the config's mask ratio and number of views."""
        height, width = self.config.grid_of(*pixel_values.shape[-2:])
        return sample_views(
            pixel_values.shape[0],
            height * width,
            self.config.mask_ratio,
            self.config.num_views,
            noise=noise,
            generator=generator,
            device=pixel_values.device,
        )


class MiclForImageClassification(MiclPreTrainedModel):
    """Encoder with a linear head on the patches' mean after a fresh LayerNorm, or on [CLS] (`classifier_pooling`)."""

    # With mean pooling the encoder's final norm gives way to the fresh one, as in MAE's fine-tuning.
    _keys_to_ignore_on_load_unexpected = [r"^(vit\.)?layernorm\."]

    def __init__(self, config: MiclConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        mean_pooling = config.classifier_pooling == "mean"
        self.vit = MiclModel(config, add_final_norm=not mean_pooling)
        norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.fc_norm: nn.Module = norm if mean_pooling else nn.Identity()
        head = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.classifier: nn.Module = head
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        ids_visible: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageClassifierOutput:
        """Classify images, whole or by a share of their patches.

        Args:
            pixel_values: (B, C, H, W), floating point, normalised.
            labels: (B,) class indices; with them, the loss is computed too.
            ids_visible: (B, V, K) int64 patch indices. When given, only these patches are computed; the logits are the
                mean over the V views.
            interpolate_pos_encoding: accept images of another size than `config.image_size`.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Returns:
            `logits` (B, num_labels); the `loss` with labels.
        """
        outputs = self.vit(pixel_values, ids_visible, interpolate_pos_encoding, **kwargs)
        tokens = outputs.last_hidden_state
        pooled = tokens[:, 1:].mean(dim=1) if self.config.classifier_pooling == "mean" else tokens[:, 0]
        logits = self.classifier(self.fc_norm(pooled))
        if ids_visible is not None:
            logits = logits.unflatten(0, ids_visible.shape[:2]).mean(dim=1)
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class MiclBackbone(BackboneMixin, MiclModel):
    """Feature maps of the chosen layers, for detection and segmentation.

    Models with a `backbone_config` build this class from a `MiclConfig`, always with random weights; pre-trained ones
    are carried over with `load_state_dict`. A plain ViT's feature maps all have one size, 1/p of the image's.

    Example:
        >>> backbone = MiclBackbone.from_pretrained(folder, out_features=["stage6", "stage12"])
        >>> model = DetrForObjectDetection(DetrConfig(backbone_config=backbone.config))
        >>> model.model.backbone.model.load_state_dict(backbone.state_dict())
    """

    def __init__(self, config: MiclConfig) -> None:
        super().__init__(config)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: Tensor, **kwargs: Unpack[TransformersKwargs]) -> BackboneOutput:
        """Feature maps of whole images.

        Args:
            pixel_values: (B, C, H, W) of any size from one patch, floating point, normalised. What does not fill a
                patch at the right and at the bottom is left out.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Returns:
            `feature_maps`: one for each of `config.out_features`, (B, D, H // p, W // p), or the tokens (B, 1+L, D)
            when `config.reshape_hidden_states` is False.
        """
        outputs = MiclModel.forward(self, pixel_values, interpolate_pos_encoding=True, **kwargs)
        grid = self.config.grid_of(*pixel_values.shape[2:])
        feature_maps = []
        for stage, tokens in zip(self.stage_names, outputs.hidden_states, strict=True):
            if stage in self.out_features:
                tokens = self.layernorm(tokens) if self.config.apply_layernorm else tokens
                if self.config.reshape_hidden_states:
                    tokens = tokens[:, 1:].transpose(1, 2).unflatten(2, grid).contiguous()
                feature_maps.append(tokens)
        return BackboneOutput(
            feature_maps=tuple(feature_maps), hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


# Saving a model then writes this code beside it, also where it was itself loaded from such a folder.
MiclModel.register_for_auto_class("AutoModel")
MiclForPreTraining.register_for_auto_class("AutoModelForPreTraining")
MiclForImageClassification.register_for_auto_class("AutoModelForImageClassification")
MiclBackbone.register_for_auto_class("AutoBackbone")

__all__ = [
    "MiclBackbone",
    "MiclForImageClassification",
    "MiclForPreTraining",
    "MiclForPreTrainingOutput",
    "MiclModel",
    "MiclPreTrainedModel",
]
