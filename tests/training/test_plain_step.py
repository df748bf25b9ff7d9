"""The plain step is one of training, in its phases; its counted operations are those of the formula."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from modeling_micl import MiclConfig, MiclForPreTraining, visible_patches_per_view
from training.features import normalize_pixels
from training.monitor import gigaflop_per_image
from training.plain_step import PlainStep, contrastive_loss, micl_model, pretraining_optimizer, random_pixels


CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("no_accelerator")


def make_step(model: MiclForPreTraining, config: MiclConfig, images: int, precision: str = "fp32") -> PlainStep:
    pixels = random_pixels(images, config)
    return PlainStep(contrastive_loss(model, config), pretraining_optimizer(model), pixels, precision)


def test_each_phase_does_its_part(tiny_config: Callable[..., MiclConfig]) -> None:
    model = micl_model(tiny_config(), CPU)
    assert model.training
    step = make_step(model, model.config, images=4)
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    step.forward()
    torch.testing.assert_close(seen, [normalize_pixels(step.pixels)])
    assert all(p.grad is None for p in model.parameters())
    step.backward()
    assert all(
        p.grad is not None and (p == before[name]).all() for name, p in model.named_parameters() if name in before
    )
    step.update()
    assert all(p.grad is None and (p != before[name]).any() for name, p in model.named_parameters() if name in before)


def test_the_mask_ratio_is_that_of_the_step(tiny_config: Callable[..., MiclConfig]) -> None:
    model = micl_model(tiny_config(mask_ratio=0.5), CPU)
    seen: list[Any] = []
    model.vit.register_forward_pre_hook(lambda _, given: seen.append(given[1].shape))
    make_step(model, tiny_config(mask_ratio=0.75), images=3).forward()
    assert seen == [(3, 2, 2)]


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_forward_pass_has_its_precision(
    precision: str, dtype: torch.dtype, tiny_config: Callable[..., MiclConfig]
) -> None:
    model = micl_model(tiny_config(), CPU)
    seen: list[torch.dtype] = []
    model.vit.layers[0].mlp.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    make_step(model, model.config, images=2, precision=precision)()
    assert seen == [dtype]


@pytest.mark.parametrize("mask_ratio", [0.5, 0.8])
def test_counted_operations_are_those_of_the_formula(mask_ratio: float) -> None:
    config = MiclConfig(
        **{"image_size": 96, "patch_size": 8, "hidden_size": 64, "intermediate_size": 256, "mask_ratio": mask_ratio},
        **{"num_hidden_layers": 3, "num_attention_heads": 2},
    )
    model = micl_model(config, CPU)
    counted = make_step(model, config, images=5).gigaflop_per_image()
    visible = 2 * visible_patches_per_view(config.num_patches, mask_ratio)
    embedding = 2 * 2 * visible * (3 * 8 * 8) * 64 / 1e9  # forward and weights; pixels have no gradient
    contrast = 2 * 3 * 2 * 2 * 64 / 1e9  # two directions, two candidates for each image
    assert counted == pytest.approx(gigaflop_per_image(config) + embedding + contrast, rel=1e-6)
    assert all(p.grad is None for p in model.parameters())
