"""Shards of a prepared split: Parquet files in the Hub's layout, each whole or not there, written by processes.

A split appears in `data/` when all of its shards are written; until then they are in a hidden folder, so that nobody
takes a part of the images for all of them.
"""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.table import embed_table_storage
from torch.utils.data import IterableDataset, get_worker_info

from training.data import MAX_LANES, MIN_ROWS_PER_LANE, run_in_workers, worker_number
from training.disk import is_disk_full, replace_file, synchronise_folder
from training.parts import About, differences, share_of
from training.recoding import Recoding, pixel_difference
from training.skipped import SkippedImage, skipped_image
from training.source import ImageSource, Row


IMAGES_PER_SHARD = 4096  # about 150 MB of ImageNet; at most what each process repeats after a kill
ROWS_PER_GROUP = 100  # what is read at least to find a row
COMPARED = 256  # images of a split whose pixels are compared with the source's
FACTS = b"micl_prepared"  # key of a file's metadata
UNFINISHED = ".unfinished"


@dataclass
class Tally:
    """What happened to the images of a shard, or of several.

    Attributes:
        images_in: rows of the source.
        images_out: those that could be decoded.
        kept: of these, files that are the same byte for byte.
        resized: of these, images with fewer pixels than before.
        bytes_before: of the files of the images that could be decoded.
        bytes_after: of what became of them.
        compared: changed images whose pixels were compared.
        absolute: sum of their mean absolute differences.
        squared: sum of their mean squared differences.
        skipped: images that could not be decoded.
    """

    images_in: int = 0
    images_out: int = 0
    kept: int = 0
    resized: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    compared: int = 0
    absolute: float = 0.0
    squared: float = 0.0
    skipped: list[SkippedImage] = field(default_factory=list)

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(**{each.name: getattr(self, each.name) + getattr(other, each.name) for each in fields(self)})


def usual_number_of_shards(num_images: int) -> int:
    """As many shards as training has readers, or a multiple of that; fewer where there are few images for each."""
    if num_images < MAX_LANES * MIN_ROWS_PER_LANE:
        return max(1, num_images // MIN_ROWS_PER_LANE)
    return MAX_LANES * max(1, round(num_images / (MAX_LANES * IMAGES_PER_SHARD)))


def shard_name(split: str, shard: int, count: int) -> str:
    """File of a shard."""
    return f"{split}-{shard:05d}-of-{count:05d}.parquet"


def edges_of_shards(about: About) -> list[int]:
    """Numbers of the first image of each shard and, as the last, of all images."""
    images, count = about["num_images"], about["num_shards"]
    return [number * images // count for number in range(count + 1)]


class Shards(IterableDataset["int | RuntimeError"]):
    """Writes missing shards; yields how many rows are done since the last time, and as the last item what went wrong.

    Args:
        source: the images, with all columns.
        folder: for the files.
        about: what their rows are, with the number of shards.
        recoding: how images are made small.
        missing: numbers of the shards to write; every worker has a contiguous part of them.
    """

    def __init__(
        self, source: ImageSource, folder: Path, about: About, recoding: Recoding, missing: list[int]
    ) -> None:
        self.about, self.folder, self.recoding, self.missing = about, folder, recoding, missing
        assert source.rows.features is not None
        # Where a WebDataset's tar was is nothing for whoever gets the shards.
        features = datasets.Features({name: kind for name, kind in source.rows.features.items() if name != "__url__"})
        self.features, self.schema = decoding(features, False), decoding(features, True).arrow_schema
        self.source = _undecoded(source, self.features)
        self.edges = edges_of_shards(about)

    def __iter__(self) -> Iterator["int | RuntimeError"]:
        if get_worker_info():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing to end in good order, unlike in training
        mine = share_of(self.missing, *worker_number())
        if not mine:
            return
        rows = self.source.rows_at(np.concatenate([np.arange(*self.edges[shard : shard + 2]) for shard in mine]))
        try:
            for shard in mine:
                yield from self._write(shard, islice(rows, self.edges[shard + 1] - self.edges[shard]))
        except OSError as error:
            if not is_disk_full(error):
                raise
            yield RuntimeError(
                f"{self.folder.parent} is full ({error}): free some space, and run the same command again. What is "
                "written already is good."
            )

    def _write(self, shard: int, rows: Iterator[tuple[int, Row]]) -> Iterator[int]:
        """Write a shard in one move, so that whatever has its name is whole."""
        file = self.folder / shard_name(self.source.split, shard, self.about["num_shards"])
        # A process that outlives a killed run for a moment must not write into the file of the next.
        unfinished, tally = file.with_name(f".tmp-{os.getpid()}-{file.name}"), Tally()
        with (
            replace_file(file, unfinished),
            unfinished.open("wb") as opened,
            pq.ParquetWriter(opened, self.schema, use_dictionary=False) as writer,
        ):
            while some := list(islice(rows, ROWS_PER_GROUP)):
                recoded = self._recode(some, tally)
                if recoded:  # `datasets` cannot read an empty row group
                    writer.write_table(self._table(recoded))
                yield len(some)
            facts = {"about": self.about, "tally": asdict(tally)}
            writer.add_key_value_metadata({FACTS: json.dumps(facts)})

    def _recode(self, rows: list[tuple[int, Row]], tally: Tally) -> list[Row]:
        """The rows whose images can be decoded, with these made small."""
        done, every = [], max(1, self.source.num_images // COMPARED)
        for number, row in rows:
            tally.images_in += 1
            try:
                recoded = self.recoding.recode(self.source.image_of(row))
            except Exception as error:  # Pillow's plugins raise nearly anything
                tally.skipped.append(_without_folders(skipped_image(self.source, number, row, error)))
                continue
            tally.images_out += 1
            tally.kept += recoded.kept
            tally.resized += recoded.resized
            tally.bytes_before += recoded.bytes_before
            tally.bytes_after += len(recoded.content)
            if number % every == 0 and not recoded.kept:
                absolute, squared = pixel_difference(recoded)
                tally.compared += 1
                tally.absolute += absolute
                tally.squared += squared
            done.append(row | {self.source.image_column: row[self.source.image_column] | {"bytes": recoded.content}})
        return done

    def _table(self, rows: list[Row]) -> pa.Table:
        """As the library stores rows: paths without folders, and the files that only have a path inside."""
        columns = {name: [row[name] for row in rows] for name in self.features}
        table = datasets.Dataset.from_dict(columns, features=self.features).with_format("arrow")[:]
        return pa.Table.from_arrays(embed_table_storage(table).columns, schema=self.schema)


def _without_folders(image: SkippedImage) -> SkippedImage:
    """The folders of this machine are nothing for whoever gets the shards."""
    file, name = (Path(path).name if path and "://" not in path else path for path in (image.file, image.name))
    return replace(image, file=file, name=name)


def decoding(features: datasets.Features, enabled: bool) -> datasets.Features:
    """Features that give images, sounds and videos decoded, or as they are stored, wherever they are in a row."""
    empty = datasets.IterableDataset.from_generator(list, features=features)
    return empty.decode(enabled, num_threads=0).features


def _undecoded(source: ImageSource, features: datasets.Features) -> ImageSource:
    rows = source.rows
    assert rows.features is not None
    for name, feature in features.items():
        if feature != rows.features[name]:
            rows = rows.cast_column(name, feature)
    return replace(source, rows=rows)


# What is there already


def read_facts(file: Path) -> tuple[About, Tally]:
    """What a shard's rows are, and what happened to them.

    Raises:
        ValueError: if it is no readable shard of a prepared dataset.
    """
    try:
        metadata = pq.read_metadata(file).metadata or {}
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"{file} cannot be read ({error}): delete it, and run training.prepare again.") from error
    if FACTS not in metadata:
        raise ValueError(f"{file} is not from training.prepare: choose another --output_dir.")
    facts = json.loads(metadata[FACTS])
    skipped = [SkippedImage(**image) for image in facts["tally"].pop("skipped")]
    return facts["about"], Tally(**facts["tally"], skipped=skipped)


def missing_shards(folder: Path, split: str, about: About) -> list[int]:
    """Numbers of a split's shards that are yet to be written.

    Raises:
        ValueError: if those that are there hold something else than `about` says, naming what differs.
    """
    files = [file for place in (UNFINISHED, "data") for file in sorted((folder / place).glob(f"{split}-*.parquet"))]
    for file in files:
        if changes := differences(read_facts(file)[0], about):
            raise ValueError(
                f"{file} was made otherwise ({changes}). Go back to that, or choose another --output_dir."
            )
    there, count = {file.name for file in files}, about["num_shards"]
    return [shard for shard in range(count) if shard_name(split, shard, count) not in there]


def about_split(source: ImageSource, recoding: Recoding, num_shards: int) -> About:
    """What a prepared split depends on; the JPEG encoder, too, so that all shards are those of one run."""
    return {
        "split": source.split,
        "fingerprint": source.fingerprint,
        "version": source.version,
        "image_column": source.image_column,
        "label_column": source.label_column,
        "num_images": source.num_images,
        "num_shards": num_shards,
    } | recoding.about()


def prepare_split(
    source: ImageSource,
    folder: Path,
    about: About,
    recoding: Recoding,
    num_workers: int,
    progress: Callable[[int], Any] = lambda rows: None,
) -> None:
    """Write the shards of a split that are missing, and give it to `data/` when all are there.

    Args:
        source: its images, opened with all columns.
        folder: of the prepared dataset.
        about: `about_split`, and more.
        recoding: how images are made small.
        num_workers: processes that do it; 0 does it in this one.
        progress: called with the number of rows that are done since the last time.

    Raises:
        ValueError: if shards are there that were made otherwise.
        RuntimeError: if the disk is full, or a stream cannot be read any more.
    """
    missing = missing_shards(folder, source.split, about)
    unfinished, data = folder / UNFINISHED, folder / "data"
    for path in (unfinished, data):
        path.mkdir(parents=True, exist_ok=True)
    for left in unfinished.glob(".tmp-*"):
        left.unlink()
    shards = Shards(source, unfinished, about, recoding, missing)
    for done in run_in_workers(shards, min(num_workers, len(missing))):
        if isinstance(done, RuntimeError):
            raise done
        progress(done)
    synchronise_folder(unfinished)
    for file in sorted(unfinished.glob(f"{source.split}-*.parquet")):
        file.rename(data / file.name)
    synchronise_folder(data)
    if all(left.name.startswith(".tmp-") for left in unfinished.iterdir()):
        shutil.rmtree(unfinished, ignore_errors=True)  # a killed run's process may just be removing its own
