"""The cost of resuming, as a part of `training.benchmark`: the time to the first batch at places of a long training.

The data are Parquet files with as many rows, files and row groups as ImageNet-1k has on the Hub, which is streamed;
but all rows are one small JPEG, so that they take little space. What is measured is therefore how places are found,
with the rows that lie before them and in the first windows of the shuffle; the bytes of large images come on top.
"""

import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import Accelerator
from PIL import Image

from training.checks import Checks
from training.config import setting
from training.data import TrainingBatches, TrainingOrder, batches
from training.images import central_crop
from training.source import ImageSource, open_source


@dataclass
class ResumeSettings(Checks):
    """How large the data are, and where training resumes."""

    images: int = setting(1_281_167, "rows of all files together")
    shards: int = setting(294, "Parquet files")
    row_group_size: int = setting(100, "rows of a row group")
    global_batch_size: int = setting(4096, "images of a step")
    shuffle_window: int = setting(256, "images that each of the up to 64 readers of a stream holds to shuffle them")
    places: list[float] = setting([0, 0.1, 0.5, 0.99, 100, 100.5], "epochs after which training resumes")
    num_workers: int = setting(0, "decoding processes; 0 decodes in the program itself")
    repetitions: int = setting(3, "timed starts at each place")
    output: str = setting("runs/benchmark/resume.json", "file for all numbers")

    mixed_precision: ClassVar[str] = "no"  # there is no model

    def validate(self) -> None:
        """Raise a ValueError that names the first impossible setting, its value and the remedy."""
        self._validate_at_least(1, "shards", "row_group_size", "global_batch_size", "shuffle_window", "repetitions")
        if self.images < max(self.shards, self.global_batch_size):
            raise ValueError(
                f"images={self.images} do not fill a batch of {self.global_batch_size} or {self.shards} shards."
            )
        if not self.places or min(self.places) < 0:
            raise ValueError(f"places takes numbers of epochs from 0 up, got {self.places}.")


@contextmanager
def synthetic_images(images: int, shards: int, row_group_size: int) -> Iterator[Path]:
    """A folder with Parquet files in the Hub's layout, for as long as it is needed."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(buffer, "JPEG")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    edges = [shard * images // shards for shard in range(shards + 1)]
    with tempfile.TemporaryDirectory() as folder:
        for shard in range(shards):
            rows = edges[shard + 1] - edges[shard]
            pictures = pa.array(
                [{"bytes": buffer.getvalue(), "path": None}] * rows, features.arrow_schema.field(0).type
            )
            table = pa.table([pictures, pa.array(np.arange(rows))], schema=features.arrow_schema)
            file = Path(folder, f"train-{shard:05d}-of-{shards:05d}.parquet")
            pq.write_table(table, file, row_group_size=row_group_size)
        yield Path(folder)


def measure_resume(_: Accelerator, config: ResumeSettings) -> list[dict[str, Any]]:
    """The seconds from an opened source to the first batch at each place; the opening is an entry of its own."""
    entries = []
    with synthetic_images(config.images, config.shards, config.row_group_size) as folder:
        start = perf_counter()
        source = open_source(str(folder))
        opening = perf_counter() - start
        for place in config.places:
            seconds = [time_to_first_batch(source, config, place) for _ in range(config.repetitions)]
            entries.append(
                {"epochs": place, "median_seconds": float(np.median(seconds)), "seconds": seconds}
                | {"opening_seconds": opening}
            )
    return entries


def time_to_first_batch(source: ImageSource, config: ResumeSettings, epochs: float) -> float:
    """Seconds that a run takes from its opened source to its first batch."""
    start = perf_counter()
    order = TrainingOrder(source, config.global_batch_size, seed=0, window=config.shuffle_window)
    step = int(epochs * order.steps_per_epoch)
    places = TrainingBatches(order, central_crop((8, 8)), 0, config.global_batch_size, step)
    next(batches(places, config.num_workers))
    return perf_counter() - start
