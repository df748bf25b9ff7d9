"""The same numbers however the model is run, stored or loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from modeling_micl import (
    MiclBackbone,
    MiclForImageClassification,
    MiclForPreTraining,
    MiclModel,
    MiclPreTrainedModel,
    sample_views,
)


Model = Callable[..., MiclPreTrainedModel]


def outputs_with(model: MiclPreTrainedModel, attention: str, pixel_values: Tensor, ids_visible: Tensor) -> Any:
    model.set_attn_implementation(attention)
    with torch.no_grad():
        outputs = model(pixel_values, ids_visible=ids_visible)
    return outputs.loss, outputs.logits, outputs.view_embeds


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)])
def test_every_attention_implementation_gives_the_eager_numbers(
    attention: str, tiny_model: Model, pixel_values: Tensor
) -> None:
    model, ids_visible = tiny_model(MiclForPreTraining), sample_views(3, 16, 0.5)
    expected = outputs_with(model, "eager", pixel_values, ids_visible)
    actual = outputs_with(model, attention, pixel_values, ids_visible)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def gradients(
    model: MiclPreTrainedModel, pixel_values: Tensor, ids_visible: Tensor, **options: Any
) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(7)  # of drop path
    model(pixel_values, ids_visible=ids_visible, **options).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_last_layer_for_cls_alone_gives_the_gradients_of_the_whole_one(
    attention: str, depth: int, tiny_model: Model, pixel_values: Tensor
) -> None:
    model = tiny_model(MiclForPreTraining, drop_path_rate=0.3, num_hidden_layers=depth).double().train()
    model.set_attn_implementation(attention)
    tokens = []
    model.vit.layers[-1].mlp.register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0].shape[1]))
    ids_visible = sample_views(3, 16, 0.5)
    whole = gradients(model, pixel_values, ids_visible, output_hidden_states=True)
    short = gradients(model, pixel_values, ids_visible)
    assert tokens == [5, 1]
    torch.testing.assert_close(short, whole, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("recorded", [{}, {"output_attentions": True}])
def test_the_encoder_gives_cls_alone_on_request(
    recorded: dict[str, bool], tiny_model: Model, pixel_values: Tensor
) -> None:
    model = tiny_model(MiclModel, attn_implementation="eager")
    outputs = model(pixel_values, cls_only=True, **recorded)
    assert outputs.last_hidden_state.shape == (3, 1, 32)
    torch.testing.assert_close(outputs.last_hidden_state[:, 0], outputs.pooler_output)
    torch.testing.assert_close(outputs.pooler_output, model(pixel_values).pooler_output)


@pytest.mark.parametrize("drop_path_rate", [0.0, 0.5])
def test_gradient_checkpointing_recomputes_instead_of_storing_and_changes_nothing(
    drop_path_rate: float, tiny_model: Model, pixel_values: Tensor
) -> None:
    model = tiny_model(MiclForPreTraining, drop_path_rate=drop_path_rate).train()
    ids_visible = sample_views(3, 16, 0.5)
    runs = []
    model.vit.layers[0].attention.register_forward_pre_hook(lambda *_: runs.append(1))
    plain = gradients(model, pixel_values, ids_visible)
    assert len(runs) == 1
    model.activation_checkpointing_enable()
    checkpointed = gradients(model, pixel_values, ids_visible)
    assert len(runs) == 3
    torch.testing.assert_close(checkpointed, plain)


def test_autocast_computes_the_loss_in_full_precision(tiny_model: Model, pixel_values: Tensor) -> None:
    model, ids_visible = tiny_model(MiclForPreTraining), sample_views(3, 16, 0.5)
    exact = model(pixel_values, ids_visible=ids_visible)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(pixel_values, ids_visible=ids_visible)
    assert outputs.loss.dtype == outputs.logits.dtype == outputs.view_embeds.dtype == torch.float32
    torch.testing.assert_close(outputs.view_embeds.norm(dim=-1), torch.ones(3, 2))
    torch.testing.assert_close(outputs.view_embeds, exact.view_embeds, rtol=0, atol=0.05)
    assert not torch.equal(outputs.view_embeds, exact.view_embeds)  # autocast did reach the encoder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_model_computes_the_loss_in_full_precision(
    dtype: torch.dtype, tiny_model: Model, pixel_values: Tensor, tmp_path: Path
) -> None:
    model, ids_visible = tiny_model(MiclForPreTraining), sample_views(3, 16, 0.5)
    model.save_pretrained(tmp_path)
    half = MiclForPreTraining.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    outputs = half(pixel_values, ids_visible=ids_visible)
    assert outputs.loss.dtype == outputs.view_embeds.dtype == torch.float32
    exact = model(pixel_values, ids_visible=ids_visible)
    torch.testing.assert_close(outputs.view_embeds, exact.view_embeds, rtol=0, atol=0.05)
    torch.testing.assert_close(outputs.view_embeds.norm(dim=-1), torch.ones(3, 2))


@pytest.mark.parametrize("model_class", [MiclModel, MiclForPreTraining, MiclForImageClassification, MiclBackbone])
@pytest.mark.parametrize("options", [{}, {"device_map": "cpu"}, {"device_map": "auto"}], ids=str)
def test_saving_and_loading_keeps_every_bit(
    model_class: type[MiclPreTrainedModel], options: dict[str, str], tiny_model: Model, tmp_path: Path
) -> None:
    model = tiny_model(model_class, image_size=(32, 48), patch_size=(8, 4), num_labels=5, num_views=3)
    model.save_pretrained(tmp_path)
    loaded, info = model_class.from_pretrained(tmp_path, output_loading_info=True, **options)
    assert not any(info.values())
    assert not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter)
        assert loaded.get_parameter(name).requires_grad == parameter.requires_grad


def test_loading_can_change_the_objective(tiny_model: Model, tmp_path: Path) -> None:
    tiny_model(MiclForPreTraining).save_pretrained(tmp_path)
    model = MiclForPreTraining.from_pretrained(tmp_path, temperature=0.2, negatives="global", drop_path_rate=0.1)
    assert (model.config.temperature, model.config.negatives) == (0.2, "global")
    assert model.vit.layers[-1].drop_path.drop_prob == 0.1


@pytest.mark.parametrize("model_class", [MiclModel, MiclForImageClassification, MiclBackbone])
def test_an_exported_program_takes_any_batch_size(
    model_class: type[MiclPreTrainedModel], tiny_model: Model, pixel_values: Tensor
) -> None:
    model = tiny_model(model_class)
    batch = {"pixel_values": {0: torch.export.Dim("batch_size")}}
    program = torch.export.export(model, (pixel_values,), dynamic_shapes=batch)
    five_images = torch.randn(5, 3, 32, 32)
    expected, actual = model(five_images).to_tuple()[0], program.module()(five_images).to_tuple()[0]
    torch.testing.assert_close(actual, expected)


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_loss_and_gradients(tiny_model: Model, pixel_values: Tensor) -> None:
    model, ids_visible = tiny_model(MiclForPreTraining).train(), sample_views(3, 16, 0.5)
    plain = gradients(model, pixel_values, ids_visible)
    loss = model(pixel_values, ids_visible=ids_visible).loss
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(pixel_values, ids_visible=ids_visible).loss, loss)
    compiled_gradients = gradients(compiled, pixel_values, ids_visible)
    assert len(compiled_gradients) == len(plain)
    for name, gradient in plain.items():
        torch.testing.assert_close(compiled_gradients[f"_orig_mod.{name}"], gradient, rtol=1e-4, atol=1e-5)
