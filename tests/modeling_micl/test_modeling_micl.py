"""The encoder and the pre-training model: what they see, return and refuse. Heads have their own file."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from modeling_micl import MiclForPreTraining, MiclModel, MiclPreTrainedModel, micl_loss, sample_views


Model = Callable[..., MiclPreTrainedModel]


@pytest.mark.parametrize("training", [False, True])
def test_the_encoder_masks_nothing_unless_told(training: bool, tiny_model: Model, pixel_values: Tensor) -> None:
    outputs = tiny_model(MiclModel, mask_ratio=0.8).train(training)(pixel_values)
    assert outputs.last_hidden_state.shape == (3, 17, 32)
    assert torch.equal(outputs.pooler_output, outputs.last_hidden_state[:, 0])


def test_one_view_of_all_patches_in_order_is_the_whole_image(tiny_model: Model, pixel_values: Tensor) -> None:
    model = tiny_model(MiclModel)
    everything = torch.arange(16).expand(3, 1, -1)
    torch.testing.assert_close(
        model(pixel_values, ids_visible=everything).last_hidden_state, model(pixel_values).last_hidden_state
    )


def test_the_order_of_the_patches_of_a_view_only_orders_its_tokens(tiny_model: Model, pixel_values: Tensor) -> None:
    model, ids_visible = tiny_model(MiclModel), torch.randperm(16)[:6].expand(3, 1, -1)
    tokens = model(pixel_values, ids_visible).last_hidden_state
    reversed_tokens = model(pixel_values, ids_visible.flip(-1)).last_hidden_state
    torch.testing.assert_close(reversed_tokens[:, 1:].flip(1), tokens[:, 1:])
    torch.testing.assert_close(reversed_tokens[:, 0], tokens[:, 0])


def test_views_of_one_image_lie_side_by_side_and_do_not_mix(tiny_model: Model, pixel_values: Tensor) -> None:
    model, ids_visible = tiny_model(MiclModel), sample_views(3, 16, 0.25, num_views=3)
    together = model(pixel_values, ids_visible).last_hidden_state
    assert together.shape == (9, 5, 32)
    for image in range(3):
        for view in range(3):
            alone = model(pixel_values[image, None], ids_visible[image, view][None, None]).last_hidden_state
            torch.testing.assert_close(together[3 * image + view], alone[0])


def test_a_view_depends_on_its_own_patches_only(tiny_model: Model, pixel_values: Tensor) -> None:
    model, ids_visible = tiny_model(MiclModel), torch.tensor([[[0, 5], [1, 15]]])
    image = pixel_values[:1].clone().requires_grad_()
    model(image, ids_visible).pooler_output[1].sum().backward()
    touched = image.grad.abs().sum(1).unflatten(1, (4, 8)).unflatten(3, (4, 8)).sum((0, 2, 4)).flatten()
    assert touched.nonzero().flatten().tolist() == [1, 15]


def test_the_pretraining_loss_is_that_of_the_views_it_reports(tiny_model: Model, pixel_values: Tensor) -> None:
    model = tiny_model(MiclForPreTraining, temperature=0.2, kappa=0.5, num_views=3, mask_ratio=0.25)
    outputs = model(pixel_values)
    cls = model.vit(pixel_values, outputs.ids_visible).pooler_output.unflatten(0, (3, 3))
    torch.testing.assert_close(outputs.view_embeds, cls / cls.norm(dim=-1, keepdim=True))
    expected = micl_loss(outputs.view_embeds, temperature=0.2, kappa=0.5)
    torch.testing.assert_close((outputs.loss, outputs.logits), expected)
    assert outputs.logits.shape == (6, 3, 3)


def test_views_can_be_embedded_now_and_contrasted_later(tiny_model: Model, pixel_values: Tensor) -> None:
    model = tiny_model(MiclForPreTraining, similarity="cosine", temperature=0.2, num_views=3)
    noise = torch.rand(3, 16, generator=torch.Generator().manual_seed(2))
    whole = model(pixel_values, noise=noise)
    parts = [
        model(pixel_values[i : i + 1], noise=noise[i : i + 1], return_loss=False, output_hidden_states=True)
        for i in range(3)
    ]
    assert parts[0].keys() == {"view_embeds", "ids_visible", "hidden_states"}
    loss, logits = model.contrast(torch.cat([part.view_embeds for part in parts]))
    torch.testing.assert_close(loss, whole.loss)
    torch.testing.assert_close(logits, whole.logits)


def test_noise_seed_and_views_decide_alike(tiny_model: Model, pixel_values: Tensor) -> None:
    model, noise = tiny_model(MiclForPreTraining), torch.rand(3, 16)
    by_noise = model(pixel_values, noise=noise)
    by_views = model(pixel_values, ids_visible=sample_views(3, 16, 0.5, noise=noise))
    assert torch.equal(by_noise.ids_visible, by_views.ids_visible)
    assert torch.equal(by_noise.loss, by_views.loss)
    drawn = [model(pixel_values, generator=torch.Generator().manual_seed(seed)).ids_visible for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_the_views_have_the_configured_number_and_size(tiny_model: Model, pixel_values: Tensor) -> None:
    outputs = tiny_model(MiclForPreTraining, num_views=3, mask_ratio=0.25).train()(pixel_values)
    assert outputs.ids_visible.shape == (3, 3, 4)
    assert outputs.view_embeds.shape == (3, 3, 32)


def test_frozen_positions_get_no_gradient_and_everything_else_does(tiny_model: Model, pixel_values: Tensor) -> None:
    model = tiny_model(MiclForPreTraining).train()
    model(pixel_values).loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == ["vit.embeddings.position_embeddings"]
    zero = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.any()]
    assert zero == []


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_hidden_states_are_the_embeddings_and_every_layers_output(
    attention: str, tiny_model: Model, pixel_values: Tensor
) -> None:
    model = tiny_model(MiclForPreTraining)
    model.set_attn_implementation(attention)
    outputs = model(pixel_values, output_hidden_states=True)
    assert [tuple(states.shape) for states in outputs.hidden_states] == [(6, 5, 32)] * 3
    torch.testing.assert_close(outputs.hidden_states[0], model.vit.embeddings(pixel_values, outputs.ids_visible))
    cls = model.vit.layernorm(outputs.hidden_states[-1])[:, 0].unflatten(0, (3, 2))
    torch.testing.assert_close(outputs.view_embeds, cls / cls.norm(dim=-1, keepdim=True))
    assert model(pixel_values).hidden_states is None


def test_attentions_are_distributions_for_every_layer_and_head(tiny_model: Model, pixel_values: Tensor) -> None:
    model = tiny_model(MiclForPreTraining)
    model.set_attn_implementation("eager")
    attentions = model(pixel_values, output_attentions=True).attentions
    assert [tuple(weights.shape) for weights in attentions] == [(6, 2, 5, 5)] * 2
    torch.testing.assert_close(attentions[1].sum(-1), torch.ones(6, 2, 5))
    assert model(pixel_values).attentions is None


def test_outputs_come_as_a_tuple_on_request(tiny_model: Model, pixel_values: Tensor) -> None:
    model, noise = tiny_model(MiclForPreTraining), torch.rand(3, 16)
    named, plain = (model(pixel_values, noise=noise, return_dict=wanted) for wanted in (True, False))
    assert isinstance(plain, tuple)
    for value, name in zip(plain, ("loss", "logits", "view_embeds", "ids_visible"), strict=True):
        assert torch.equal(value, named[name])


@pytest.mark.parametrize(("size", "tokens"), [((64, 64), 65), ((24, 56), 22), ((35, 50), 25)])
def test_images_of_other_sizes_get_interpolated_positions(
    size: tuple[int, int], tokens: int, tiny_model: Model
) -> None:
    model, images = tiny_model(MiclForPreTraining), torch.randn(2, 3, *size)
    assert model.vit(images, interpolate_pos_encoding=True).last_hidden_state.shape == (2, tokens, 32)
    ids_visible = model(images, interpolate_pos_encoding=True).ids_visible
    assert ids_visible.shape == (2, 2, int((tokens - 1) * 0.5) // 2)
    everything = torch.arange(tokens - 1).expand(2, 1, -1)
    torch.testing.assert_close(
        model.vit(images, everything, interpolate_pos_encoding=True).last_hidden_state,
        model.vit(images, interpolate_pos_encoding=True).last_hidden_state,
    )


def test_interpolated_positions_are_bicubic_and_spare_cls(tiny_model: Model) -> None:
    embeddings = tiny_model(MiclModel, image_size=(32, 48)).embeddings
    stored, other = embeddings.position_embeddings, embeddings.positions(40, 24)
    assert torch.equal(other[:, 0], stored[:, 0])
    table = stored[0, 1:].reshape(4, 6, 32).permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(table, (5, 3), mode="bicubic")[0].permute(1, 2, 0).flatten(0, 1)
    torch.testing.assert_close(other[0, 1:], expected)


def test_interpolation_at_the_configured_size_changes_nothing(tiny_model: Model, pixel_values: Tensor) -> None:
    model = tiny_model(MiclModel)
    with_flag, without = model(pixel_values, interpolate_pos_encoding=True), model(pixel_values)
    assert torch.equal(with_flag.last_hidden_state, without.last_hidden_state)


MISTAKES = {
    "channels": ({"pixel_values": torch.zeros(2, 1, 32, 32)}, ["pixel_values", "num_channels=3", "(2, 1, 32, 32)"]),
    "no batch": ({"pixel_values": torch.zeros(3, 32, 32)}, ["pixel_values", "batch_size", "(3, 32, 32)"]),
    "size": ({"pixel_values": torch.zeros(2, 3, 32, 40)}, ["(32, 40)", "(32, 32)", "interpolate_pos_encoding=True"]),
    "integers": ({"pixel_values": torch.zeros(2, 3, 32, 32, dtype=torch.uint8)}, ["uint8", "divide by 255"]),
    "no V": ({"ids_visible": torch.zeros(2, 4, dtype=torch.int64)}, ["ids_visible", "(2, 4)"]),
    "other B": ({"ids_visible": torch.zeros(3, 2, 4, dtype=torch.int64)}, ["ids_visible", "2", "(3, 2, 4)"]),
}
MISTAKES_IN_PRETRAINING = {
    **MISTAKES,
    "one view": ({"ids_visible": torch.zeros(2, 1, 4, dtype=torch.int64)}, ["ids_visible", "V >= 2", "(2, 1, 4)"]),
    "noise length": ({"noise": torch.rand(2, 15)}, ["noise", "(2, 16)", "(2, 15)"]),
    "noise batch": ({"noise": torch.rand(1, 16)}, ["noise", "(2, 16)", "(1, 16)"]),
    "both": (
        {"noise": torch.rand(2, 16), "ids_visible": sample_views(2, 16, 0.5)},
        ["noise and ids_visible", "only one"],
    ),
    "size and noise": (
        {"pixel_values": torch.zeros(2, 3, 32, 40), "noise": torch.rand(2, 16)},
        ["(32, 40)", "(32, 32)", "interpolate_pos_encoding=True"],
    ),
    "flat": ({"pixel_values": torch.zeros(5)}, ["pixel_values", "(5,)"]),
}


def assert_refused(model: MiclPreTrainedModel, inputs: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match="pixel_values|ids_visible|noise") as error:
        model(**{"pixel_values": torch.zeros(2, 3, 32, 32), **inputs})
    assert [word for word in words if word not in str(error.value)] == []


@pytest.mark.parametrize("name", MISTAKES)
def test_the_encoder_says_what_is_wrong_with_an_input(name: str, tiny_model: Model) -> None:
    assert_refused(tiny_model(MiclModel), *MISTAKES[name])


@pytest.mark.parametrize("name", MISTAKES_IN_PRETRAINING)
def test_pretraining_says_what_is_wrong_with_an_input(name: str, tiny_model: Model) -> None:
    assert_refused(tiny_model(MiclForPreTraining), *MISTAKES_IN_PRETRAINING[name])
