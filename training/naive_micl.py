"""MiCL the way one writes it down first: what the care in `modeling_micl` is worth is measured against it.

The method and its numbers are the same, but all patches are embedded before a view takes its own, every layer computes
all tokens of a view, and each view is a forward pass of its own. Attention is torch's.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, scaled_dot_product_attention

from modeling_micl import MiclConfig, visible_patches_per_view
from modeling_micl.configuration_micl import height_and_width


class NaiveLayer(nn.Module):
    """A pre-norm transformer layer.

    Args:
        width: of the tokens.
        heads: of attention, which divide it.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """(n, T, D) → (n, T, D)."""
        n, length, width = tokens.shape
        qkv = self.qkv(self.norm1(tokens)).reshape(n, length, 3, self.heads, width // self.heads)
        attended = scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
        tokens = tokens + self.projection(attended.transpose(1, 2).reshape(n, length, width))
        output: Tensor = tokens + self.mlp(self.norm2(tokens))
        return output


class NaiveMicl(nn.Module):
    """Two views of square images and their contrastive loss.

    Args:
        config: geometry and objective; initial weights are those of torch.
        views_together: encode both views in one forward pass instead of two.
    """

    def __init__(self, config: MiclConfig, views_together: bool = False) -> None:
        super().__init__()
        (patch, _), (grid, _) = height_and_width(config.patch_size), config.grid_size
        width = config.hidden_size
        self.views_together, self.temperature, self.kappa = views_together, config.temperature, config.kappa
        self.patches_per_view = visible_patches_per_view(grid**2, config.mask_ratio)
        self.patch_embedding = nn.Conv2d(config.num_channels, width, kernel_size=patch, stride=patch)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.register_buffer("positions", grid_positions(grid, width))
        self.layers = nn.Sequential(
            *(NaiveLayer(width, config.num_attention_heads) for _ in range(config.num_hidden_layers))
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """The loss.

        Args:
            images: (B, C, H, W), normalised.
            noise: (B, L), decides the views in place of random numbers: the smallest values are visible.
        """
        patches = self.patch_embedding(images).flatten(2).transpose(1, 2) + self.positions
        noise = torch.rand(patches.shape[:2], device=images.device) if noise is None else noise
        views = noise.argsort(dim=1)[:, : 2 * self.patches_per_view].chunk(2, dim=1)
        seen = [patches.gather(1, ids[..., None].expand(-1, -1, patches.shape[2])) for ids in views]
        if self.views_together:
            first, second = self.encode(torch.cat(seen)).chunk(2)
        else:
            first, second = map(self.encode, seen)
        with torch.autocast(images.device.type, enabled=False):
            return self.contrast(first.float(), second.float())

    def encode(self, patches: Tensor) -> Tensor:
        """(n, K, D) → [CLS] (n, D) of unit length."""
        tokens = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        return normalize(self.norm(self.layers(tokens))[:, 0], dim=-1)

    def contrast(self, first: Tensor, second: Tensor) -> Tensor:
        """T-SP similarity, and cross-entropy both ways."""
        cosine = first @ second.T
        logits = (1 + cosine) / 2 / (1 + self.kappa * (1 - cosine)) / self.temperature
        targets = torch.arange(len(logits), device=logits.device)
        return (cross_entropy(logits, targets) + cross_entropy(logits.T, targets)) / 2


def grid_positions(grid: int, width: int) -> Tensor:
    """(grid · grid, D) sines and cosines of a patch's column, then of its row."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(width // 4) / (width // 4))
    row, column = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    angles = [place.flatten()[:, None] * frequencies for place in (column, row)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
