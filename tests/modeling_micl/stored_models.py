"""Small stored models, one of each kind that is exported, and photographs to ask them about."""

import json
from pathlib import Path
from typing import Any

import skimage.data
import torch
from torch import Tensor
from transformers import ViTImageProcessor

from modeling_micl import MiclForImageClassification, MiclForPreTraining, MiclModel
from modeling_micl.remote_code import REMOTE_FILES


PHOTOS = [Path(skimage.data.__file__).parent / name for name in ("chelsea.png", "rocket.jpg", "coffee.png")]
LABELS = {0: "cat", 1: "rocket", 2: "coffee", 3: "owl"}
NAMES = {"id2label": LABELS, "label2id": {name: label for label, name in LABELS.items()}}
HEADS = {
    "encoder": (MiclForPreTraining, {}),
    "cls": (MiclForImageClassification, {"classifier_pooling": "cls", **NAMES}),
    "mean": (MiclForImageClassification, {"classifier_pooling": "mean", **NAMES}),
}
PROCESSOR = ViTImageProcessor(
    size={"shortest_edge": 40},
    crop_size={"height": 32, "width": 32},
    do_center_crop=True,
    do_convert_rgb=True,
    resample=3,
    image_mean=[0.4, 0.5, 0.6],  # nobody's default
    image_std=[0.2, 0.25, 0.3],
)


@torch.no_grad()
def answer(folder: Path, pixels: Tensor) -> Tensor:
    """What the stored MiCL model itself says: logits, or an encoder's [CLS]."""
    kind = "MiclForImageClassification" in (folder / "config.json").read_text()
    model = (MiclForImageClassification if kind else MiclModel).from_pretrained(folder)
    output: Tensor = model(pixels).logits if kind else model(pixels).pooler_output
    return output


def values(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def plant(folder: Path) -> Path:
    """Have every file of code in a folder write a marker when it is run."""
    marker = folder / "MARKER"
    for name in REMOTE_FILES:
        file = folder / name
        file.write_text(f"{file.read_text()}\n\nopen({str(marker)!r}, 'w').close()\n")
    return marker
