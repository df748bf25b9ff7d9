"""Where images come from: any `datasets` dataset as undecoded rows, in shards of known length."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
from numpy.typing import NDArray

from training.config import DataSettings
from training.named_dataset import available_splits, check_none_left_out, find_builder
from training.row_groups import read_row_groups, rows_on_disk
from training.stream import read_rows, rows_of_stream


Row = dict[str, Any]


@dataclass
class ImageSource:
    """Undecoded rows of one split.

    Attributes:
        rows: a map-style dataset, or a stream that can be split into its shards; columns as `open_source` was told.
        lengths: rows in each shard of the stream; one number for a map-style dataset.
        image_column: column of `rows` with undecoded images.
        label_column: column with integer labels, None if there are none.
        columns: names of all columns that the dataset has.
        split: name of the split.
        class_names: names of the labels, None if the data does not tell.
        fingerprint: changes when files, row counts or columns change; on the Hub also when the files' content does.
        version: changes also when a file is written anew or the Hub has a new commit.
        files: the Parquet files behind the shards, None if they are something else.
        row_groups: rows of each of these files' row groups.
        stream_timeout: seconds that a stream over a network may give nothing; None for files on disk.
    """

    rows: datasets.Dataset | datasets.IterableDataset
    lengths: list[int]
    image_column: str
    label_column: str | None
    columns: list[str]
    class_names: list[str] | None
    split: str
    fingerprint: str
    version: str
    files: list[str] | None = None
    row_groups: list[list[int]] | None = None
    stream_timeout: float | None = None

    @property
    def num_images(self) -> int:
        """Images of one epoch."""
        return sum(self.lengths)

    @property
    def random_access(self) -> bool:
        """Whether rows can be read in any order at no cost."""
        return isinstance(self.rows, datasets.Dataset)

    def read(self, shard: int, start: int, stop: int) -> Iterator[Row]:
        """Rows start ≤ i < stop of one shard of a stream, in stored order.

        Raises:
            StreamError: if they cannot be read, over a network after `stream_timeout` seconds of attempts.
        """
        assert isinstance(self.rows, datasets.IterableDataset)
        row_groups = self.row_groups[shard] if self.row_groups else [self.lengths[shard]]
        features = self.rows.features or datasets.Features()
        # Columns beside those may be of types that only `datasets` knows.
        if self.files and self.stream_timeout is None and set(features) <= {self.image_column, self.label_column}:
            lists = partial(rows_on_disk, self.files[shard], features, row_groups)
        else:
            rows = self.rows.shard(num_shards=len(self.lengths), index=shard)
            lists = partial(rows_of_stream, rows, row_groups)
        yield from read_rows(lists, start, stop, self.stream_timeout, f"Shard {shard} of the split {self.split!r}")

    def rows_at(self, numbers: NDArray[np.int64]) -> Iterator[tuple[int, Row]]:
        """The rows with these numbers in the data, which must rise, each with its number; reads a shard only once."""
        if isinstance(self.rows, datasets.Dataset):
            yield from ((number, self.rows[number]) for number in numbers.tolist())
            return
        begins = np.cumsum([0, *self.lengths])
        shards = np.searchsorted(begins, numbers, side="right") - 1
        for shard in np.unique(shards).tolist():
            wanted, begin = numbers[shards == shard].tolist(), int(begins[shard])
            rows = enumerate(self.read(shard, wanted[0] - begin, wanted[-1] + 1 - begin), wanted[0])
            chosen = set(wanted)
            yield from ((number, row) for number, row in rows if number in chosen)

    def image_of(self, row: Row) -> dict[str, Any] | None:
        """The undecoded image in a row."""
        image: dict[str, Any] | None = row[self.image_column]
        return image

    def label_of(self, row: Row) -> int:
        """The label in a row, -1 where there is none."""
        label = row[self.label_column] if self.label_column else None
        return -1 if label is None else int(label)


def open_source(
    dataset: str,
    split: str = "train",
    dataset_config: str | None = None,
    streaming: bool | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    max_images: int | None = None,
    stream_timeout: float = 600,
    all_columns: bool = False,
) -> ImageSource:
    """Open one split of a dataset without decoding anything.

    Args:
        dataset: Hub id, local folder of Parquet files, WebDataset tars or images, one such file, or `"photos"`.
        split: its split.
        dataset_config: the configuration's name where a Hub dataset has several.
        streaming: read while training, or prepare all of it first; unset, everything streams but folders of images.
        image_column: the only image column when unset.
        label_column: the only class label column when unset, if there is one.
        max_images: use only so many rows, from all over the split.
        stream_timeout: seconds that a stream over a network may give nothing.
        all_columns: whether rows hold all that is stored, instead of image and label only.

    Raises:
        ValueError: if the dataset, the split or a column does not exist, naming what there is.
    """
    builder, rows = _open_rows(dataset, split, dataset_config, streaming)
    files = _files_of(builder, split)
    image_column = _image_column(rows.features, image_column)
    label_column = _label_column(rows.features, label_column)
    columns = sorted(rows.features)
    names = getattr(rows.features[label_column], "names", None) if label_column else None
    rows = rows.cast_column(image_column, datasets.Image(decode=False))
    image_and_label = rows.select_columns([column for column in (image_column, label_column) if column])
    rows = rows if all_columns else image_and_label
    if max_images is not None and isinstance(rows, datasets.Dataset):
        rows = rows.select(_spread(len(rows), max_images))
    parquet, row_groups, lengths = _shards(rows, files)
    if max_images is not None:
        lengths = first_rows(lengths, max_images)
    if sum(lengths) == 0:
        raise ValueError(f"The split {split!r} of {dataset!r} is empty: check --dataset and --split.")
    fingerprint = _fingerprint(files, lengths, image_and_label.features)
    if row_groups and names and not all_columns:  # a thousand would be copied several times for each opened shard
        rows = rows.cast_column(label_column, datasets.Value("int64"))
    return ImageSource(
        rows=rows,
        lengths=lengths,
        image_column=image_column,
        label_column=label_column,
        columns=columns,
        class_names=names,
        split=split,
        fingerprint=fingerprint,
        version=_version(fingerprint, builder, split),
        files=files if parquet else None,
        row_groups=row_groups,
        stream_timeout=stream_timeout if any("://" in file for file in files) else None,
    )


def _open_rows(dataset: str, split: str, dataset_config: str | None, streaming: bool | None) -> tuple[Any, Any]:
    """The library's builder of a dataset, and the rows of a split with decoded images."""
    builder = find_builder(dataset, dataset_config)
    if builder.name == "imagefolder":
        check_none_left_out(Path(dataset).expanduser(), builder)
    streaming = streaming if streaming is not None else builder.name != "imagefolder"
    try:
        if streaming:
            return builder, builder.as_streaming_dataset(split=split)
        builder.download_and_prepare()
        return builder, builder.as_dataset(split=split)
    except (ValueError, KeyError) as error:
        if "split" not in str(error).lower():
            raise
        raise ValueError(f"The dataset {dataset!r} has no split {split!r}: {error}") from None


def _shards(rows: Any, files: list[str]) -> tuple[bool, list[list[int]] | None, list[int]]:
    """Whether each shard is a Parquet file, the lengths of their row groups where they are streamed, and their own."""
    parquet = bool(files) and all(file.endswith(".parquet") for file in files)
    if isinstance(rows, datasets.Dataset):
        return parquet, None, [len(rows)]
    if not (parquet and len(files) == rows.num_shards):
        return False, None, _count_rows(rows)
    row_groups = read_row_groups(files)
    return True, row_groups, [sum(groups) for groups in row_groups]


def open_split(
    settings: DataSettings, split: str, max_images: int | None = None, all_columns: bool = False
) -> ImageSource:
    """Open a split of the dataset that the settings name; see `open_source`."""
    where = (settings.dataset_config, settings.streaming, settings.image_column, settings.label_column)
    how = (max_images, settings.stream_timeout, all_columns)
    return open_source(settings.dataset, split, *where, *how)


def evaluation_split(settings: DataSettings) -> str | None:
    """The split to evaluate on: the one that is asked for, else 'validation' or 'test' if there is one."""
    if settings.eval_split:
        return settings.eval_split
    splits = available_splits(settings.dataset, settings.dataset_config)
    return next((name for name in ("validation", "test") if name in splits), None)


def open_evaluation(settings: DataSettings, source: ImageSource) -> ImageSource | None:
    """The split to evaluate on, None where there is none or the training images have no labels."""
    split = evaluation_split(settings)
    return None if source.label_column is None or split is None else open_split(settings, split)


def _files_of(builder: datasets.DatasetBuilder, split: str) -> list[str]:
    files = builder.config.data_files or {}
    return [str(file) for file in files.get(split, [])]


def _image_column(features: datasets.Features, asked: str | None) -> str:
    images: list[str] = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if asked is not None:
        if asked not in features:
            raise ValueError(f"--image_column {asked!r} does not exist: the columns are {sorted(features)}.")
        return asked
    if len(images) != 1:
        found = f"has several image columns {images}" if images else f"has no image column among {sorted(features)}"
        raise ValueError(f"The dataset {found}: name the one to use with --image_column.")
    return images[0]


def _label_column(features: datasets.Features, asked: str | None) -> str | None:
    if asked is not None:
        integer = isinstance(features.get(asked), datasets.Value) and "int" in features[asked].dtype
        if not integer and not isinstance(features.get(asked), datasets.ClassLabel):
            raise ValueError(
                f"--label_column {asked!r} must hold integers or class labels: the columns are {dict(features)}."
            )
        return asked
    labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    return labels[0] if len(labels) == 1 else None


def _count_rows(rows: datasets.IterableDataset) -> list[int]:
    """Rows of every shard, by reading through all of them once."""
    shards = [rows.shard(num_shards=rows.num_shards, index=index) for index in range(rows.num_shards)]
    return [sum(1 for _ in shard) for shard in shards]


def _spread(num_rows: int, max_images: int) -> list[int]:
    """So many rows at most, from all over the split."""
    kept = min(max_images, num_rows)
    return [number * num_rows // kept for number in range(kept)]


def first_rows(lengths: list[int], max_images: int) -> list[int]:
    """Rows to take from the head of each shard, in proportion to its length, to get so many in all."""
    kept, ends = min(max_images, sum(lengths)), [0, *accumulate(lengths)]
    shares = [end * kept // max(ends[-1], 1) for end in ends]
    return [after - before for before, after in pairwise(shares)]


def evaluation_numbers(source: ImageSource, num_images: int) -> NDArray[np.int64]:
    """Numbers of evenly spaced images where access is random, else the first of each shard in proportion."""
    if source.random_access:
        return np.arange(num_images) * source.num_images // num_images
    begins = np.cumsum([0, *source.lengths])
    shares = first_rows(source.lengths, num_images)
    return np.concatenate([begin + np.arange(share) for begin, share in zip(begins, shares, strict=False)])


def _fingerprint(files: Sequence[str], lengths: Sequence[int], features: datasets.Features) -> str:
    return _digest([[_identity(file) for file in files], list(lengths), str(features)])


def _version(fingerprint: str, builder: datasets.DatasetBuilder, split: str) -> str:
    return _digest([fingerprint, getattr((builder.config.data_files or {}).get(split), "origin_metadata", None)])


def _identity(file: str) -> str:
    """What a file is known by: on the Hub place and content, but not the commit, which changes with the card, too."""
    if file.startswith("hf://"):
        system, path = fsspec.core.url_to_fs(file)
        return f"{re.sub('@[^/]*', '', file, count=1)} {system.info(path)['blob_id']}"
    return file if "://" in file else Path(file).name


def _digest(facts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
