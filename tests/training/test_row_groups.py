"""A Parquet file is read from any row on, and what lies in the row groups before is not read."""

from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

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
