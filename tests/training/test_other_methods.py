"""Every method trains the encoder that it is asked for, on the tokens that are its own; a missing package is told."""

from typing import Any

import pytest
import torch
from torch import Tensor

from modeling_micl import MiclConfig
from training.other_methods import METHODS, Method


CPU = torch.device("cpu")
# 144 patches, of which two views see 14 each, and MAE 36
CONFIG = MiclConfig(
    **{"image_size": 48, "patch_size": 4, "hidden_size": 24, "intermediate_size": 96, "mask_ratio": 0.8},
    **{"num_hidden_layers": 2, "num_attention_heads": 3},
)
# The first encoder layer of a method, and the sequences and tokens that it gets for three images
EXPECTED = {
    ("MiCL", "modeling-micl"): ("vit.layers.0", [(6, 15)]),
    ("MiCL, written naively, views together", "torch"): ("layers.0", [(6, 15)]),
    ("MiCL, written naively", "torch"): ("layers.0", [(3, 15), (3, 15)]),
    ("MAE", "transformers"): ("vit.layers.0", [(3, 37)]),
    ("MAE", "lightly"): ("encoder.vit.blocks.0", [(3, 37)]),
    ("SimCLR", "lightly"): ("0.blocks.0", [(3, 145), (3, 145)]),
    ("supervised", "timm"): ("blocks.0", [(3, 145)]),
}

pytestmark = pytest.mark.usefixtures("no_accelerator")


def test_all_methods_are_expected() -> None:
    assert [(method.name, method.package) for method in METHODS] == list(EXPECTED)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.name}-{method.package}")
def test_a_step_trains_the_encoder(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    if not method.installed:
        assert method.package == "lightly"  # the only one that may be missing
        assert method.program == "lightly, not installed"
        return
    models: list[torch.nn.Module] = []
    seen: list[tuple[int, ...]] = []

    def build(config: MiclConfig, device: torch.device) -> Any:
        model, loss = method.build(config, device)
        models.append(model)
        return model, loss

    step = Method(method.name, method.package, build, method.plain_adamw).step(CONFIG, 3, "fp32", CPU)
    name, expected = EXPECTED[method.name, method.package]
    first = models[0].get_submodule(name)
    first.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape)))
    matrices = [p for p in first.parameters() if p.ndim == 2]
    before = [p.clone() for p in matrices]
    step()
    assert seen == [(sequences, tokens, 24) for sequences, tokens in expected]
    assert sum(p.numel() for p in matrices) == 4 * 24**2 + 2 * 24 * 96
    assert all(Tensor.ne(p, old).any() for p, old in zip(matrices, before, strict=True))
    assert bool(step.optimizer.defaults["fused"]) != method.plain_adamw
    assert method.program.startswith(f"{method.package} ")
