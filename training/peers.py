"""Which processes of a run are lost, from the signs of life that each leaves in the key-value store of the launch.

A collective only tells that somebody did not come. So a thread of each process writes a number that grows, and reads
those of the others; it goes on while the process waits for them, and touches no device. A process whose number stands
still is dead, stopped or cut off. One whose number grows, and that has not given up as those have that waited for it,
hangs.
"""

import os
import sys
import time
from datetime import timedelta
from threading import Event, Thread
from typing import Self

import torch.distributed as dist
from tqdm.auto import tqdm


BEAT = 0.5  # seconds between two signs of life
SILENT = 3.0  # seconds without one after which a process is lost, if another waits for it in vain
PATIENCE = 10.0  # seconds for an answer of the store, which may only be slow: whoever gives up gives no more signs
WARN = 60.0  # seconds without one after which a warning says so
AT_WORK, GAVE_UP, DONE, FAILED = "at work", "gave up", "done", "failed"


class Peers:
    """The signs of life of all processes of a run.

    Args:
        rank: of this process.
        processes: how many there are.
    """

    def __init__(self, rank: int, processes: int) -> None:
        self.rank, self.state, self.ended = rank, AT_WORK, Event()
        self.keys = [f"peers/{number}" for number in range(processes)]
        self.values = [f"0 {AT_WORK}"] * processes  # as last read
        self.read = time.monotonic()
        self.changed = [self.read] * processes  # when values were found to be others
        self.warned: set[int] = set()
        self.thread = Thread(target=self._live, name="peers", daemon=True)

    def __enter__(self) -> Self:
        """Begin to give signs of life; one process alone has nobody to give them to."""
        if len(self.keys) > 1:
            self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Leave the others, with a last word for them."""
        if self.state == AT_WORK:
            self.state = FAILED if kind else DONE
        self.ended.set()
        if self.thread.is_alive():
            self.thread.join(WARN if self.state == FAILED else SILENT)
            if self.state == FAILED:
                time.sleep(2 * BEAT)  # until the others have read it: the store may end with this process

    def lost(self) -> str:
        """Name the processes that this one waits for in vain, and what is known of them; takes a few seconds."""
        self.state = GAVE_UP
        time.sleep(2 * SILENT)  # what others have to tell arrives, and who is dead becomes silent
        states = [value.partition(" ")[2] for value in self.values]
        blamed = [rank for rank, state in enumerate(states) if rank != self.rank and state in (AT_WORK, FAILED)]
        store_is_gone = time.monotonic() - self.read > SILENT
        silent = [rank for rank in blamed if self.silence(rank) > SILENT]
        if store_is_gone and not silent and 0 in blamed and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            silent = [0]  # which serves the store
        if failed := [rank for rank in blamed if states[rank] == FAILED]:
            return f"{_names(failed)} (ended by an error of its own)"
        if silent:
            return f"{_names(silent)} (no sign of life: killed, stopped or cut off)"
        if store_is_gone and blamed:
            return "others (which cannot be told, as the launcher's store is gone, too)"
        return f"{_names(blamed)} (alive, but hangs)" if blamed else "the others (which have given up waiting for it)"

    def silence(self, rank: int) -> float:
        """Seconds without a sign of life, as of the last time that they were read."""
        return self.read - self.changed[rank]

    def _live(self) -> None:
        try:
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            # Its own connection, as that of the process group may be waiting.
            patience = timedelta(seconds=WARN)  # all processes come at once, while they start
            store = dist.TCPStore(host, port, timeout=patience, wait_for_workers=False)  # type: ignore[attr-defined]
            store.set_timeout(timedelta(seconds=PATIENCE))
            for key in self.keys:
                store.compare_set(key, "", f"0 {AT_WORK}")  # so that there is something to read
            beats, last = 0, False
            while not last:
                beats, last = beats + 1, self.ended.is_set()  # before `state` is read, so that its last value is told
                store.set(self.keys[self.rank], f"{beats} {self.state}")
                self._take([value.decode() for value in store.multi_get(self.keys)])
                self.ended.wait(BEAT)
        except dist.DistError:
            return  # the store is gone, as `read` shows

    def _take(self, values: list[str]) -> None:
        self.read = time.monotonic()
        for rank, value in enumerate(values):
            if value != self.values[rank]:
                self.changed[rank] = self.read
        self.values = values
        for rank, value in enumerate(values):
            if self.silence(rank) > WARN and value.endswith(AT_WORK) and rank not in self.warned:
                self.warned.add(rank)
                warning = f"WARNING: process {rank} has given no sign of life for {WARN:.0f} seconds."
                tqdm.write(warning, file=sys.stderr)


def _names(ranks: list[int]) -> str:
    names = ", ".join(map(str, ranks))
    return f"process {names}" if len(ranks) == 1 else f"processes {names}"
