"""The demonstration data: crops of the photographs bundled with scikit-image, made offline."""

import io
import shutil
import tempfile
from pathlib import Path

import datasets
import numpy as np
import skimage.data
from PIL import Image


PHOTOS = {
    "astronaut": "astronaut.png",
    "bricks": "brick.png",
    "cameraman": "camera.png",
    "cells": "ihc.png",
    "cat": "chelsea.png",
    "clock": "clock_motion.png",
    "coffee": "coffee.png",
    "coins": "coins.png",
    "galaxies": "hubble_deep_field.jpg",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "kidney": "cell.png",
    "moon": "moon.png",
    "motorcycle": "motorcycle_left.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
}
# Vertical strips of each photograph, as shares of its width. They alternate, so that both splits show the subject.
STRIPS = {"train": [(0.0, 0.3), (0.5, 0.8)], "test": [(0.3, 0.5), (0.8, 1.0)]}
CROP_PIXELS = 64
SHARDS = {"train": 8, "test": 2}
CROPS_PER_PHOTO = {"train": 512, "test": 128}
SEED = 0


def photo_crops() -> Path:
    """Folder with the crops as Parquet shards in Hub layout; made on first use, in about ten seconds.

    A crop's label is its photograph. Train and test crops come from different strips of it: no pixel is in both.
    """
    folder = Path(datasets.config.HF_DATASETS_CACHE) / f"micl-photos-{CROP_PIXELS}px-v2"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}-"))
        for split in SHARDS:
            _write_split(split, unfinished)
        try:
            unfinished.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(unfinished)
    return folder


def _write_split(split: str, folder: Path) -> None:
    rng = np.random.default_rng((SEED, list(SHARDS).index(split)))
    photos = [_strips(split, Image.open(Path(skimage.data.__file__).parent / file)) for file in PHOTOS.values()]
    labels = rng.permutation(np.repeat(np.arange(len(photos)), CROPS_PER_PHOTO[split]))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(PHOTOS))})
    crops = datasets.Dataset.from_dict(
        {"image": [{"bytes": _crop(photos[label], rng), "path": None} for label in labels], "label": labels},
        features=features,
    )
    for index in range(SHARDS[split]):
        shard = crops.shard(SHARDS[split], index, contiguous=True)
        shard.to_parquet(folder / f"{split}-{index:05d}-of-{SHARDS[split]:05d}.parquet")


def _strips(split: str, photo: Image.Image) -> list[Image.Image]:
    photo = photo.convert("RGB")
    edges = [(int(left * photo.width), int(right * photo.width)) for left, right in STRIPS[split]]
    return [photo.crop((left, 0, right, photo.height)) for left, right in edges]


def _crop(strips: list[Image.Image], rng: np.random.Generator) -> bytes:
    """A random square of one of the strips, from one to two thumbnails wide, as JPEG."""
    photo = strips[rng.integers(len(strips))]
    side = int(rng.integers(CROP_PIXELS, min(2 * CROP_PIXELS, *photo.size) + 1))
    left, top = rng.integers(photo.width - side + 1), rng.integers(photo.height - side + 1)
    box = (int(left), int(top), int(left) + side, int(top) + side)
    buffer = io.BytesIO()
    photo.resize((CROP_PIXELS, CROP_PIXELS), Image.Resampling.BICUBIC, box=box).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()
