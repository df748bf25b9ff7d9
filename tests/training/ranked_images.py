"""Images for a classifier, labelled by the rank of their class among its logits, so that its accuracies are known.

A rank of 0 is a top-1 hit, one below 5 a top-5 hit.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from conftest import encode, picture
from PIL import Image
from torch import Tensor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from modeling_micl import MiclForImageClassification


def image(number: int) -> Image.Image:
    return picture(number, (32, 32))


@torch.no_grad()
def logits_of(model: str, images: int) -> Tensor:
    """(images, C) for images of the model's size, so that nothing is cropped."""
    pixels = np.stack([np.asarray(image(number)) for number in range(images)])
    normalized = (pixels / 255 - IMAGENET_DEFAULT_MEAN) / IMAGENET_DEFAULT_STD
    loaded = MiclForImageClassification.from_pretrained(model).eval()
    return loaded(torch.tensor(normalized.transpose(0, 3, 1, 2), dtype=torch.float32)).logits


def ranked(model: str, classes: Sequence[int], ranks: Sequence[int], images: int = 20) -> list[int]:
    """For each image the class whose logit has the image's rank among those of the classes."""
    order = logits_of(model, images)[:, list(classes)].argsort(dim=1, descending=True)
    return [classes[int(order[number, ranks[number % len(ranks)]])] for number in range(images)]


def write_parquet(file: Path, labels: Sequence[int], feature: Any) -> Path:
    rows = {"image": [{"bytes": encode(image(n)), "path": None} for n in range(len(labels))], "label": list(labels)}
    features = datasets.Features({"image": datasets.Image(), "label": feature})
    file.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(file)
    return file


def write_folders(
    root: Path, classes: Sequence[str], declared: Sequence[str] = (), name: str = "picture_{}.png"
) -> Path:
    """Images in a folder for the class of each; for the other declared classes, one that cannot be decoded."""
    for number, class_name in enumerate(classes):
        (root / class_name).mkdir(parents=True, exist_ok=True)
        image(number).save(root / class_name / name.format(number))
    for class_name in set(declared) - set(classes):
        (root / class_name).mkdir(parents=True)
        (root / class_name / name.format(0)).write_bytes(b"no image")
    return root
