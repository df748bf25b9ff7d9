"""The method written a second time, slowly and one image at a time, in float64."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from modeling_micl import MiclConfig, MiclForPreTraining, MiclPreTrainedModel


Weights = dict[str, Tensor]


def position(row: int, column: int, width: int) -> Tensor:
    quarter = width // 4
    parts = [
        [function(place / 10_000 ** (i / quarter)) for i in range(quarter)]
        for place in (column, row)
        for function in (math.sin, math.cos)
    ]
    return torch.tensor(sum(parts, []), dtype=torch.float64)


def layer_norm(x: Tensor, weights: Weights, name: str, eps: float) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / (variance + eps).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)


def attention(x: Tensor, weights: Weights, name: str, heads: int) -> Tensor:
    q, k, v = (linear(x, weights, f"{name}.{p}_proj").chunk(heads, dim=-1) for p in "qkv")
    mixed = [(q[h] @ k[h].T / math.sqrt(q[h].shape[1])).softmax(-1) @ v[h] for h in range(heads)]
    return linear(torch.cat(mixed, dim=-1), weights, f"{name}.o_proj")


def encode(tokens: Tensor, weights: Weights, config: MiclConfig) -> Tensor:
    for i in range(config.num_hidden_layers):
        layer = f"vit.layers.{i}"
        normed = layer_norm(tokens, weights, f"{layer}.layernorm_before", config.layer_norm_eps)
        tokens = tokens + attention(normed, weights, f"{layer}.attention", config.num_attention_heads)
        normed = layer_norm(tokens, weights, f"{layer}.layernorm_after", config.layer_norm_eps)
        hidden = linear(normed, weights, f"{layer}.mlp.fc1")
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        tokens = tokens + linear(hidden, weights, f"{layer}.mlp.fc2")
    return layer_norm(tokens, weights, "vit.layernorm", config.layer_norm_eps)


def embed_patches(image: Tensor, weights: Weights, config: MiclConfig) -> list[Tensor]:
    (height, width), name = config.patch_size, "vit.embeddings.patch_embeddings.projection"
    patches = []
    for row in range(image.shape[1] // height):
        for column in range(image.shape[2] // width):
            pixels = image[:, row * height : (row + 1) * height, column * width : (column + 1) * width]
            patch = weights[f"{name}.weight"].flatten(1) @ pixels.flatten() + weights[f"{name}.bias"]
            patches.append(patch + position(row, column, config.hidden_size))
    return patches


def embed_views(image: Tensor, noise: Tensor, weights: Weights, config: MiclConfig) -> Tensor:
    patches = embed_patches(image, weights, config)
    order = sorted(range(len(patches)), key=noise.tolist().__getitem__)
    count = int(len(patches) * (1 - config.mask_ratio)) // config.num_views
    views = []
    for view in range(config.num_views):
        seen = [patches[i] for i in order[view * count : (view + 1) * count]]
        cls = encode(torch.stack([weights["vit.embeddings.cls_token"][0, 0], *seen]), weights, config)[0]
        views.append(cls / (cls * cls).sum().sqrt())
    return torch.stack(views)  # (V, D)


def contrast(view_embeds: Tensor, config: MiclConfig) -> Tensor:
    losses = []
    batch_size, num_views, _ = view_embeds.shape
    for a in range(num_views):
        for b in set(range(num_views)) - {a}:
            for i in range(batch_size):
                exponentials = []
                for j in range(batch_size):
                    s = view_embeds[i, a] @ view_embeds[j, b]
                    if config.similarity == "t-sp":
                        s = (1 + s) / (1 + config.kappa * (1 - s)) / 2
                    exponentials.append((s / config.temperature).exp())
                losses.append(-(exponentials[i] / sum(exponentials)).log())
    return sum(losses) / len(losses)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"image_size": (24, 40), "mask_ratio": 0.4},
        {"image_size": (24, 32), "patch_size": (6, 4), "mask_ratio": 0.75},
        {"num_views": 3, "mask_ratio": 0.25, "kappa": 0.5},
        {"similarity": "cosine", "temperature": 0.2},
        {"mask_ratio": 0},
        {"qkv_bias": False, "num_channels": 1, "num_attention_heads": 4, "kappa": -0.25, "layer_norm_eps": 1e-3},
    ],
    ids=str,
)
def test_loss_embeddings_and_gradients_are_those_of_the_naive_method(
    overrides: dict[str, Any], tiny_model: Callable[..., MiclPreTrainedModel]
) -> None:
    sizes = {"image_size": (32, 32), "patch_size": (8, 8)}
    model = tiny_model(MiclForPreTraining, **{**sizes, **overrides}).double()
    model.set_attn_implementation("sdpa")  # eager takes its softmax in float32
    # The model's own table is rounded to float32.
    with torch.no_grad():
        rows, columns = model.config.grid_size
        table = [position(row, column, model.config.hidden_size) for row in range(rows) for column in range(columns)]
        stored = model.vit.embeddings.position_embeddings
        torch.testing.assert_close(stored[0, 1:], torch.stack(table), rtol=0, atol=6e-8)
        stored[0, 1:] = torch.stack(table)
    images = torch.randn(3, model.config.num_channels, *model.config.image_size, dtype=torch.float64)
    noise = torch.rand(3, model.config.num_patches, dtype=torch.float64)
    weights = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}

    embeds = torch.stack([embed_views(*pair, weights, model.config) for pair in zip(images, noise, strict=True)])
    loss = contrast(embeds, model.config)
    loss.backward()
    outputs = model(images, noise=noise)
    outputs.loss.backward()

    torch.testing.assert_close(outputs.view_embeds, embeds, rtol=0, atol=1e-12)
    torch.testing.assert_close(outputs.loss, loss, rtol=0, atol=1e-12)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, weights[name].grad, rtol=1e-9, atol=1e-12, msg=name)
