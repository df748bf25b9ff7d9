"""What the tests read from a source."""

from training.source import ImageSource, Row


def all_rows(source: ImageSource) -> list[Row]:
    """Every row in stored order, however the source is read."""
    if source.random_access:
        return list(source.rows)
    return [row for shard, length in enumerate(source.lengths) for row in source.read(shard, 0, length)]
