"""Datasets of every kind as undecoded rows in shards of known length."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Image, Value, load_dataset_builder
from source_rows import all_rows
from torch.utils.data import DataLoader, IterableDataset

from training.source import ImageSource, Row, _fingerprint, open_source


Write = Callable[..., Path]


def numbers(source: ImageSource, rows: list[Row]) -> list[int]:
    """Numbers of the pictures, by their names."""
    return [int("".join(filter(str.isdigit, Path(source.image_of(row)["path"]).name))) for row in rows]


def test_a_folder_in_the_hubs_layout_streams(write_shards: Write) -> None:
    source = open_source(str(write_shards(5, 1, 7)))
    assert not source.random_access
    assert (source.lengths, source.num_images) == ([5, 1, 7], 13)
    assert (source.image_column, source.label_column) == ("image", "label")
    assert source.class_names == [f"class {label}" for label in range(4)]
    rows = all_rows(source)
    assert numbers(source, rows) == list(range(13))
    assert [source.label_of(row) for row in rows] == [n % 4 for n in range(13)]
    assert source.image_of(rows[0])["bytes"].startswith(b"\x89PNG")


def test_names_of_classes_are_not_carried_along_with_every_shard(write_shards: Write) -> None:
    """The library copies them a few times for each, but what they were is a part of the fingerprint of old runs."""
    folder = write_shards(5, 1, 7)
    source = open_source(str(folder))
    stored = load_dataset_builder(str(folder)).as_streaming_dataset(split="train")
    features = stored.cast_column("image", Image(decode=False)).features
    assert isinstance(features["label"], ClassLabel)
    assert source.rows.features["label"] == Value("int64")
    assert source.fingerprint == _fingerprint(source.files, [5, 1, 7], features)


def test_the_same_folder_can_be_read_at_random(write_shards: Write) -> None:
    source = open_source(str(write_shards(5, 1, 7)), streaming=False)
    assert source.random_access
    assert source.lengths == [13]
    assert numbers(source, all_rows(source)) == list(range(13))
    assert source.image_of(source.rows[11])["bytes"].startswith(b"\x89PNG")


def test_one_parquet_file_is_a_dataset(write_shards: Write) -> None:
    file = next(write_shards(6).rglob("*.parquet"))
    assert open_source(str(file)).lengths == [6]
    assert open_source(str(file), streaming=False).lengths == [6]


def test_webdataset_tars_stream(write_tars: Write) -> None:
    folder = write_tars(4, 3)
    source = open_source(str(folder), label_column="cls")
    assert not source.random_access
    assert (source.image_column, source.lengths) == ("png", [4, 3])
    rows = all_rows(source)
    assert numbers(source, rows) == list(range(7))
    assert [source.label_of(row) for row in rows] == [n % 2 for n in range(7)]
    assert open_source(str(folder / "train-0001.tar")).lengths == [3]
    assert open_source(str(folder)).label_column is None


def test_a_folder_of_images_is_read_at_random_and_its_folders_are_the_classes(write_image_folder: Write) -> None:
    source = open_source(str(write_image_folder(7)))
    assert source.random_access
    assert (source.lengths, source.class_names, source.label_column) == ([7], ["even", "odd"], "label")
    rows = all_rows(source)
    assert sorted(numbers(source, rows)) == list(range(7))
    assert [source.label_of(row) for row in rows] == [n % 2 for n in numbers(source, rows)]


def test_a_folder_of_images_can_stream(write_image_folder: Write) -> None:
    source = open_source(str(write_image_folder(7)), streaming=True)
    assert not source.random_access
    assert source.num_images == 7
    assert sorted(numbers(source, all_rows(source))) == list(range(7))


def test_a_home_folder_may_be_written_with_a_tilde(write_shards: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_shards(3)
    monkeypatch.setenv("HOME", str(folder.parent))
    assert open_source(f"~/{folder.name}").num_images == 3


@pytest.mark.parametrize("bounds", [(0, 7), (0, 0), (2, 5), (6, 7), (3, 3)])
def test_a_part_of_a_shard_can_be_read(bounds: tuple[int, int], write_shards: Write) -> None:
    source = open_source(str(write_shards(5, 40, 7)))
    for shard, first in ((0, 0), (1, 5), (2, 45)):
        start, stop = (min(bound, source.lengths[shard]) for bound in bounds)
        assert numbers(source, list(source.read(shard, start, stop))) == list(range(first + start, first + stop))
    assert numbers(source, list(source.read(1, 15, 35))) == list(range(20, 40))


class _ReadsAllShards(IterableDataset[list[int]]):
    def __init__(self, source: ImageSource) -> None:
        self.source = source

    def __iter__(self) -> Iterator[list[int]]:
        yield numbers(self.source, all_rows(self.source))


def read_in_workers(source: ImageSource) -> list[list[int]]:
    return list(DataLoader(_ReadsAllShards(source), batch_size=None, num_workers=2))


def test_a_worker_process_reads_all_that_it_asks_for(write_shards: Write) -> None:
    assert read_in_workers(open_source(str(write_shards(5, 20, 7)))) == [list(range(32))] * 2


def test_reading_that_datasets_splits_among_workers_would_be_noticed(
    write_shards: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(self: ImageSource, shard: int, start: int, stop: int) -> Iterator[Row]:
        yield from self.rows.shard(len(self.lengths), shard).skip(start).take(stop - start)

    source = open_source(str(write_shards(5, 20, 7)))
    monkeypatch.setattr(ImageSource, "read", read)
    assert numbers(source, all_rows(source)) == list(range(32))
    assert read_in_workers(source) != [list(range(32))] * 2


@pytest.mark.parametrize(
    ("max_images", "lengths"), [(1, [0, 0, 1]), (3, [0, 1, 2]), (8, [2, 2, 4]), (16, [5, 4, 7]), (100, [5, 4, 7])]
)
def test_a_part_of_a_stream_is_the_head_of_every_shard(
    max_images: int, lengths: list[int], write_shards: Write
) -> None:
    source = open_source(str(write_shards(5, 4, 7)), max_images=max_images)
    assert source.lengths == lengths
    heads = [range(first, first + length) for first, length in zip((0, 5, 9), lengths, strict=True)]
    assert numbers(source, all_rows(source)) == [number for head in heads for number in head]


@pytest.mark.parametrize("max_images", [1, 3, 8, 16, 100])
def test_a_part_of_data_with_random_access_is_evenly_spaced(max_images: int, write_shards: Write) -> None:
    source = open_source(str(write_shards(5, 4, 7)), streaming=False, max_images=max_images)
    count = min(max_images, 16)
    assert source.lengths == [count]
    found = numbers(source, all_rows(source))
    assert found == [number * 16 // count for number in range(count)]
    assert found == sorted(set(found))


def test_an_empty_shard_is_passed_over(write_shards: Write) -> None:
    source = open_source(str(write_shards(5, 0, 7)))
    assert source.lengths == [5, 0, 7]
    assert numbers(source, all_rows(source)) == list(range(12))


def test_the_fingerprint_tells_other_data(write_shards: Write) -> None:
    prints = [
        open_source(str(write_shards(5, 6, folder="a"))).fingerprint,
        open_source(str(write_shards(5, 7, folder="b"))).fingerprint,
        open_source(str(write_shards(6, 5, folder="c"))).fingerprint,
        open_source(str(write_shards(5, 6, folder="d", labels=3))).fingerprint,
        open_source(str(write_shards(5, 6, split="other", folder="e")), split="other").fingerprint,
        open_source(str(write_shards(5, 6, folder="f")), max_images=10).fingerprint,
    ]
    assert len(set(prints)) == len(prints)


@pytest.mark.parametrize("streaming", [True, False])
def test_the_fingerprint_stays_where_the_data_is_moved(streaming: bool, write_shards: Write) -> None:
    folders = (write_shards(5, 6, folder="here"), write_shards(5, 6, folder="there"))
    here, there = (open_source(str(folder), streaming=streaming).fingerprint for folder in folders)
    assert here == there


@pytest.mark.parametrize("streaming", [True, False])
def test_the_version_tells_files_that_were_written_anew(streaming: bool, write_shards: Write) -> None:
    """Other pictures in files of the same names and lengths: features of the old ones must not be taken for theirs."""
    folder = str(write_shards(5, 6))
    before = open_source(folder, streaming=streaming)
    assert open_source(folder, streaming=streaming).version == before.version
    write_shards(5, 6, broken=range(11))
    after = open_source(folder, streaming=streaming)
    assert after.fingerprint == before.fingerprint
    assert after.version != before.version


def test_the_version_tells_other_splits_and_parts(write_shards: Write) -> None:
    write_shards(5, 6)
    folder = str(write_shards(5, 6, split="test"))
    versions = {open_source(folder, split, max_images=n).version for split in ("train", "test") for n in (None, 10)}
    assert len(versions) == 4


def test_only_parquet_files_are_listed(write_shards: Write, write_tars: Write, write_image_folder: Write) -> None:
    folder = write_shards(5, 6)
    files = open_source(str(folder)).files
    assert files is not None
    assert [Path(file).name for file in files] == [path.name for path in sorted(folder.rglob("*.parquet"))]
    assert open_source(str(write_tars(4, 3))).files is None
    assert open_source(str(write_image_folder(4)), streaming=True).files is None


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("numbers", [[0], [6, 7], [1, 4, 9, 10, 16], list(range(17))], ids=str)
def test_rows_are_found_by_their_numbers(
    numbers: list[int], streaming: bool, write_shards: Callable[..., Path]
) -> None:
    source = open_source(str(write_shards(7, 3, 7)), streaming=streaming)
    found = list(source.rows_at(np.array(numbers)))
    assert [number for number, _ in found] == numbers
    assert [row["image"]["path"] for _, row in found] == [f"picture-{number}.png" for number in numbers]
