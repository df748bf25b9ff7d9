"""A Parquet file is read from any row on, and what lies in the row groups before is not read."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from training import row_groups
from training.row_groups import read_row_groups
from training.source import ImageSource, open_source


SIZES = [4, 4, 3]  # row groups of the first of two files


@pytest.fixture
def folder(write_shards: Callable[..., Path]) -> Path:
    """Two files of several row groups."""
    folder = write_shards(11, 5)
    for file in folder.rglob("*.parquet"):
        pq.write_table(pq.read_table(file), file, row_group_size=4)
    return folder


def read(source: ImageSource, start: int, stop: int, shard: int = 0) -> list[int]:
    """The numbers of the pictures in these rows."""
    images = (source.image_of(row) or {} for row in source.read(shard, start, stop))
    return [int(image["path"].removeprefix("picture-").removesuffix(".png")) for image in images]


def test_the_footers_tell_the_row_groups(folder: Path) -> None:
    assert read_row_groups([str(file) for file in sorted(folder.rglob("*.parquet"))]) == [SIZES, [4, 1]]
    assert open_source(str(folder)).lengths == [11, 5]


def test_any_rows_are_those_of_the_whole_file(folder: Path) -> None:
    source = open_source(str(folder))
    for start in range(11):
        for stop in (start + 1, start + 5, 11):
            assert read(source, start, min(stop, 11)) == list(range(start, min(stop, 11)))
    assert read(source, 3, 5, shard=1) == [14, 15]


@pytest.mark.parametrize("max_images", [None, 14])
def test_a_part_of_the_images_is_read_alike(max_images: int | None, folder: Path) -> None:
    source = open_source(str(folder), max_images=max_images)
    assert read(source, 5, source.lengths[0]) == list(range(5, source.lengths[0]))


def test_what_lies_before_is_not_read(folder: Path) -> None:
    file = min(folder.rglob("*.parquet"))
    second = pq.read_metadata(file).row_group(1).column(0)
    content = bytearray(file.read_bytes())
    first_page = second.dictionary_page_offset or second.data_page_offset
    content[4:first_page] = bytes(first_page - 4)
    file.write_bytes(content)
    source = open_source(str(folder))
    assert read(source, 4, 11) == list(range(4, 11))
    assert read(source, 9, 10) == [9]
    with pytest.raises(Exception, match=r"(?i)thrift|page|parquet|deserialize"):
        read(source, 3, 11)


def in_other_types(file: Path, stored: str) -> None:
    """Write a file of pictures anew with its images stored in one of the ways that `datasets` understands."""
    table = pq.read_table(file)
    content, path = (pa.array([image[name] for image in table["image"].to_pylist()]) for name in ("bytes", "path"))
    images = {
        "path first": pa.StructArray.from_arrays([path, content], ["path", "bytes"]),
        "bytes alone": content,
        "bytes in a struct": pa.StructArray.from_arrays([content], ["bytes"]),
        "large": pa.StructArray.from_arrays([content.cast(pa.large_binary()), path], ["bytes", "path"]),
    }
    labels = table["label"].cast(pa.int8())
    pq.write_table(pa.table({"more": labels, "label": labels, "image": images[stored]}), file, row_group_size=4)


@pytest.mark.parametrize("stored", ["path first", "bytes alone", "bytes in a struct", "large"])
def test_rows_on_disk_are_those_that_the_library_gives(stored: str, folder: Path) -> None:
    for file in folder.rglob("*.parquet"):
        in_other_types(file, stored)
    source = open_source(str(folder), image_column="image", label_column="label")
    over_a_network = replace(source, stream_timeout=60)
    for start, stop in ((0, 11), (3, 4), (4, 11), (6, 9)):
        assert list(source.read(0, start, stop)) == list(over_a_network.read(0, start, stop)) != []
    assert [source.label_of(row) for row in source.read(1, 0, 5)] == [n % 4 for n in range(11, 16)]


@pytest.mark.parametrize("all_columns", [False, True])
def test_few_rows_are_taken_from_the_disk_at_once_where_they_are_images_and_labels(
    all_columns: bool, write_shards: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_shards(40)
    if all_columns:
        for file in folder.rglob("*.parquet"):
            table = pq.read_table(file)
            features = datasets.Features.from_arrow_schema(table.schema) | {"at": datasets.Array2D((2, 1), "int64")}
            rows = table.to_pydict() | {"at": [np.full((2, 1), number) for number in range(40)]}
            datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(file)
    taken = list[int]()
    cast = row_groups.table_cast

    def noting(table: pa.Table, schema: pa.Schema) -> pa.Table:
        taken.append(len(table))
        return cast(table, schema)

    monkeypatch.setattr(row_groups, "table_cast", noting)
    rows = list(open_source(str(folder), all_columns=all_columns).read(0, 0, 40))
    assert len(rows) == 40
    assert taken == ([] if all_columns else [16, 16, 8])
    assert not all_columns or rows[39]["at"] == [[39], [39]]
