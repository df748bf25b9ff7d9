"""Pre-training by other programs and methods, each as it is written there, on the same encoder and images as ours.

- ours: `MiclForPreTraining`, as a run trains it;
- written naively: `training/naive_micl.py`, with torch's plain AdamW;
- MAE of transformers and of lightly: 75 % masked, the decoder of the paper (512 wide, 8 layers);
- SimCLR of lightly: two whole images, a projector of 2048 and 128;
- supervised: timm's ViT on whole images, 1000 classes.

All but the naive one have the optimiser of pre-training. lightly need not be installed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from modeling_micl import MiclConfig
from modeling_micl.configuration_micl import height_and_width
from training.naive_micl import NaiveMicl
from training.plain_step import Loss, PlainStep, contrastive_loss, micl_model, pretraining_optimizer, random_pixels


MAE_MASK_RATIO = 0.75
MAE_DECODER = {"width": 512, "layers": 8, "heads": 16}
CLASSES = 1000


@dataclass(frozen=True)
class Method:
    """A way to pre-train an encoder.

    Args:
        name: of the method.
        package: that it comes from; it may be missing.
        build: from the encoder's geometry and a device the model and its loss.
        plain_adamw: torch's AdamW as it is by default, in place of ours.
    """

    name: str
    package: str
    build: Callable[[MiclConfig, torch.device], tuple[nn.Module, Loss]]
    plain_adamw: bool = False

    @property
    def installed(self) -> bool:
        """Whether its package is."""
        return find_spec(self.package.replace("-", "_")) is not None

    @property
    def program(self) -> str:
        """Package and version."""
        return f"{self.package} {version(self.package)}" if self.installed else f"{self.package}, not installed"

    def step(self, config: MiclConfig, images: int, precision: str, device: torch.device) -> PlainStep:
        """A step of a new model."""
        torch.manual_seed(0)
        model, loss = self.build(config, device)
        optimizer = torch.optim.AdamW(model.parameters()) if self.plain_adamw else pretraining_optimizer(model)
        return PlainStep(loss, optimizer, random_pixels(images, config), precision)


def ours(config: MiclConfig, device: torch.device) -> tuple[nn.Module, Loss]:
    """MiCL of this project."""
    model = micl_model(config, device)
    return model, contrastive_loss(model, config)


def naive(config: MiclConfig, device: torch.device, views_together: bool = False) -> tuple[nn.Module, Loss]:
    """MiCL written naively."""
    model = NaiveMicl(config, views_together).to(device)
    return model, model


def naive_views_together(config: MiclConfig, device: torch.device) -> tuple[nn.Module, Loss]:
    """The same with both views in one forward pass."""
    return naive(config, device, views_together=True)


def transformers_mae(config: MiclConfig, device: torch.device) -> tuple[nn.Module, Loss]:
    """MAE with the decoder that transformers gives it."""
    geometry = {
        name: getattr(config, name)
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    }
    sizes = {name: height_and_width(getattr(config, name))[0] for name in ("image_size", "patch_size")}
    model = ViTMAEForPreTraining(ViTMAEConfig(**geometry, **sizes, mask_ratio=MAE_MASK_RATIO)).train().to(device)
    return model, lambda images: model(images).loss


def timm_vit(config: MiclConfig, classes: int) -> VisionTransformer:
    """The encoder as timm has it."""
    return VisionTransformer(
        img_size=height_and_width(config.image_size)[0],
        patch_size=height_and_width(config.patch_size)[0],
        embed_dim=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_classes=classes,
    ).train()


def supervised(config: MiclConfig, device: torch.device) -> tuple[nn.Module, Loss]:
    """A classifier of whole images."""
    model = timm_vit(config, CLASSES).to(device)
    return model, lambda images: cross_entropy(model(images), torch.arange(len(images), device=device) % CLASSES)


class LightlyMae(nn.Module):
    """MAE put together from lightly's parts."""

    def __init__(self, config: MiclConfig) -> None:
        from lightly.models.modules import MaskedVisionTransformerDecoderTIMM, MaskedVisionTransformerTIMM

        super().__init__()
        (self.patch, _), patches, width = height_and_width(config.patch_size), config.num_patches, MAE_DECODER["width"]
        self.encoder = MaskedVisionTransformerTIMM(timm_vit(config, classes=0))
        self.embedding = nn.Linear(config.hidden_size, width)
        self.decoder = MaskedVisionTransformerDecoderTIMM(patches, width, MAE_DECODER["layers"], MAE_DECODER["heads"])
        self.prediction = nn.Linear(width, config.num_channels * self.patch**2)

    def forward(self, images: Tensor) -> Tensor:
        """The loss: the mean squared error of the masked patches' pixels."""
        from lightly.models import utils

        size = (len(images), self.encoder.sequence_length)
        kept, masked = utils.random_token_mask(size, MAE_MASK_RATIO, device=images.device)
        encoded = self.embedding(self.encoder.encode(images, idx_keep=kept))
        tokens = utils.repeat_token(self.decoder.mask_token, size).to(encoded.dtype)
        decoded = self.decoder(utils.set_at_index(tokens, kept, encoded))
        targets = utils.get_at_index(utils.patchify(images, self.patch), masked - 1)  # there is no patch of [CLS]
        return mse_loss(self.prediction(utils.get_at_index(decoded, masked)), targets)


def lightly_mae(config: MiclConfig, device: torch.device) -> tuple[nn.Module, Loss]:
    """MAE of lightly."""
    model = LightlyMae(config).to(device)
    return model, model


def lightly_simclr(config: MiclConfig, device: torch.device) -> tuple[nn.Module, Loss]:
    """SimCLR of lightly; its second view are the mirrored images, which costs nothing beside the encoder."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead

    model = nn.Sequential(timm_vit(config, classes=0), SimCLRProjectionHead(config.hidden_size, 2048, 128))
    model, contrast = model.train().to(device), NTXentLoss()
    return model, lambda images: contrast(model(images), model(images.flip(3)))


OURS = Method("MiCL", "modeling-micl", ours)
METHODS = [
    OURS,
    Method("MiCL, written naively, views together", "torch", naive_views_together, plain_adamw=True),
    Method("MiCL, written naively", "torch", naive, plain_adamw=True),
    Method("MAE", "transformers", transformers_mae),
    Method("MAE", "lightly", lightly_mae),
    Method("SimCLR", "lightly", lightly_simclr),
    Method("supervised", "timm", supervised),
]
