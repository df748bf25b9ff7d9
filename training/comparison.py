"""What MiCL is compared with at equal compute: other ways to train the same encoder on the same images."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import PreTrainedModel, ViTMAEConfig, ViTMAEForPreTraining

from modeling_micl import MiclConfig, MiclForImageClassification, MiclModel, micl_loss
from modeling_micl.modeling_micl import sincos_position_embeddings
from training.batch import Batch
from training.config import PretrainConfig, setting
from training.features import normalize_pixels
from training.images import CropAndFlip, Transform, to_pixels
from training.monitor import gigaflop_per_image, layers_gigaflop


METHODS = ("micl", "mae", "simclr", "supervised")
NAMES = {"mae": "MAE", "simclr": "SimCLR", "supervised": "supervised training"}


@dataclass
class ComparisonConfig(PretrainConfig):
    """A run of another method; settings that it shares with MiCL mean the same."""

    method: Literal["micl", "mae", "simclr", "supervised"] = setting("micl", "micl is run by training.pretrain")
    decoder_width: int = setting(64, "mae: width of the decoder; published, about half the encoder's")
    decoder_layers: int = setting(1, "mae: depth of the decoder; published, a third of the encoder's")
    projector_width: int = setting(256, "simclr: width of the hidden layer of the projector")

    CHANGEABLE: ClassVar[set[str]] = PretrainConfig.CHANGEABLE


def gigaflop_per_trained_image(config: ComparisonConfig) -> float:
    """GFLOP of the transformer layers for one image, forward and backward; the others are left out."""
    model = config.model_config()
    if config.method == "micl":
        return gigaflop_per_image(model)
    width, mlp_width, layers = model.hidden_size, model.intermediate_size, model.num_hidden_layers
    whole = 1 + model.num_patches
    if config.method == "mae":
        seen = 1 + int(model.num_patches * (1 - config.mask_ratio))
        decoder = layers_gigaflop(whole, config.decoder_width, 4 * config.decoder_width, config.decoder_layers)
        return layers_gigaflop(seen, width, mlp_width, layers) + decoder
    if config.method == "simclr":
        return 2 * layers_gigaflop(whole, width, mlp_width, layers, cls_only=True)
    return layers_gigaflop(whole, width, mlp_width, layers)


class Mae(nn.Module):
    """Reconstruct masked patches (arXiv 2111.06377): transformers' model, on normalised patches as published."""

    def __init__(self, config: ComparisonConfig) -> None:
        super().__init__()
        wanted = config.model_config()
        self.config = wanted
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "layer_norm_eps")
        self.model = ViTMAEForPreTraining(
            ViTMAEConfig(
                **{name: getattr(wanted, name) for name in (*names, "image_size", "patch_size")},
                mask_ratio=config.mask_ratio,
                norm_pix_loss=True,
                decoder_hidden_size=config.decoder_width,
                decoder_num_hidden_layers=config.decoder_layers,
                decoder_num_attention_heads=max(config.decoder_width // 32, 1),
                decoder_intermediate_size=4 * config.decoder_width,
            )
        )
        self._initialise(wanted)

    @torch.no_grad()
    def _initialise(self, wanted: MiclConfig) -> None:
        """As published; transformers 5.23 leaves a new model's positions, [CLS] and mask tokens at zero."""
        self.model.vit.load_state_dict(MiclModel(wanted).state_dict())  # whose initialisation is MAE's
        decoder = self.model.decoder
        width = decoder.decoder_pos_embed.shape[-1]
        decoder.decoder_pos_embed.copy_(sincos_position_embeddings(width, *wanted.grid_size))
        nn.init.normal_(decoder.mask_token, std=0.02)
        for layer in decoder.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)

    def forward(self, batch: Batch) -> Tensor:
        """The loss."""
        loss: Tensor = self.model(normalize_pixels(batch.pixels)).loss
        return loss

    @property
    def network(self) -> PreTrainedModel:
        """All of it that has attention."""
        network: PreTrainedModel = self.model
        return network

    def encoder(self) -> MiclModel:
        """The encoder, in MiCL's class: the parameters have the same names."""
        encoder = MiclModel(self.config)
        encoder.load_state_dict(self.model.vit.state_dict())
        return encoder


class SimClr(nn.Module):
    """Contrast two random crops of each image, of which the encoder sees all patches (arXiv 2002.05709).

    With InfoNCE between the two crops, a projector of two layers, and no change of colours, which MiCL has not either.
    """

    def __init__(self, config: ComparisonConfig) -> None:
        super().__init__()
        self.vit, self.temperature = MiclModel(config.model_config()), config.temperature
        width, hidden = config.hidden_size, config.projector_width
        self.projector = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, batch: Batch) -> Tensor:
        """The loss; the two crops lie side by side."""
        crops = torch.stack(batch.pixels.chunk(2, dim=2), dim=1).flatten(0, 1)  # (2B, H, W, 3)
        embeds = self.projector(self.vit(normalize_pixels(crops), cls_only=True).pooler_output).float()
        loss, _ = micl_loss(normalize(embeds, dim=-1).unflatten(0, (-1, 2)), self.temperature, similarity="cosine")
        return loss

    @property
    def network(self) -> PreTrainedModel:
        """All of it that has attention."""
        return self.vit

    def encoder(self) -> MiclModel:
        """The encoder, without the projector."""
        return self.vit


class Supervised(nn.Module):
    """Learn the labels from scratch, from [CLS]."""

    def __init__(self, config: ComparisonConfig, num_labels: int) -> None:
        super().__init__()
        model = config.model_config()
        model.num_labels, model.classifier_pooling = num_labels, "cls"
        self.model = MiclForImageClassification(model)

    def forward(self, batch: Batch) -> Tensor:
        """The loss."""
        return cross_entropy(self.model(normalize_pixels(batch.pixels)).logits.float(), batch.labels)

    @property
    def network(self) -> PreTrainedModel:
        """All of it that has attention."""
        return self.model

    def encoder(self) -> MiclModel:
        """The encoder, without the head."""
        encoder: MiclModel = self.model.vit
        return encoder


Method = Mae | SimClr | Supervised


def build_method(config: ComparisonConfig, num_labels: int) -> Method:
    """The model of a method with random weights."""
    if config.method == "mae":
        return Mae(config)
    return SimClr(config) if config.method == "simclr" else Supervised(config, num_labels)


def transform_of(config: ComparisonConfig, size: tuple[int, int]) -> Transform:
    """Crop and flip as the settings say; two crops side by side for SimCLR."""
    crop = CropAndFlip(size, config.crop_min_scale, config.horizontal_flip)

    def two_crops(image: Image.Image, rng: np.random.Generator) -> Image.Image:
        return Image.fromarray(np.concatenate([to_pixels(crop(image, rng)) for _ in range(2)], axis=1))

    return two_crops if config.method == "simclr" else crop
