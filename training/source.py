"""Where images come from: any `datasets` dataset as undecoded rows, in shards of known length."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from httpx2 import HTTPError
from huggingface_hub.errors import HFValidationError
from numpy.typing import NDArray

from modeling_micl.hub_access import reason, why_unreadable
from training.config import DataSettings
from training.photos import photo_crops
from training.row_groups import read_row_groups
from training.stream import read_rows


Row = dict[str, Any]
DEMONSTRATION = "photos"
_SPLIT_WORDS = {"train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation"}
_HIDDEN = re.compile(r"(^|/)(\.|__)")  # files and folders that the library passes over


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
        rows = self.rows.shard(num_shards=len(self.lengths), index=shard)
        row_groups = self.row_groups[shard] if self.row_groups else [self.lengths[shard]]
        name = f"Shard {shard} of the split {self.split!r}"
        yield from read_rows(rows, row_groups, start, stop, self.stream_timeout, name)

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
        streaming: whether to read while training instead of preparing the whole dataset first; unset, everything
            streams but folders of images, which are on disk already.
        image_column: the only image column when unset.
        label_column: the only class label column when unset, if there is one.
        max_images: use only so many rows, from all over the split.
        stream_timeout: seconds that a stream over a network may give nothing.
        all_columns: whether rows hold all that is stored, instead of image and label only.

    Raises:
        ValueError: if the dataset, the split or a column does not exist, naming what there is.
    """
    builder = _find_builder(str(photo_crops()) if dataset == DEMONSTRATION else dataset, dataset_config)
    if builder.name == "imagefolder":
        _check_none_left_out(Path(dataset).expanduser(), builder)
    streaming = streaming if streaming is not None else builder.name != "imagefolder"
    try:
        if streaming:
            rows = builder.as_streaming_dataset(split=split)
        else:
            builder.download_and_prepare()
            rows = builder.as_dataset(split=split)
    except (ValueError, KeyError) as error:
        if "split" not in str(error).lower():
            raise
        raise ValueError(f"The dataset {dataset!r} has no split {split!r}: {error}") from None
    image_column = _image_column(rows.features, image_column)
    label_column = _label_column(rows.features, label_column)
    columns = sorted(rows.features)
    names = getattr(rows.features[label_column], "names", None) if label_column else None
    rows = rows.cast_column(image_column, datasets.Image(decode=False))
    image_and_label = rows.select_columns([column for column in (image_column, label_column) if column])
    rows = rows if all_columns else image_and_label
    if max_images is not None and isinstance(rows, datasets.Dataset):
        kept = min(max_images, len(rows))
        rows = rows.select([number * len(rows) // kept for number in range(kept)])
    files, row_groups = _files_of(builder, split), None
    parquet = bool(files) and all(file.endswith(".parquet") for file in files)
    if isinstance(rows, datasets.Dataset):
        lengths = [len(rows)]
    else:
        parquet = parquet and len(files) == rows.num_shards
        row_groups = read_row_groups(files) if parquet else None
        lengths = [sum(groups) for groups in row_groups] if row_groups else _count_rows(rows)
    if max_images is not None:
        lengths = first_rows(lengths, max_images)
    if sum(lengths) == 0:
        raise ValueError(f"The split {split!r} of {dataset!r} is empty: check --dataset and --split.")
    fingerprint = _fingerprint(files, lengths, image_and_label.features)
    origin = getattr((builder.config.data_files or {}).get(split), "origin_metadata", None)
    if row_groups and names:  # a thousand of them would be copied several times whenever a shard is opened
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
        version=_digest([fingerprint, origin]),
        files=files if parquet else None,
        row_groups=row_groups,
        stream_timeout=stream_timeout if any("://" in file for file in files) else None,
    )


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


def available_splits(dataset: str, dataset_config: str | None = None) -> list[str]:
    """Names of a dataset's splits, as far as they are known without reading it."""
    builder = _find_builder(str(photo_crops()) if dataset == DEMONSTRATION else dataset, dataset_config)
    return [str(split) for split in builder.config.data_files or builder.info.splits or ()]


def _find_builder(dataset: str, config: str | None) -> datasets.DatasetBuilder:
    path = Path(dataset).expanduser()
    try:
        if path.is_file():
            kind = {".parquet": "parquet", ".tar": "webdataset", ".arrow": "arrow"}.get(path.suffix)
            if kind is None:
                raise ValueError(f"--dataset {dataset}: a file must be .parquet, .tar or .arrow, or name its folder.")
            return datasets.load_dataset_builder(kind, data_files=str(path))
        return datasets.load_dataset_builder(str(path) if path.is_dir() else dataset, config)
    except (OSError, HTTPError, HFValidationError) as error:
        raise ValueError(f"--dataset {dataset!r} {why_unreadable(dataset, error, 'dataset')}") from error
    except RuntimeError as error:  # the library's word for a loading script
        raise ValueError(
            f"--dataset {dataset!r} cannot be read without running its authors' code ({reason(error)}). If the Hub "
            f"keeps a copy as Parquet files, get it with `hf download {dataset} --repo-type dataset --revision "
            "refs/convert/parquet --local-dir FOLDER`, and give the folder."
        ) from error


def _check_none_left_out(folder: Path, builder: datasets.DatasetBuilder) -> None:
    """Raise a ValueError if words in the names of files or classes were taken for those of splits.

    The library looks for `train`, `test`, `val` and the like in the whole path, so that a class "train" beside "bus",
    or one "test-7.png", would be all there is.
    """
    groups = [path for path in folder.iterdir() if path.is_dir() and _SPLIT_WORDS.intersection(_words(path.name))]
    if any(path.is_dir() for group in groups for path in group.iterdir()):
        return  # folders of splits that hold folders of classes
    used = {Path(file) for files in (builder.config.data_files or {}).values() for file in files}
    found = (path for path in folder.rglob("*.*") if not _HIDDEN.search(str(path.relative_to(folder))))
    images = {path.resolve() for path in found if path.suffix.lower() in ImageFolder.EXTENSIONS and path.is_file()}
    left_out = sorted(images - {path.resolve() for path in used})
    if left_out and used:
        example = next(iter(used)).relative_to(folder)
        raise ValueError(
            f"{len(left_out)} of the {len(images)} images in --dataset {folder} would be left out, as "
            f"{left_out[0].name}, because a word in names as {example} is taken for the name of a split: move "
            f"everything into {folder / 'train'}, or rename."
        )


def _words(name: str) -> list[str]:
    return re.split(r"[^a-z]+", name.lower())


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


def first_rows(lengths: list[int], max_images: int) -> list[int]:
    """Rows to take from the head of each shard, in proportion to its length, to get so many in all."""
    kept, ends = min(max_images, sum(lengths)), [0, *accumulate(lengths)]
    shares = [end * kept // max(ends[-1], 1) for end in ends]
    return [after - before for before, after in pairwise(shares)]


def _fingerprint(files: Sequence[str], lengths: Sequence[int], features: datasets.Features) -> str:
    return _digest([[_identity(file) for file in files], list(lengths), str(features)])


def _identity(file: str) -> str:
    """What a file is known by: on the Hub place and content, but not the commit, which changes with the card, too."""
    if file.startswith("hf://"):
        system, path = fsspec.core.url_to_fs(file)
        return f"{re.sub('@[^/]*', '', file, count=1)} {system.info(path)['blob_id']}"
    return file if "://" in file else Path(file).name


def _digest(facts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
