"""The demonstration data: crops of the photographs bundled with scikit-image, made offline."""

import io
from pathlib import Path

import datasets
import numpy as np
import skimage.data
from PIL import Image

from training.disk import made_once


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
# Parts of each photograph: left, top, right and bottom as shares of its width and height. They are vertical strips
# that alternate, so that both splits show the subject.
Part = tuple[float, float, float, float]
PARTS: dict[str, list[Part]] = {
    "train": [(0.0, 0.0, 0.3, 1.0), (0.5, 0.0, 0.8, 1.0)],
    "test": [(0.3, 0.0, 0.5, 1.0), (0.8, 0.0, 1.0, 1.0)],
}
# To choose settings on `validation`, which shares the strips of train with a smaller train; test is the same.
HELD_OUT_PARTS: dict[str, list[Part]] = {
    "train": [(left, top, left + 0.3, top + 0.35) for left in (0.0, 0.5) for top in (0.0, 0.65)],
    "validation": [(left, 0.35, left + 0.3, 0.65) for left in (0.0, 0.5)],
    "test": PARTS["test"],
}
CROP_PIXELS = 64
SHARDS = {"train": 8, "test": 2, "validation": 2}
CROPS_PER_PHOTO = {"train": 512, "test": 128, "validation": 128}
SEED = 0


def photo_crops() -> Path:
    """Folder with the crops as Parquet shards in Hub layout; made on first use, in about ten seconds.

    A crop's label is its photograph. Train and test crops come from different strips of it: no pixel is in both.
    """
    return _made(f"micl-photos-{CROP_PIXELS}px-v2", PARTS)


def held_out_crops() -> Path:
    """The same with a validation split, and less in train: no pixel is in two of the three."""
    return _made(f"micl-photos-{CROP_PIXELS}px-held-out-v1", HELD_OUT_PARTS)


def _made(name: str, parts: dict[str, list[Part]]) -> Path:
    def write(folder: Path) -> None:
        for split in parts:
            _write_split(split, folder, parts[split])

    return made_once(Path(datasets.config.HF_DATASETS_CACHE) / name, write)


def _write_split(split: str, folder: Path, parts: list[Part]) -> None:
    rng = np.random.default_rng((SEED, list(SHARDS).index(split)))
    photos = [_cut(parts, Image.open(Path(skimage.data.__file__).parent / file)) for file in PHOTOS.values()]
    labels = rng.permutation(np.repeat(np.arange(len(photos)), CROPS_PER_PHOTO[split]))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(PHOTOS))})
    crops = datasets.Dataset.from_dict(
        {"image": [{"bytes": _crop(photos[label], rng), "path": None} for label in labels], "label": labels},
        features=features,
    )
    for index in range(SHARDS[split]):
        shard = crops.shard(SHARDS[split], index, contiguous=True)
        shard.to_parquet(folder / f"{split}-{index:05d}-of-{SHARDS[split]:05d}.parquet")


def _cut(parts: list[Part], photo: Image.Image) -> list[Image.Image]:
    width, height, photo = *photo.size, photo.convert("RGB")
    return [
        photo.crop((int(left * width), int(top * height), int(right * width), int(bottom * height)))
        for left, top, right, bottom in parts
    ]


def _crop(parts: list[Image.Image], rng: np.random.Generator) -> bytes:
    """A random square of one of the parts, from one to two thumbnails wide, as JPEG."""
    photo = parts[rng.integers(len(parts))]
    side = int(rng.integers(CROP_PIXELS, min(2 * CROP_PIXELS, *photo.size) + 1))
    left, top = rng.integers(photo.width - side + 1), rng.integers(photo.height - side + 1)
    box = (int(left), int(top), int(left) + side, int(top) + side)
    buffer = io.BytesIO()
    photo.resize((CROP_PIXELS, CROP_PIXELS), Image.Resampling.BICUBIC, box=box).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()
