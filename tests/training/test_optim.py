"""Optimisers and learning rates, against MAE's published schedule, timm's groups and LARS in a few lines."""

import math
from collections.abc import Callable

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from torch import nn

from modeling_micl import MiclConfig, MiclForImageClassification, MiclForPreTraining, MiclPreTrainedModel
from modeling_micl.convert_checkpoint import official_parameter_names
from training.optim import (
    build_optimizer,
    lars_optimizer,
    layer_decay_optimizer,
    learning_rate,
    scaled_learning_rate,
    set_learning_rate,
)


def mae_rate(step: int, steps_per_epoch: int, peak: float, warmup_epochs: float, epochs: int) -> float:
    """As the paper's appendix words it, in steps: linear warm-up, then cosine decay to zero."""
    done, warmup, total = step, warmup_epochs * steps_per_epoch, epochs * steps_per_epoch
    if done < warmup:
        return done * (peak / warmup)
    return peak * math.cos(math.pi / 2 * (done - warmup) / (total - warmup)) ** 2


@pytest.mark.parametrize(("warmup_epochs", "epochs"), [(10, 200), (0, 3), (2.5, 4), (0.01, 1)])
def test_the_rate_is_maes_at_every_step(warmup_epochs: float, epochs: int) -> None:
    steps_per_epoch = 37
    for step in range(epochs * steps_per_epoch + 1):
        expected = mae_rate(step, steps_per_epoch, 3e-4, warmup_epochs, epochs)
        found = learning_rate(step / steps_per_epoch, 3e-4, warmup_epochs, epochs)
        assert math.isclose(found, expected, rel_tol=1e-9, abs_tol=1e-15)


def test_the_rate_begins_and_ends_at_zero_and_peaks_after_warm_up() -> None:
    assert learning_rate(0, 0.5, 10, 200) == 0
    assert learning_rate(5, 0.5, 10, 200) == pytest.approx(0.25)
    assert learning_rate(10, 0.5, 10, 200) == 0.5
    assert learning_rate(105, 0.5, 10, 200) == pytest.approx(0.25)
    assert learning_rate(200, 0.5, 10, 200) == pytest.approx(0, abs=1e-12)
    assert learning_rate(0, 0.5, 0, 200) == 0.5


@pytest.mark.parametrize("least", [0.0, 0.1, 0.5])
def test_the_rate_ends_at_the_least_one(least: float) -> None:
    """Warm-up still begins at 0; half-way down the cosine it is the mean of both ends."""
    assert learning_rate(0, 0.5, 10, 200, least) == 0
    assert learning_rate(5, 0.5, 10, 200, least) == pytest.approx(0.25)
    assert learning_rate(10, 0.5, 10, 200, least) == 0.5
    assert learning_rate(105, 0.5, 10, 200, least) == pytest.approx((0.5 + least) / 2)
    assert learning_rate(200, 0.5, 10, 200, least) == pytest.approx(least, abs=1e-12)
    rates = [learning_rate(epoch, 0.5, 10, 200, least) for epoch in range(10, 201)]
    assert rates == sorted(rates, reverse=True)


def test_the_base_rate_is_for_256_images() -> None:
    assert scaled_learning_rate(5e-5, 256) == 5e-5
    assert scaled_learning_rate(5e-5, 7200) == pytest.approx(5e-5 * 28.125)


def test_only_weights_are_decayed_and_all_that_is_trained_is_optimised(
    tiny_model: Callable[..., MiclPreTrainedModel],
) -> None:
    model = tiny_model(MiclForPreTraining)
    optimizer = build_optimizer(model, weight_decay=0.05, betas=(0.9, 0.95))
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, plain = ({names[p] for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]
    assert all(group["betas"] == (0.9, 0.95) for group in optimizer.param_groups)
    assert decayed | plain == {name for name, p in model.named_parameters() if p.requires_grad}
    assert plain == {name for name in decayed | plain if name.endswith("bias") or "norm" in name}
    assert "vit.embeddings.cls_token" in decayed
    assert "vit.embeddings.position_embeddings" not in decayed | plain
    assert "vit.embeddings.position_embeddings" in names.values()


def test_a_step_is_adamws() -> None:
    """Decoupled decay: with a zero gradient a weight shrinks by rate × decay, and a bias stays."""
    layer = nn.Linear(2, 1)
    nn.init.ones_(layer.weight)
    nn.init.ones_(layer.bias)
    optimizer = build_optimizer(layer, weight_decay=0.5, betas=(0.9, 0.95))
    set_learning_rate(optimizer, 0.1)
    layer.weight.grad, layer.bias.grad = torch.zeros(1, 2), torch.zeros(1)
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), torch.full((1, 2), 0.95))
    torch.testing.assert_close(layer.bias.detach(), torch.ones(1))


def test_without_a_rate_nothing_moves() -> None:
    layer = nn.Linear(2, 1)
    before = layer.weight.detach().clone()
    optimizer = build_optimizer(layer, weight_decay=0.5, betas=(0.9, 0.95))
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert torch.equal(layer.weight, before)


# Fine-tuning: layer-wise decay


def timm_groups(config: MiclConfig, weight_decay: float, layer_decay: float) -> dict[str, tuple[float, float]]:
    """(lr_scale, weight decay) of every parameter as timm has them, under our names."""
    model = VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_classes=config.num_labels,
        global_pool="avg",
    )
    model.pos_embed.requires_grad_(False)  # as ours
    groups = param_groups_layer_decay(
        model, weight_decay, no_weight_decay_list=model.no_weight_decay(), layer_decay=layer_decay
    )
    names = official_parameter_names(config)
    for kind in ("weight", "bias"):
        names |= {f"fc_norm.{kind}": [f"fc_norm.{kind}"], f"head.{kind}": [f"classifier.{kind}"]}
    theirs = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        ours: (group["lr_scale"], group["weight_decay"])
        for group in groups
        for parameter in group["params"]
        for ours in names[theirs[id(parameter)]]
    }


def our_groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, float]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [
        (names[id(parameter)], (group["lr_scale"], group["weight_decay"]))
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]
    assert len(dict(found)) == len(found)
    return dict(found)


@pytest.mark.parametrize(("weight_decay", "layer_decay"), [(0.05, 0.65), (0.3, 0.75), (0.05, 1.0), (0.0, 0.5)])
@pytest.mark.parametrize("depth", [1, 2, 5, 12])
def test_every_parameter_learns_and_decays_as_in_timm(
    depth: int, weight_decay: float, layer_decay: float, tiny_config: Callable[..., MiclConfig]
) -> None:
    model = MiclForImageClassification(tiny_config(num_hidden_layers=depth, num_labels=5))
    found = our_groups(model, layer_decay_optimizer(model, weight_decay, layer_decay, (0.9, 0.999)))
    expected = timm_groups(model.config, weight_decay, layer_decay)
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad} == expected.keys()
    for name, values in expected.items():
        assert found[name] == pytest.approx(values), name


def test_layers_learn_as_fast_as_in_maes_paper(tiny_config: Callable[..., MiclConfig]) -> None:
    """By hand, for both kinds of pooling: head and final norm at the full rate, each layer at half of the next's."""
    for pooling, norm in (("mean", "fc_norm"), ("cls", "vit.layernorm")):
        model = MiclForImageClassification(tiny_config(num_labels=5, classifier_pooling=pooling))
        scales = our_groups(model, layer_decay_optimizer(model, 0.05, 0.5, (0.9, 0.999)))
        assert scales["classifier.weight"] == (1.0, 0.05)
        assert scales["classifier.bias"] == scales[f"{norm}.weight"] == scales[f"{norm}.bias"] == (1.0, 0.0)
        assert scales["vit.layers.1.mlp.fc1.weight"] == (0.5, 0.05)
        assert scales["vit.layers.1.mlp.fc1.bias"] == (0.5, 0.0)
        assert scales["vit.layers.0.attention.q_proj.weight"] == (0.25, 0.05)
        assert scales["vit.embeddings.patch_embeddings.projection.weight"] == (0.125, 0.05)
        assert scales["vit.embeddings.cls_token"] == (0.125, 0.0)


def test_setting_the_rate_keeps_the_layers_apart(tiny_config: Callable[..., MiclConfig]) -> None:
    model = MiclForImageClassification(tiny_config(num_labels=5))
    optimizer = layer_decay_optimizer(model, 0.05, 0.5, (0.8, 0.9))
    assert all(group["betas"] == (0.8, 0.9) for group in optimizer.param_groups)
    for value in (0.3, 0.1):  # not that of the time before, scaled once more
        set_learning_rate(optimizer, value)
        assert sorted({group["lr"] for group in optimizer.param_groups}) == pytest.approx(
            [value * scale for scale in (0.125, 0.25, 0.5, 1.0)]
        )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()  # Adam's first step is the rate itself
    moved = {name: float((before[name] - p.detach()).abs().max()) for name, p in model.named_parameters()}
    for name, scale in (
        ("classifier.bias", 1),
        ("vit.layers.1.mlp.fc1.bias", 0.5),
        ("vit.embeddings.cls_token", 1 / 8),
    ):
        assert moved[name] == pytest.approx(0.1 * scale, rel=1e-4)
    assert moved["vit.embeddings.position_embeddings"] == 0


# The published linear probe: LARS


def lars_step(weights: list[torch.Tensor], momenta: list[torch.Tensor], rate: float) -> None:
    """As MAE's util/lars.py: matrices get a step of 0.001 × their own length, vectors the plain one."""
    for p, m in zip(weights, momenta, strict=True):
        step = p.grad if p.ndim == 1 else 0.001 * p.norm() / p.grad.norm() * p.grad
        m.mul_(0.9).add_(step)
        p.data.sub_(rate * m)


def test_lars_is_maes() -> None:
    torch.manual_seed(0)
    head, other = nn.Linear(6, 4), nn.Linear(6, 4)
    other.load_state_dict(head.state_dict())
    optimizer, momenta = lars_optimizer(head, weight_decay=0.0), [torch.zeros(4, 6), torch.zeros(4)]
    start = head.weight.detach().clone()
    for step in range(12):
        inputs, targets = torch.randn(8, 6), torch.randint(0, 4, (8,))
        for model in (head, other):
            model.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
        set_learning_rate(optimizer, 5.0 / (step + 1))
        optimizer.step()
        lars_step([other.weight, other.bias], momenta, 5.0 / (step + 1))
        torch.testing.assert_close(head.state_dict(), other.state_dict(), rtol=1e-5, atol=1e-6)
    assert (head.weight - start).abs().max() > 0.003  # far more than the tolerance


def test_lars_leaves_the_length_of_the_gradient_out_and_that_of_the_weights_in() -> None:
    steps = {}
    for weight_scale, gradient_scale in ((1, 1), (1, 1000), (3, 1)):
        head = nn.Linear(4, 2, bias=False)
        nn.init.constant_(head.weight, weight_scale)
        head.weight.grad = torch.full((2, 4), 0.01 * gradient_scale)
        optimizer = lars_optimizer(head, weight_decay=0.0)
        set_learning_rate(optimizer, 2.0)
        optimizer.step()
        steps[weight_scale, gradient_scale] = weight_scale - head.weight[0, 0].item()
    assert steps[1, 1] == pytest.approx(2 * 0.001, rel=1e-3)
    assert steps[1, 1000] == pytest.approx(steps[1, 1], rel=1e-3)
    assert steps[3, 1] == pytest.approx(3 * steps[1, 1], rel=1e-3)


def test_lars_decays_weights_only() -> None:
    optimizer = lars_optimizer(nn.Linear(4, 2), weight_decay=0.1)
    decays = {
        parameter.ndim: group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]
    }
    assert decays == {2: 0.1, 1: 0.0}
