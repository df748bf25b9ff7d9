from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from modeling_micl import MiclConfig, MiclForPreTraining, convert_official_state_dict
from modeling_micl.parameter_names import official_parameter_names


def official_weights(config: MiclConfig) -> dict[str, Tensor]:
    """Weights of the authors' shapes, each filled with its own numbers."""
    ours = MiclForPreTraining(config).state_dict()
    return {
        official: torch.randn(len(names) * ours[names[0]].shape[0], *ours[names[0]].shape[1:])
        for official, names in official_parameter_names(config).items()
    }


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_converted_weights_fill_the_model_strictly(qkv_bias: bool, tiny_config: Callable[..., MiclConfig]) -> None:
    config = tiny_config(qkv_bias=qkv_bias)
    weights = official_weights(config)
    model = MiclForPreTraining(config)
    model.load_state_dict(convert_official_state_dict(weights, config), strict=True)
    assert torch.equal(model.vit.layers[1].mlp.fc2.weight, weights["blocks.1.mlp.fc2.weight"])
    assert torch.equal(model.vit.layers[1].layernorm_after.bias, weights["blocks.1.norm2.bias"])
    assert torch.equal(model.vit.layers[0].attention.o_proj.weight, weights["blocks.0.attn.proj.weight"])
    assert torch.equal(model.vit.embeddings.position_embeddings, weights["pos_embed"])


def test_the_fused_rows_are_query_key_and_value_in_this_order(tiny_config: Callable[..., MiclConfig]) -> None:
    config = tiny_config()
    weights = official_weights(config)
    converted = convert_official_state_dict(weights, config)
    for kind in ("weight", "bias"):
        parts = [converted[f"vit.layers.1.attention.{p}_proj.{kind}"] for p in "qkv"]
        assert torch.equal(torch.cat(parts), weights[f"blocks.1.attn.qkv.{kind}"])


def test_converted_weights_share_no_memory_with_the_official_ones(tiny_config: Callable[..., MiclConfig]) -> None:
    config = tiny_config()
    weights = official_weights(config)
    converted = convert_official_state_dict(weights, config)
    before = {name: value.clone() for name, value in converted.items()}
    for value in weights.values():
        value.zero_()
    assert all(torch.equal(converted[name], before[name]) for name in before)


def test_every_parameter_has_exactly_one_official_name(tiny_config: Callable[..., MiclConfig]) -> None:
    config = tiny_config()
    ours = [name for names in official_parameter_names(config).values() for name in names]
    assert sorted(ours) == sorted(MiclForPreTraining(config).state_dict())


def test_missing_and_unexpected_weights_are_named(tiny_config: Callable[..., MiclConfig]) -> None:
    config = tiny_config()
    weights = official_weights(config)
    weights["head.weight"] = weights.pop("blocks.1.norm1.bias")
    with pytest.raises(ValueError, match=r"missing \['blocks.1.norm1.bias'\], unexpected \['head.weight'\]"):
        convert_official_state_dict(weights, config)


def test_weights_of_another_depth_are_refused_with_a_hint(tiny_config: Callable[..., MiclConfig]) -> None:
    weights = official_weights(tiny_config(num_hidden_layers=3))
    with pytest.raises(ValueError, match=r"with 2 layers.*blocks\.2\..*Check num_hidden_layers"):
        convert_official_state_dict(weights, tiny_config())
