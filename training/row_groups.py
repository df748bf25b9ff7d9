"""Where to begin in a Parquet file: its row groups can be read one by one, so that those before are passed over."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import Any

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.table import table_cast


ROWS_AT_ONCE = 16
BYTES_AT_ONCE = 2**18


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
    wanted = _wanted(row_groups, start, stop)
    if wanted and wanted[0][0] == 0:
        yield file.skip(start).take(stop - start)
        return
    groups = file.reshard()
    for group, begin in wanted:
        first = max(start - begin, 0)
        yield groups.shard(num_shards=len(row_groups), index=group).skip(first).take(stop - begin - first)


def rows_on_disk(
    file: str, features: datasets.Features, row_groups: list[int], start: int, stop: int
) -> Iterator[list[dict[str, Any]]]:
    """The rows start ≤ i < stop of a Parquet file, as `datasets` gives them, a few at a time.

    That library reads a row group at once, whose bytes have left the processor's caches when their turn comes.

    Args:
        file: its path.
        features: of the columns to read.
        row_groups: rows of each of its row groups.
        start: first row.
        stop: the row behind the last.
    """
    wanted, schema = _wanted(row_groups, start, stop), features.arrow_schema
    place = wanted[0][1] if wanted else 0
    groups = [group for group, _ in wanted]
    with pq.ParquetFile(file, buffer_size=BYTES_AT_ONCE) as opened:
        for batch in opened.iter_batches(ROWS_AT_ONCE, row_groups=groups, columns=list(features)):
            first, last = (min(max(edge - place, 0), len(batch)) for edge in (start, stop))
            rows = pa.Table.from_batches([batch.slice(first, last - first)])
            yield table_cast(rows, schema).to_pylist()
            place += len(batch)


def _wanted(row_groups: list[int], start: int, stop: int) -> list[tuple[int, int]]:
    """The row groups that hold any of the rows start ≤ i < stop: the number of each, and its first row."""
    groups = enumerate(zip(accumulate(row_groups, initial=0), row_groups, strict=False))
    return [(group, begin) for group, (begin, length) in groups if begin < stop and start < begin + length]
