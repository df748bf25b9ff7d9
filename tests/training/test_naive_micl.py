"""The naive MiCL is MiCL: same loss and gradients from the same weights and views."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from modeling_micl import MiclForPreTraining, MiclPreTrainedModel
from training.naive_micl import NaiveMicl


NAMES = {"patch_embedding": "embeddings.patch_embeddings.projection", "norm": "layernorm"}
LAYER = {"norm1": "layernorm_before", "norm2": "layernorm_after", "projection": "attention.o_proj"}
LAYER |= {"mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2"}


def weight_of(theirs: dict[str, Tensor], name: str) -> Tensor:
    """The same weight by its name in the naive model."""
    if name == "cls_token":
        return theirs["embeddings.cls_token"]
    module, kind = name.rsplit(".", 1)
    if not module.startswith("layers."):
        return theirs[f"{NAMES[module]}.{kind}"]
    _, number, part = module.split(".", 2)
    if part == "qkv":
        return torch.cat([theirs[f"layers.{number}.attention.{p}_proj.{kind}"] for p in "qkv"])
    return theirs[f"layers.{number}.{LAYER[part]}.{kind}"]


@pytest.mark.parametrize("views_together", [False, True])
def test_loss_and_gradients_are_equal(
    views_together: bool, tiny_model: Callable[..., MiclPreTrainedModel], pixel_values: Tensor
) -> None:
    model = tiny_model(MiclForPreTraining, intermediate_size=128, kappa=0.3)
    naive = NaiveMicl(model.config, views_together)
    theirs = dict(model.vit.named_parameters())
    with torch.no_grad():
        for name, parameter in naive.named_parameters():
            parameter.copy_(weight_of(theirs, name))
    noise = torch.rand(3, 16)
    expected = model(pixel_values, noise=noise).loss
    expected.backward()
    loss = naive(pixel_values, noise)
    loss.backward()

    torch.testing.assert_close(naive.positions, theirs["embeddings.position_embeddings"][0, 1:])
    torch.testing.assert_close(loss, expected)
    gradients = {name: p.grad for name, p in theirs.items() if p.grad is not None}
    for name, parameter in naive.named_parameters():
        torch.testing.assert_close(parameter.grad, weight_of(gradients, name), rtol=1e-3, atol=1e-6, msg=name)


def test_views_are_drawn_anew_without_noise(
    tiny_model: Callable[..., MiclPreTrainedModel], pixel_values: Tensor
) -> None:
    naive = NaiveMicl(tiny_model(MiclForPreTraining).config)
    assert naive(pixel_values) != naive(pixel_values)
