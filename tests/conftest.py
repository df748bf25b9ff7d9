"""Small models that all tests share, and the GPU that they are kept from."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from modeling_micl import MiclConfig, MiclPreTrainedModel


TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
    "mask_ratio": 0.5,
}  # 16 patches, two views of 4


# What takes longest comes first: then no process is left alone with it at the end.
LONGEST = ["test_readme.py", "test_faults.py", "test_resume.py", "test_execution.py", "test_pretrain_two_processes.py"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--cuda` runs the tests that need a CUDA GPU, and only these."""
    parser.addoption("--cuda", action="store_true", help="run the tests that need a CUDA GPU, and only these")


def pytest_configure(config: pytest.Config) -> None:
    """Have pytest-xdist hand out files in the order of the collection, not those with the most tests first."""
    config.option.loadscopereorder = False
    if not config.getoption("--cuda"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is compared bit by bit, or takes turns, is so on the CPU


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with the longest files; leave out those for a GPU, or all others."""
    for_gpu = [item.get_closest_marker("cuda") is not None for item in items]
    chosen = [item for item, cuda in zip(items, for_gpu, strict=True) if cuda == config.getoption("--cuda")]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(LONGEST)))


@pytest.fixture
def tiny_config() -> Callable[..., MiclConfig]:
    """Build a configuration that is cheap to run; keywords replace single values."""

    def build(**overrides: Any) -> MiclConfig:
        return MiclConfig(**{**TINY, **overrides})

    return build


@pytest.fixture
def tiny_model() -> Callable[..., MiclPreTrainedModel]:
    """Build a small model in evaluation mode, its trainable weights moved off their initial values (no bias is 0)."""

    def build(model_class: type[MiclPreTrainedModel], **overrides: Any) -> MiclPreTrainedModel:
        torch.manual_seed(0)
        model = model_class(MiclConfig(**{**TINY, **overrides})).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return model

    return build


@pytest.fixture
def pixel_values() -> torch.Tensor:
    """Three images that fit the small models."""
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
