"""What preparing a dataset gains, as a part of `training.benchmark`: decoding and cropping on one core, and bytes.

The same images, as they are stored and as `training.prepare` would store them, are decoded and cropped as pre-training
does it, in turns and in this process alone. Files are in memory, so that reading them costs nothing.
"""

import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar

import numpy as np
from accelerate import Accelerator

from training.checks import Checks
from training.config import setting
from training.cost_settings import Entry
from training.images import CropAndFlip, decode_rgb
from training.recoding import Recoding
from training.shards import about_split, prepare_split
from training.source import ImageSource, open_source


Stored = list[dict[str, Any]]  # undecoded `datasets.Image` values


@dataclass
class PreparedSettings(Checks):
    """Which images, how small they are made, and the crop."""

    dataset: str = setting("ILSVRC/imagenet-1k", "Hub id, local folder or file, or 'photos' for the demonstration")
    split: str = setting("train", "split whose images are used")
    max_images: int | None = setting(1000, "use only so many, from all over the split")
    short_side: int = setting(256, "as in training.prepare")
    quality: int = setting(90, "as in training.prepare")
    image_size: int = setting(224, "pixels of the random crop")
    crop_min_scale: float = setting(0.2, "smallest share of the image in a random crop, in (0, 1]; 1 does not crop")
    repetitions: int = setting(10, "passes over the images; those of the two kinds take turns")
    output: str = setting("runs/benchmark/prepared.json", "file for all numbers")

    mixed_precision: ClassVar[str] = "no"  # there is no model

    def validate(self) -> None:
        """Raise a ValueError that names the first impossible setting, its value and the remedy."""
        self._validate_at_least(1, "max_images", "short_side", "quality", "image_size", "repetitions")
        self._validate_share("crop_min_scale", zero=False)


def measure_prepared(_: Accelerator, config: PreparedSettings) -> list[Entry]:
    """Images per second and bytes of both kinds, and their ratios to the source's."""
    source = open_source(config.dataset, config.split, max_images=config.max_images, all_columns=True)
    recoding = Recoding(config.short_side, config.quality)
    with tempfile.TemporaryDirectory() as folder:
        prepare_split(source, Path(folder), about_split(source, recoding, 1), recoding, num_workers=0)
        made_small = stored_images(open_source(folder, config.split, image_column=source.image_column))
    kinds = {"source": decodable(stored_images(source)), "prepared": made_small}
    rates = decode_rates(kinds, config.image_size, config.crop_min_scale, config.repetitions)
    entries: list[Entry] = [
        {"name": name, "images": len(kinds[name]), "bytes": sum(len(image["bytes"]) for image in kinds[name])}
        | {"images_per_second": float(np.median(rate)), "all_images_per_second": rate}
        for name, rate in rates.items()
    ]
    for entry in entries:
        entry["speed_ratio"] = entry["images_per_second"] / entries[0]["images_per_second"]
        entry["bytes_ratio"] = entry["bytes"] / entries[0]["bytes"]
    return entries


def stored_images(source: ImageSource) -> Stored:
    """All images of a source in order, with their bytes in memory."""
    found = []
    for _, row in source.rows_at(np.arange(source.num_images)):
        image = source.image_of(row) or {}
        content = image.get("bytes") or (Path(image["path"]).read_bytes() if image.get("path") else b"")
        found.append({"bytes": content, "path": None})
    return found


def decodable(images: Stored) -> Stored:
    """Those that are not broken."""
    found = []
    for image in images:
        with suppress(Exception):  # Pillow's plugins raise nearly anything
            decode_rgb(image)
            found.append(image)
    return found


def decode_rates(kinds: dict[str, Stored], size: int, min_scale: float, repetitions: int) -> dict[str, list[float]]:
    """Images per second that one core decodes and crops as pre-training does it, of each pass over each kind.

    Args:
        kinds: images by the name of their kind; they take turns.
        size: pixels of the random crop.
        min_scale: its smallest share of the image.
        repetitions: passes over each kind.
    """
    transform = CropAndFlip((size, size), min_scale, horizontal_flip=True)
    rates: dict[str, list[float]] = {name: [] for name in kinds}
    for repetition in range(repetitions):
        for name, images in kinds.items():
            start = perf_counter()
            for number, image in enumerate(images):
                transform(decode_rgb(image), np.random.default_rng((repetition, number)))
            rates[name].append(len(images) / (perf_counter() - start))
    return rates
