"""The files of a log, metrics.jsonl and skipped.jsonl: one object per line, also after interruptions."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from training.disk import replace_file, without_stopping
from training.skipped import SkippedImage


NAMED = 20  # broken images that are named on the terminal
# The optimiser step and the epoch in which a broken image was met
Met = tuple[int, int, SkippedImage]


class MetricsLog:
    """`metrics.jsonl`, one object per line; entries beyond the resumed step are dropped, as they come again.

    There is no file before the first entry. `kept` are those that were there and stay.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self.waiting: list[str] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        self.kept = [entry for entry in read_metrics(path) if entry["step"] <= step] if step else []
        if not self.kept:
            path.unlink(missing_ok=True)
            return
        with replace_file(path) as unfinished:
            unfinished.write_text("".join(json.dumps(entry) + "\n" for entry in self.kept))

    def write(self, entry: dict[str, Any]) -> None:
        """Append one entry; it must have a step. While the disk is full, entries wait for the next to be written."""
        self.waiting.append(json.dumps(entry) + "\n")
        with without_stopping(str(self.path)):
            self.path.touch()
            size = self.path.stat().st_size
            try:
                with self.path.open("a") as file:
                    file.writelines(self.waiting)
            except OSError:
                os.truncate(self.path, size)  # no half lines
                raise
            self.waiting.clear()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The entries of a `metrics.jsonl`; a line that a crash cut short is left out."""
    entries = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries


class SkippedLog:
    """`skipped.jsonl`: every image that cannot be decoded, once, with the step and the epoch that met it first.

    Its entries, too, are dropped beyond the resumed step, so that an interrupted run leaves the same file.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.file = MetricsLog(path, step)
        self.known = {entry["index"] for entry in self.file.kept}

    def add(self, met: list[Met]) -> list[str]:
        """Append the images that are not there yet; returns what to tell of them: little if they are many."""
        texts = []
        for step, epoch, image in sorted(met, key=lambda one: (one[0], one[2].index)):
            if image.index in self.known:
                continue
            self.known.add(image.index)
            self.file.write({"step": step, "epoch": epoch} | asdict(image))
            if len(self.known) <= NAMED:
                texts.append(f"skipped a broken image: {image}")
            elif len(self.known) == NAMED + 1:
                texts.append(f"more broken images are named in {self.file.path} only")
        return texts
