"""Images that cannot be decoded: where each is in the data, and why it is left out."""

from dataclasses import dataclass
from itertools import accumulate

from training.source import ImageSource, Row


MAX_REASON = 300  # characters; some of Pillow's messages quote the file


@dataclass(frozen=True)
class SkippedImage:
    """An image that could not be decoded.

    Attributes:
        index: its number in the data, counted from 0 through all shards.
        shard: number of its shard; 0 where access is random.
        row: its row in the shard.
        file: the Parquet file that is the shard, None if it is something else.
        name: its path, or the name that the row gives it, None if there is none.
        reason: what is wrong with it.
    """

    index: int
    shard: int
    row: int
    file: str | None
    name: str | None
    reason: str

    def __str__(self) -> str:
        return f"image {self.index}{f' ({self.name})' if self.name else ''}: {self.reason}"


def skipped_image(source: ImageSource, index: int, row: Row, error: Exception) -> SkippedImage:
    """What is to be known of an image whose decoding ended with an error."""
    ends = list(accumulate(source.lengths))
    shard = next(number for number, end in enumerate(ends) if index < end)
    file = source.files[shard] if source.files and not source.random_access else None
    return SkippedImage(
        index=index,
        shard=shard,
        row=index - (ends[shard] - source.lengths[shard]),
        file=file,
        name=(source.image_of(row) or {}).get("path"),
        reason=f"{type(error).__name__}: {error}"[:MAX_REASON],
    )
