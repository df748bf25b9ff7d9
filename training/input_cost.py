"""The cost of reading, decoding and cropping images, as a part of `training.benchmark`.

The measure is a plain loop on one core that decodes, crops and resizes images in memory, and does nothing else. What
training does beside that (reading, upright and 8-bit RGB, stacking, worker processes) should cost little. Everything
is timed in the same process and interleaved; rates are those of one core, but that of decoding on a GPU.
"""

import io
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import skimage.data
import torch
from accelerate import Accelerator
from PIL import Image
from torchvision.transforms import Compose, Normalize, RandomHorizontalFlip, RandomResizedCrop, ToTensor
from torchvision.transforms.functional import InterpolationMode
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from training.batch import Batch, concatenate
from training.checks import Checks
from training.config import setting
from training.data import TrainingBatches, TrainingOrder, batches, received
from training.device_decoding import decode_on_device
from training.encoded import EncodedBatches
from training.images import CropAndFlip, decode_rgb, random_crop_box
from training.monitor import usable_cores
from training.photos import PHOTOS
from training.shared_memory import PLACES, InReusedMemory, ReusedMemory
from training.source import ImageSource, Row, open_source
from training.timing import per_image


CORES = usable_cores()
DISTINCT, ROWS_PER_SHARD, ROW_GROUP = 128, 1024, 100
BARE, CHAIN = "plain loop: decode, crop", "torchvision's transforms"
ON_DEVICE = "decoded on the GPU (whole program)"
Cropped = list[tuple[Image.Image, int, int]]


@dataclass
class InputSettings(Checks):
    """Which images, and how they are brought to training."""

    dataset: str | None = setting(None, "Hub id, local folder or file; unset, photographs made into JPEGs for it")
    split: str = setting("train", "split of it")
    image_column: str | None = setting(None, "unset, the only image column")
    jpeg_size: list[int] = setting([500, 375], "width and height of those photographs")
    image_size: int = setting(224, "side of the crops in pixels")
    crop_min_scale: float = setting(0.2, "smallest share of the image in a random crop, in (0, 1]")
    batch_size: int = setting(128, "images of a batch")
    num_workers: list[int] = setting(sorted({0, 1, CORES}), "decoding processes; 0 decodes in the program itself")
    warm_up: int = setting(PLACES, "batches before that, until a worker's memory is used again")
    batches: int = setting(4, "batches that are timed at once")
    repetitions: int = setting(7, "interleaved timings")
    output: str = setting("runs/benchmark/input.json", "file for all numbers")

    mixed_precision: ClassVar[str] = "no"  # there is no model

    def validate(self) -> None:
        """Raise a ValueError that names the first impossible setting, its value and the remedy."""
        self._validate_at_least(1, "image_size", "batch_size", "warm_up", "batches", "repetitions")
        self._validate_share("crop_min_scale", zero=False)
        if len(self.jpeg_size) != 2 or min(self.jpeg_size) < 1:
            raise ValueError(f"jpeg_size takes width and height, got {self.jpeg_size}.")
        if not self.num_workers or min(self.num_workers) < 0 or max(self.num_workers) > self.batch_size:
            raise ValueError(f"num_workers takes numbers from 0 to batch_size={self.batch_size}: {self.num_workers}.")


@contextmanager
def photographs(width: int, height: int) -> Iterator[Path]:
    """A folder with Parquet files of JPEGs in the Hub's layout, two lanes of a stream for each core.

    They are random parts of the photographs that come with scikit-image. All files are one and the same.
    """
    rng, pictures = np.random.default_rng(0), []
    photos = [Image.open(Path(skimage.data.__file__).parent / file).convert("RGB") for file in PHOTOS.values()]
    for number in range(DISTINCT):
        photo, buffer = photos[number % len(photos)], io.BytesIO()
        box = random_crop_box(*photo.size, 0.5, rng)
        photo.resize((width, height), Image.Resampling.BICUBIC, box=box).save(buffer, "JPEG", quality=95)
        pictures.append({"bytes": buffer.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image()})
    column = pa.array(pictures * (ROWS_PER_SHARD // DISTINCT), features.arrow_schema.field(0).type)
    shards = max(2, CORES)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"train-{shard:05d}-of-{shards:05d}.parquet") for shard in range(shards)]
        pq.write_table(pa.table([column], schema=features.arrow_schema), files[0], row_group_size=ROW_GROUP)
        for file in files[1:]:
            file.hardlink_to(files[0])
        yield Path(folder)


class Ready(InReusedMemory):
    """Batches of images that are decoded and cropped already, without end."""

    def __init__(self, images: Cropped) -> None:
        self.images, self.memory = images, ReusedMemory()

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.memory.stack(self.images, [])


class InputCost:
    """What can be timed: each method returns the seconds for `images` images.

    Args:
        source: the images.
        config: the settings.
    """

    def __init__(self, source: ImageSource, config: InputSettings) -> None:
        self.source, self.config = source, config
        self.images = config.batches * config.batch_size
        self.size = (config.image_size, config.image_size)
        self.transform = CropAndFlip(self.size, config.crop_min_scale, horizontal_flip=True)
        self.rows_without_end = self._rows()
        self.rows = list(islice(self.rows_without_end, self.images))
        self.decoded = [decode_rgb(source.image_of(row)) for row in self.rows[: config.batch_size]]
        crops = [self.transform(image, np.random.default_rng(n)) for n, image in enumerate(self.decoded)]
        self.cropped: Cropped = [(image, -1, number) for number, image in enumerate(crops)]
        self.parts = [next(iter(Ready(self.cropped[part::2]))) for part in range(min(2, config.batch_size))]
        steps = [RandomResizedCrop(self.size, (config.crop_min_scale, 1), interpolation=InterpolationMode.BICUBIC)]
        steps += [RandomHorizontalFlip(), ToTensor(), Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)]
        self.textbook = Compose(steps)

    def _rows(self) -> Iterator[Row]:
        while True:
            yield from (row for _, row in self.source.rows_at(np.arange(self.source.num_images)))

    def open(self, row: Row) -> Image.Image:
        """Decode in the shortest way that there is."""
        stored = self.source.image_of(row) or {}
        return Image.open(io.BytesIO(stored["bytes"]) if stored.get("bytes") else stored["path"]).convert("RGB")

    def bare(self) -> float:
        """The plain loop."""
        start = perf_counter()
        for number, row in enumerate(self.rows):
            image = self.open(row)
            box = random_crop_box(*image.size, self.config.crop_min_scale, np.random.default_rng(number))
            image.resize(self.size, Image.Resampling.BICUBIC, box=box)
        return perf_counter() - start

    def chain(self) -> float:
        """The transforms of torchvision as most programs have them, to normalised floats."""
        start = perf_counter()
        for row in self.rows:
            self.textbook(self.open(row))
        return perf_counter() - start

    def loop(self, workers: int) -> float:
        """Our batches, once the first have come."""
        return self._seconds(self._loaded(TrainingBatches, workers))

    def on_device(self, device: torch.device) -> float:
        """Our batches, read by as many workers as are asked for at most, decoded and cropped by a device."""
        loaded = self._loaded(EncodedBatches, max(self.config.num_workers))
        return self._seconds(decode_on_device(batch, self.size, device, self.source) for batch in loaded)

    def _loaded(self, kind: type[TrainingBatches], workers: int) -> Iterator[Batch]:
        order = TrainingOrder(self.source, self.config.batch_size, seed=0, window=16)  # so that reading spreads evenly
        return batches(kind(order, self.transform, 0, self.config.batch_size), workers)

    def send(self) -> float:
        """Ready batches, stacked by a worker, as they come to this process."""
        return self._seconds(received(Ready(self.cropped), 1))

    def _seconds(self, loaded: Iterator[Batch]) -> float:
        for _ in range(self.config.warm_up):
            next(loaded)
        start = perf_counter()
        for _ in islice(loaded, self.config.batches):
            pass
        return perf_counter() - start

    def _repeated(self, work: Callable[[], Any]) -> float:
        start = perf_counter()
        for _ in range(self.config.batches):
            work()
        return perf_counter() - start

    def stages(self) -> dict[str, Callable[[], float]]:
        """What the batches are made of, each alone."""
        source, batch_size = self.source, self.config.batch_size
        images_of_rows = [source.image_of(row) for row in self.rows[:batch_size]]
        return {
            "read": lambda: self._repeated(lambda: list(islice(self.rows_without_end, batch_size))),
            "decode": lambda: self._repeated(lambda: [decode_rgb(stored) for stored in images_of_rows]),
            "crop, resize, flip": lambda: self._repeated(
                lambda: [self.transform(image, np.random.default_rng((0, n))) for n, image in enumerate(self.decoded)]
            ),
            "stack": lambda: self._repeated(lambda: ReusedMemory().stack(self.cropped, [])),
            "stack in a worker, send": self.send,
            "put two parts together": lambda: self._repeated(lambda: concatenate(self.parts)),
        }


def measure_input(accelerator: Accelerator, config: InputSettings) -> list[dict[str, Any]]:
    """Milliseconds per image of the plain loop, the textbook's transforms, our batches, and each stage of these.

    Where there is a CUDA GPU, also of our batches decoded by that.
    """
    device = accelerator.device if accelerator.device.type == "cuda" else None
    if config.dataset is not None:
        source = open_source(config.dataset, config.split, image_column=config.image_column)
        return measure_source(source, config, device)
    with photographs(*config.jpeg_size) as folder:
        return measure_source(open_source(str(folder)), config, device)


def measure_source(
    source: ImageSource, config: InputSettings, device: torch.device | None = None
) -> list[dict[str, Any]]:
    """As `measure_input`, on an opened source, and a device that decodes if there is one.

    Raises:
        ValueError: if it does not fill a batch.
    """
    if source.num_images < config.batch_size:
        raise ValueError(f"batch_size={config.batch_size} is more than the {source.num_images} images: lower it.")
    cost = InputCost(source, config)
    workers: dict[str, int | None] = {BARE: None, CHAIN: None} | {
        f"our batches, {n} workers": n for n in config.num_workers
    }
    works: list[Callable[[], float]] = [cost.bare, cost.chain, *(partial(cost.loop, n) for n in config.num_workers)]
    if device is not None:
        workers[ON_DEVICE] = None  # its rate is not that of a core
        works.append(partial(cost.on_device, device))
    everything = dict(zip(workers, works, strict=True)) | cost.stages()
    seconds: dict[str, list[float]] = {name: [] for name in everything}
    for number in range(1 + config.repetitions):  # one to warm up
        for name, work in everything.items():
            taken = work()
            if number:
                seconds[name].append(taken)
    entries = []
    for name, times in seconds.items():
        cores = min(max(workers.get(name) or 0, 1), CORES)
        entry = {"name": name, "workers": workers.get(name)} | per_image([cores * one for one in times], cost.images)
        if name in workers:
            entry["images_per_second"] = 1000 / entry["ms_per_image"]
            # Of each repetition, so that a machine that slows down hits both
            entry["speed_ratio"] = float(np.median(np.array(seconds[BARE]) / entry["seconds"]))
        entries.append(entry)
    return entries
