"""The backbone's stages and sizes; what its feature maps hold is in test_heads_micl.py."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Dinov2Backbone, Dinov2Config

from modeling_micl import MiclBackbone, MiclConfig, MiclPreTrainedModel


Model = Callable[..., MiclPreTrainedModel]


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ({}, ["stage2"]),
        ({"out_features": ["stem"]}, ["stem"]),
        ({"out_features": ["stem", "stage2"], "out_indices": [0, 2]}, ["stem", "stage2"]),
        ({"out_indices": (0, 1)}, ["stem", "stage1"]),
        ({"out_indices": [-3, -1]}, ["stem", "stage2"]),
    ],
    ids=str,
)
def test_stages_are_chosen_by_name_or_index(
    choice: dict[str, Any], names: list[str], tiny_model: Model, pixel_values: Tensor
) -> None:
    everything = tiny_model(MiclBackbone, out_indices=[0, 1, 2])(pixel_values).feature_maps
    backbone = tiny_model(MiclBackbone, **choice)
    assert backbone.out_features == names
    assert backbone.channels == [32] * len(names)
    expected = [
        feature_map for name, feature_map in zip(backbone.stage_names, everything, strict=True) if name in names
    ]
    torch.testing.assert_close(list(backbone(pixel_values).feature_maps), expected, rtol=0, atol=0)


def test_stages_can_be_chosen_later(tiny_model: Model, pixel_values: Tensor) -> None:
    backbone = tiny_model(MiclBackbone, out_indices=[0, 1, 2])
    everything = backbone(pixel_values).feature_maps
    backbone.out_features = ["stem", "stage1"]
    assert (backbone.out_indices, backbone.channels) == ([0, 1], [32, 32])
    torch.testing.assert_close(backbone(pixel_values).feature_maps, everything[:2], rtol=0, atol=0)
    backbone.out_indices = [-1]
    assert backbone.out_features == ["stage2"]
    torch.testing.assert_close(backbone(pixel_values).feature_maps, everything[2:], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"out_features": ["stage3"]}, "subset of stage_names"),
        ({"out_features": ["stage2", "stage1"]}, "same order as stage_names"),
        ({"out_indices": [3]}, "valid indices"),
        ({"out_indices": [1, 1]}, "duplicates"),
        ({"out_features": ["stage1"], "out_indices": [2]}, "same stages"),
    ],
    ids=str,
)
def test_wrong_stages_are_refused(
    choice: dict[str, Any], message: str, tiny_config: Callable[..., MiclConfig]
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(**choice)


@pytest.mark.parametrize("size", [(8, 8), (15, 33), (40, 24), (100, 8)], ids=str)
@pytest.mark.parametrize("reshape_hidden_states", [True, False])
def test_feature_maps_have_the_shapes_of_dinov2s_at_any_size(
    size: tuple[int, int], reshape_hidden_states: bool, tiny_model: Model
) -> None:
    options = {"out_indices": [0, -1], "reshape_hidden_states": reshape_hidden_states}
    dinov2 = Dinov2Backbone(
        Dinov2Config(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8, **options
        )
    )
    image = torch.randn(1, 3, *size)
    feature_maps = tiny_model(MiclBackbone, **options)(image).feature_maps
    assert [m.shape for m in feature_maps] == [m.shape for m in dinov2(image).feature_maps]
    assert all(feature_map.is_contiguous() for feature_map in feature_maps)


@pytest.mark.parametrize("size", [(7, 40), (40, 7)])
def test_an_image_smaller_than_a_patch_is_refused(size: tuple[int, int], tiny_model: Model) -> None:
    with pytest.raises(ValueError, match=rf"\({size[0]}, {size[1]}\) pixels, less than one patch of patch_size=8"):
        tiny_model(MiclBackbone)(torch.randn(1, 3, *size))


def test_pixels_beyond_the_last_whole_patch_do_not_count(tiny_model: Model) -> None:
    backbone, image = tiny_model(MiclBackbone), torch.randn(1, 3, 35, 46)
    whole = torch.zeros_like(image)
    whole[:, :, :32, :40] = image[:, :, :32, :40]
    assert torch.equal(backbone(image).feature_maps[0], backbone(whole).feature_maps[0])


def test_an_image_alone_has_the_feature_maps_it_has_in_a_batch(tiny_model: Model) -> None:
    backbone, images = tiny_model(MiclBackbone, out_indices=[1, 2]), torch.randn(3, 3, 24, 48)
    batch = backbone(images).feature_maps
    for row in range(3):
        alone = backbone(images[row : row + 1]).feature_maps
        torch.testing.assert_close(alone, tuple(m[row : row + 1] for m in batch), rtol=1e-5, atol=1e-5)


def gradients(backbone: MiclPreTrainedModel, images: Tensor) -> dict[str, Tensor]:
    """Of all feature maps together; the sum alone would vanish in the LayerNorm."""
    backbone.zero_grad()
    torch.stack([feature_map.pow(3).mean() for feature_map in backbone(images).feature_maps]).sum().backward()
    return {name: p.grad.clone() for name, p in backbone.named_parameters() if p.grad is not None and p.grad.any()}


def test_gradients_reach_every_layer_up_to_the_deepest_stage_from_every_stage(
    tiny_model: Model, pixel_values: Tensor
) -> None:
    backbone = tiny_model(MiclBackbone, num_hidden_layers=3, out_features=["stage1", "stage2"]).train()
    both = gradients(backbone, pixel_values)
    trainable = {name for name, p in backbone.named_parameters() if p.requires_grad}
    assert both.keys() == {name for name in trainable if not name.startswith("layers.2.")}
    parts = []
    for stage in ("stage1", "stage2"):
        backbone.out_features = [stage]
        parts.append(gradients(backbone, pixel_values))
    assert not any(name.startswith("layers.1.") for name in parts[0])
    for name in parts[0]:
        torch.testing.assert_close(both[name], parts[0][name] + parts[1][name])


def test_gradient_checkpointing_keeps_the_gradients_of_all_stages(tiny_model: Model, pixel_values: Tensor) -> None:
    backbone = tiny_model(MiclBackbone, out_features=["stem", "stage1", "stage2"]).train()
    plain, runs = gradients(backbone, pixel_values), []
    backbone.activation_checkpointing_enable()
    backbone.layers[0].attention.register_forward_pre_hook(lambda *_: runs.append(1))
    checkpointed = gradients(backbone, pixel_values)
    assert len(runs) == 2
    torch.testing.assert_close(checkpointed, plain)


def test_half_precision_gives_nearly_the_same_feature_maps(tiny_model: Model) -> None:
    backbone, images = tiny_model(MiclBackbone, out_indices=[0, 2]), torch.randn(2, 3, 40, 56)
    exact = backbone(images).feature_maps
    with torch.autocast("cpu", torch.bfloat16):
        autocast = backbone(images).feature_maps
    half = backbone.bfloat16()(images).feature_maps
    assert {feature_map.dtype for feature_map in half} == {torch.bfloat16}
    for maps in (autocast, half):
        for feature_map, expected in zip(maps, exact, strict=True):
            assert not torch.equal(feature_map.float(), expected)
            torch.testing.assert_close(feature_map.float(), expected, rtol=0, atol=0.1)
