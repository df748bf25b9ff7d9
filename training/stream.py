"""Rows of a shard that may come over a bad network: where it fails, the shard is opened again at the row reached."""

import logging
import time
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

import datasets
from httpx2 import HTTPError
from pyarrow import ArrowException

from modeling_micl.hub_access import reason
from training.row_groups import rows_between


FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds between two attempts; it doubles from one to the next
FAILURES = (OSError, HTTPError, ArrowException)  # Arrow's is what becomes of an answer that lacks bytes
BUSY = (408, 429)  # statuses below 500 that say "later", not "no"

Rows = list[dict[str, Any]]
logger = logging.getLogger(__name__)


class StreamError(RuntimeError):
    """A stream cannot be read any more; its message is for users."""


def read_rows(
    lists: Callable[[int, int], Iterator[Rows]], start: int, stop: int, timeout: float | None, name: str
) -> Iterator[dict[str, Any]]:
    """Rows start ≤ i < stop of a shard in stored order, each exactly once.

    Args:
        lists: gives the rows between two places in lists.
        start: the first row.
        stop: the row behind the last.
        timeout: seconds of waiting for the next row over a network, in which the libraries' own attempts and ours are
            repeated; None for files on disk, where there is one attempt.
        name: of the shard, for errors.

    Raises:
        StreamError: if nothing has come for so long, or the answer is one that will not change.
    """
    try:
        for rows in lists(start, stop) if timeout is None else _read_on(lists, start, stop, timeout, name):
            yield from rows
    except FAILURES as error:
        raise StreamError(
            f"{name} cannot be read any more ({reason(error)}). Run the same command again when it can be: training "
            "goes on from its newest checkpoint."
        ) from None  # the cause might quote the token


def rows_of_stream(stream: datasets.IterableDataset, row_groups: list[int], start: int, stop: int) -> Iterator[Rows]:
    """Lists of the rows start ≤ i < stop of one shard, of which `row_groups` are its parts to begin with."""
    for part in rows_between(stream, row_groups, start, stop):
        # Read in batches because a plain loop in a DataLoader's worker would give it only a part of the rows.
        for batch in part.iter(batch_size=16):
            yield [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def _read_on(
    lists: Callable[[int, int], Iterator[Rows]], place: int, stop: int, timeout: float, name: str
) -> Iterator[Rows]:
    _retry_only_here()
    reader, pause, failure = _Reader(lists(place, stop)), FIRST_PAUSE, None
    deadline = time.monotonic() + timeout
    try:
        while place < stop:
            try:
                rows = reader.read(deadline - time.monotonic())
                if not rows:
                    raise OSError(f"it ends before row {place} of {stop}")
            except FAILURES as error:
                reader.close()
                failure = _failure_behind(error, failure)
                left = deadline - time.monotonic()
                if not _may_pass(failure):
                    raise failure from None
                if left <= 0:
                    raise TimeoutError(f"no row for stream_timeout={timeout:g} seconds: {reason(failure)}") from None
                wait = min(max(pause, _retry_after(failure)), left)
                logger.warning("%s: %s; trying again in %.1f s", name, reason(failure), wait)
                time.sleep(wait)
                reader, pause = _Reader(lists(place, stop)), min(2 * pause, LONGEST_PAUSE)
                continue
            yield rows
            place += len(rows)
            pause, failure, deadline = FIRST_PAUSE, None, time.monotonic() + timeout  # only waiting counts
    finally:
        reader.close()


class _Reader:
    """Reads in a thread of its own, so that it can be left behind where a library would wait for hours."""

    def __init__(self, lists: Iterator[Rows]) -> None:
        self.wanted: SimpleQueue[bool] = SimpleQueue()
        self.given: SimpleQueue[Rows | Exception] = SimpleQueue()
        Thread(target=self._work, args=(lists,), daemon=True).start()

    def _work(self, lists: Iterator[Rows]) -> None:
        while self.wanted.get():
            try:
                self.given.put(next(lists, []))
            except Exception as error:  # raised again where it is waited for
                self.given.put(error)

    def read(self, seconds: float) -> Rows:
        """The next rows, none at the end; TimeoutError if they do not come in time."""
        self.wanted.put(True)
        try:
            answer = self.given.get(timeout=max(seconds, 0))
        except Empty:
            raise TimeoutError("no answer") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        """Let the thread end as soon as it has what it waits for."""
        self.wanted.put(False)


def _retry_only_here() -> None:
    """Turn off the attempts of `datasets`, which know neither a deadline nor Retry-After and hide what failed.

    Those of huggingface_hub stay: some within seconds, after Retry-After if the Hub sends it.
    """
    config = datasets.config
    config.STREAMING_READ_MAX_RETRIES = config.STREAMING_OPEN_MAX_RETRIES = 1
    config.STREAMING_READ_RETRY_INTERVAL = config.STREAMING_OPEN_RETRY_INTERVAL = 0
    config.STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL = config.STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL = 0


def _failure_behind(error: Exception, before: Exception | None) -> Exception:
    """What to tell of an error: its cause, or if there only was no answer in time, what failed before."""
    if isinstance(error, TimeoutError) and before is not None:
        return before
    return error.__cause__ if isinstance(error.__cause__, FAILURES) else error


def _may_pass(failure: Exception) -> bool:
    """Whether the same may succeed later."""
    response = getattr(failure, "response", None)
    if response is not None:
        return bool(response.status_code in BUSY or response.status_code >= 500)
    return not isinstance(failure, FileNotFoundError | PermissionError)


def _retry_after(failure: Exception) -> float:
    """Seconds that the server asks to wait; 0 if it does not say."""
    response = getattr(failure, "response", None)
    asked = response.headers.get("Retry-After", "") if response is not None else ""
    return float(asked) if asked.isdigit() else 0.0
