"""Learning rate and weight decay, against MAE's published schedule and the released program's groups."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from modeling_micl import MiclForPreTraining, MiclPreTrainedModel
from training.optim import build_optimizer, learning_rate, scaled_learning_rate, set_learning_rate


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
