"""Stochastic depth, the classification head and the backbone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from modeling_micl import (
    MiclBackbone,
    MiclConfig,
    MiclForImageClassification,
    MiclModel,
    MiclPreTrainedModel,
    sample_views,
)


Model = Callable[..., MiclPreTrainedModel]


@pytest.mark.parametrize(
    ("depth", "rates"), [(1, [0.0]), (2, [0.0, 0.3]), (4, [0.0, 0.1, 0.2, 0.3])], ids=["1", "2", "4"]
)
def test_the_drop_path_rate_grows_linearly_to_the_last_layer(
    depth: int, rates: list[float], tiny_config: Callable[..., MiclConfig]
) -> None:
    model = MiclModel(tiny_config(num_hidden_layers=depth, drop_path_rate=0.3))
    assert [layer.drop_path.drop_prob for layer in model.layers] == pytest.approx(rates)


def test_drop_path_is_off_in_evaluation(tiny_model: Model, pixel_values: Tensor) -> None:
    with_rate, without = (tiny_model(MiclModel, drop_path_rate=rate) for rate in (0.9, 0.0))
    assert torch.equal(with_rate(pixel_values).last_hidden_state, without(pixel_values).last_hidden_state)
    assert not torch.equal(with_rate.train()(pixel_values).last_hidden_state, without(pixel_values).last_hidden_state)


def test_drop_path_drops_whole_residual_branches_of_whole_sequences(tiny_model: Model) -> None:
    layer = tiny_model(MiclModel, drop_path_rate=0.25).train().layers[-1]
    hidden_states = torch.randn(1, 5, 32).expand(4000, -1, -1)
    attended, _ = layer.attention(layer.layernorm_before(hidden_states[:1]))
    outcomes = {}
    for kept_attention in (0, 1):
        middle = hidden_states[:1] + kept_attention * attended / 0.75
        for kept_mlp in (0, 1):
            outcomes[kept_attention, kept_mlp] = middle + kept_mlp * layer.mlp(layer.layernorm_after(middle)) / 0.75
    torch.manual_seed(0)
    dropped = layer(hidden_states)
    shares = {
        kept: (dropped - outcome).abs().amax((1, 2)).lt(1e-5).float().mean().item()
        for kept, outcome in outcomes.items()
    }
    assert sum(shares.values()) == pytest.approx(1)
    expected = {(0, 0): 1 / 16, (0, 1): 3 / 16, (1, 0): 3 / 16, (1, 1): 9 / 16}
    assert shares == pytest.approx(expected, abs=0.03)


def test_mean_pooling_norms_the_mean_of_unnormed_patch_tokens(tiny_model: Model, pixel_values: Tensor) -> None:
    model = tiny_model(MiclForImageClassification, num_labels=5, layer_norm_eps=0.1)
    outputs = model(pixel_values, output_hidden_states=True)
    mean = outputs.hidden_states[-1][:, 1:].mean(1)
    normed = (mean - mean.mean(-1, keepdim=True)) / (mean.var(-1, correction=0, keepdim=True) + 0.1).sqrt()
    pooled = normed * model.fc_norm.weight + model.fc_norm.bias
    torch.testing.assert_close(outputs.logits, pooled @ model.classifier.weight.T + model.classifier.bias)
    assert outputs.logits.shape == (3, 5)
    assert not any(name.startswith("vit.layernorm.") for name in model.state_dict())


def test_cls_pooling_reads_the_final_cls_token(tiny_model: Model, pixel_values: Tensor) -> None:
    model = tiny_model(MiclForImageClassification, num_labels=5, classifier_pooling="cls")
    cls = model.vit.layernorm(model(pixel_values, output_hidden_states=True).hidden_states[-1])[:, 0]
    torch.testing.assert_close(model(pixel_values).logits, cls @ model.classifier.weight.T + model.classifier.bias)
    assert not any(name.startswith("fc_norm.") for name in model.state_dict())


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_every_trainable_weight_of_a_classifier_learns(pooling: str, tiny_model: Model, pixel_values: Tensor) -> None:
    model = tiny_model(MiclForImageClassification, num_labels=5, classifier_pooling=pooling).train()
    model(pixel_values, labels=torch.tensor([0, 4, 2])).loss.backward()
    assert [
        name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ] == []


def test_labels_give_the_cross_entropy(tiny_model: Model, pixel_values: Tensor) -> None:
    model, labels = tiny_model(MiclForImageClassification, num_labels=5), torch.tensor([0, 4, 2])
    outputs = model(pixel_values, labels=labels, output_hidden_states=True)
    torch.testing.assert_close(outputs.loss, cross_entropy(outputs.logits, labels))
    assert model(pixel_values).loss is None


def test_names_of_the_labels_decide_their_number(tiny_model: Model, pixel_values: Tensor) -> None:
    names = {0: "cat", 1: "dog", 2: "owl"}
    model = tiny_model(MiclForImageClassification, id2label=names, label2id={"cat": 0, "dog": 1, "owl": 2})
    assert model(pixel_values).logits.shape == (3, 3)
    assert model.config.id2label == names


def test_without_labels_the_classifier_returns_the_pooled_features(tiny_model: Model, pixel_values: Tensor) -> None:
    model = tiny_model(MiclForImageClassification, num_labels=0)
    features = model.vit(pixel_values).last_hidden_state[:, 1:].mean(1)
    torch.testing.assert_close(model(pixel_values).logits, model.fc_norm(features))


def test_a_classifier_accepts_other_sizes_on_request(tiny_model: Model) -> None:
    model, images = tiny_model(MiclForImageClassification, num_labels=5), torch.randn(2, 3, 40, 24)
    assert model(images, interpolate_pos_encoding=True).logits.shape == (2, 5)
    with pytest.raises(ValueError, match="interpolate_pos_encoding=True"):
        model(images)


# A classifier that sees a share of the patches

POOLINGS = pytest.mark.parametrize("pooling", ["mean", "cls"])


@POOLINGS
def test_all_patches_in_one_view_are_the_whole_image(pooling: str, tiny_model: Model, pixel_values: Tensor) -> None:
    model = tiny_model(MiclForImageClassification, num_labels=5, classifier_pooling=pooling)
    whole = model(pixel_values).logits
    everything = torch.arange(16).expand(3, 1, 16)
    torch.testing.assert_close(model(pixel_values, ids_visible=everything).logits, whole)
    shuffled = torch.rand(3, 1, 16, generator=torch.Generator().manual_seed(0)).argsort(dim=2)
    torch.testing.assert_close(model(pixel_values, ids_visible=shuffled).logits, whole)


@POOLINGS
def test_the_order_of_visible_patches_does_not_matter_but_which_they_are(
    pooling: str, tiny_model: Model, pixel_values: Tensor
) -> None:
    model = tiny_model(MiclForImageClassification, num_labels=5, classifier_pooling=pooling)
    ids = torch.tensor([[[3, 0, 9]], [[1, 2, 15]], [[8, 4, 7]]])
    logits = model(pixel_values, ids_visible=ids).logits
    assert logits.shape == (3, 5)
    torch.testing.assert_close(model(pixel_values, ids_visible=ids.flip(2)).logits, logits)
    for other in (torch.tensor([[[3, 0, 10]], [[1, 2, 14]], [[8, 4, 6]]]), ids[:, :, :2]):
        assert (model(pixel_values, ids_visible=other).logits - logits).abs().amax(dim=1).min() > 1e-3


@POOLINGS
def test_patches_that_are_not_visible_have_no_influence(pooling: str, tiny_model: Model, pixel_values: Tensor) -> None:
    model, images = tiny_model(MiclForImageClassification, num_labels=5, classifier_pooling=pooling), pixel_values
    ids = torch.tensor([[[0, 1, 2, 3]]]).expand(3, 1, 4)  # the uppermost row
    below = images.clone()
    below[:, :, 8:] = 7.0
    assert torch.equal(model(images, ids_visible=ids).logits, model(below, ids_visible=ids).logits)


@POOLINGS
def test_the_logits_of_several_views_are_averaged(pooling: str, tiny_model: Model, pixel_values: Tensor) -> None:
    model = tiny_model(MiclForImageClassification, num_labels=5, classifier_pooling=pooling)
    ids, labels = sample_views(3, 16, 0.25, num_views=3), torch.tensor([0, 4, 2])
    alone = [model(pixel_values, ids_visible=ids[:, [view]]).logits for view in range(3)]
    for views in ([0, 1], [2, 0], [0, 1, 2]):
        outputs = model(pixel_values, labels=labels, ids_visible=ids[:, views])
        torch.testing.assert_close(outputs.logits, torch.stack([alone[view] for view in views]).mean(dim=0))
        torch.testing.assert_close(outputs.loss, cross_entropy(outputs.logits, labels))
    assert (alone[0] - alone[1]).abs().max() > 1e-2


def test_wrong_views_of_a_classifier_are_refused(tiny_model: Model, pixel_values: Tensor) -> None:
    model = tiny_model(MiclForImageClassification, num_labels=5)
    for ids in (torch.zeros(3, 4, dtype=torch.int64), torch.zeros(2, 1, 4, dtype=torch.int64)):
        with pytest.raises(ValueError, match="ids_visible must have shape"):
            model(pixel_values, ids_visible=ids)


# The backbone

STAGES: dict[str, Any] = {"out_features": ["stem", "stage1", "stage2"]}


def test_feature_maps_are_the_encoders_tokens_on_the_patch_grid(tiny_model: Model, pixel_values: Tensor) -> None:
    backbone, encoder = (tiny_model(model_class, **STAGES) for model_class in (MiclBackbone, MiclModel))
    outputs = encoder(pixel_values, output_hidden_states=True)
    for feature_map, tokens in zip(backbone(pixel_values).feature_maps, outputs.hidden_states, strict=True):
        assert feature_map.shape == (3, 32, 4, 4)
        assert torch.equal(feature_map.permute(0, 2, 3, 1).flatten(1, 2), encoder.layernorm(tokens)[:, 1:])
    assert torch.equal(feature_map[:, :, 1, 2], outputs.last_hidden_state[:, 1 + 1 * 4 + 2])


def test_feature_maps_can_stay_unnormed_tokens(tiny_model: Model, pixel_values: Tensor) -> None:
    encoder = tiny_model(MiclModel)
    backbone = tiny_model(MiclBackbone, **STAGES, apply_layernorm=False, reshape_hidden_states=False)
    hidden_states = encoder(pixel_values, output_hidden_states=True).hidden_states
    for feature_map, tokens in zip(backbone(pixel_values).feature_maps, hidden_states, strict=True):
        assert torch.equal(feature_map, tokens)


@pytest.mark.parametrize(("size", "grid"), [((24, 56), (3, 7)), ((64, 32), (8, 4)), ((35, 50), (4, 6))])
def test_a_backbone_takes_images_of_any_size(size: tuple[int, int], grid: tuple[int, int], tiny_model: Model) -> None:
    images = torch.randn(2, 3, *size)
    feature_map = tiny_model(MiclBackbone)(images).feature_maps[0]
    assert feature_map.shape == (2, 32, *grid)
    tokens = tiny_model(MiclModel)(images, interpolate_pos_encoding=True).last_hidden_state
    assert torch.equal(feature_map.flatten(2).transpose(1, 2), tokens[:, 1:])


def test_a_backbone_returns_the_chosen_stages_and_their_channels(tiny_model: Model, pixel_values: Tensor) -> None:
    everything = tiny_model(MiclBackbone, **STAGES)(pixel_values).feature_maps
    backbone = tiny_model(MiclBackbone, out_indices=[0, 2])
    chosen = backbone(pixel_values).feature_maps
    assert len(chosen) == 2
    assert torch.equal(chosen[0], everything[0])
    assert torch.equal(chosen[1], everything[2])
    assert backbone.channels == [32, 32]


def test_a_backbone_returns_hidden_states_only_on_request(tiny_model: Model, pixel_values: Tensor) -> None:
    backbone = tiny_model(MiclBackbone)
    assert backbone(pixel_values).hidden_states is None
    assert len(backbone(pixel_values, output_hidden_states=True).hidden_states) == 3
    (feature_maps,) = backbone(pixel_values, return_dict=False)
    assert torch.equal(feature_maps[0], backbone(pixel_values).feature_maps[0])
