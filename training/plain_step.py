"""A training step whose forward pass, backward pass and optimiser are apart, for any model and loss.

The images are in the CPU's memory as if they had been decoded; bringing them to the device and normalising them is
part of the forward pass, as in training.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from modeling_micl import MiclConfig, MiclForPreTraining, sample_views
from modeling_micl.configuration_micl import height_and_width
from training.arithmetic import DTYPES, count_gigaflop
from training.features import normalize_pixels
from training.optim import build_optimizer
from training.run import choose_attention
from training.timing import Step


# Normalised images (n, 3, H, W) to the loss
Loss = Callable[[Tensor], Tensor]
COUNTED = 2  # images that operations are counted with


def random_pixels(images: int, config: MiclConfig) -> Tensor:
    """Noise of the model's size, (images, H, W, 3) uint8, in pinned memory if there is a GPU."""
    size = (images, *height_and_width(config.image_size), config.num_channels)
    pixels = torch.randint(0, 256, size, dtype=torch.uint8)
    return pixels.pin_memory() if torch.cuda.is_available() else pixels


class PlainStep:
    """One step.

    Args:
        loss: of normalised images on the device.
        optimizer: of the parameters that the loss depends on.
        pixels: (n, H, W, 3) uint8, of one step.
        precision: fp32, or bf16 for autocast.
    """

    def __init__(self, loss: Loss, optimizer: torch.optim.Optimizer, pixels: Tensor, precision: str) -> None:
        self.loss, self.optimizer, self.pixels, self.precision = loss, optimizer, pixels, precision
        self.device: torch.device = optimizer.param_groups[0]["params"][0].device
        self.value: Tensor | None = None

    @property
    def phases(self) -> list[Step]:
        """Forward, backward, optimiser."""
        return [self.forward, self.backward, self.update]

    def forward(self) -> None:
        """Compute the loss."""
        self.value = self._loss_of(self.pixels)

    def backward(self) -> None:
        """Add its gradient to the parameters."""
        assert self.value is not None
        self.value.backward()
        self.value = None

    def update(self) -> None:
        """Make the optimiser's step."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def __call__(self) -> None:
        """All three."""
        for phase in self.phases:
            phase()

    def gigaflop_per_image(self) -> float:
        """Operations of forward and backward pass, counted with a few of the images."""
        pixels = self.pixels[:COUNTED]
        counted = count_gigaflop(lambda: self._loss_of(pixels))
        self.optimizer.zero_grad()
        return counted / len(pixels)

    def _loss_of(self, pixels: Tensor) -> Tensor:
        images = normalize_pixels(pixels.to(self.device, non_blocking=True))
        dtype = DTYPES[self.precision]
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=dtype != torch.float32):
            return self.loss(images)


def micl_model(config: MiclConfig, device: torch.device, attention: str | None = None) -> MiclForPreTraining:
    """The model as a run trains it, with random weights; `attention` by another implementation of transformers."""
    model = MiclForPreTraining(deepcopy(config))  # the attention is set in it
    model.train()
    choose_attention(model, device)
    if attention:
        model.set_attn_implementation(attention)
    model.to(device)
    return model


def contrastive_loss(model: Callable[..., Any], config: MiclConfig) -> Loss:
    """The loss of images whose views are drawn anew each time, by the config's mask ratio.

    Args:
        model: a `MiclForPreTraining`, as it is, compiled, or wrapped for several processes.
        config: of it, or the same with another mask ratio.
    """

    def loss(images: Tensor) -> Tensor:
        ids_visible = sample_views(len(images), config.num_patches, config.mask_ratio, device=images.device)
        value: Tensor = model(images, ids_visible=ids_visible).loss
        return value

    return loss


def pretraining_optimizer(model: nn.Module) -> torch.optim.AdamW:
    """That of pre-training: fused AdamW."""
    return build_optimizer(model, weight_decay=0.05, betas=(0.9, 0.95), learning_rate=1e-4)
