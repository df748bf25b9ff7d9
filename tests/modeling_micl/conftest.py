"""Fixtures of the tests that export stored models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from stored_models import HEADS, PHOTOS, PROCESSOR
from torch import Tensor

from modeling_micl import MiclPreTrainedModel


@pytest.fixture
def store(tiny_model: Callable[..., MiclPreTrainedModel], tmp_path: Path) -> Callable[..., Path]:
    """Save a small model of one of HEADS and its image processor; not even [CLS] has position zero."""

    def save(kind: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
        model_class, options = HEADS[kind]
        model = tiny_model(model_class, **{**options, **overrides})
        model.vit.embeddings.position_embeddings.normal_(generator=torch.Generator().manual_seed(5))
        folder = tmp_path / kind
        model.to(dtype).save_pretrained(folder)
        PROCESSOR.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="module")
def photos() -> Tensor:
    """Three photographs as the small models see them."""
    images = [Image.open(path) for path in PHOTOS]
    pixels: Tensor = PROCESSOR(images, return_tensors="pt").pixel_values
    return pixels
