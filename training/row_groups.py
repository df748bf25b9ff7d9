"""Where to begin in a Parquet file: its row groups can be read one by one, so that those before are passed over."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import datasets
import fsspec
import pyarrow.parquet as pq


def read_row_groups(files: Sequence[str]) -> list[list[int]]:
    """Rows of every row group of every file, from the footers."""
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(_row_groups, files))


def _row_groups(file: str) -> list[int]:
    with fsspec.open(file, "rb") as opened:
        footer = pq.read_metadata(opened)
        return [int(footer.row_group(group).num_rows) for group in range(footer.num_row_groups)]


def rows_between(
    file: datasets.IterableDataset, row_groups: list[int], start: int, stop: int
) -> Iterator[datasets.IterableDataset]:
    """Streams that together give the rows start ≤ i < stop of a Parquet file.

    The row groups before `start` are not read. Where there are any, each of the others is a stream of its own, which
    costs one more request over a network; otherwise it is the whole file.

    Args:
        file: the file as a stream.
        row_groups: rows of each of its row groups.
        start: first row.
        stop: the row behind the last.
    """
    ends = list(accumulate(row_groups))
    passed_over = bisect_right(ends, start)
    if passed_over == 0:
        yield file.skip(start).take(stop - start)
        return
    groups = file.reshard()
    for group in range(passed_over, bisect_right(ends, stop - 1) + 1):
        begin = ends[group] - row_groups[group]
        first = max(start - begin, 0)
        yield groups.shard(num_shards=len(row_groups), index=group).skip(first).take(stop - begin - first)
