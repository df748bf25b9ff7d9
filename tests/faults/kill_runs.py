"""Kills pre-training with SIGKILL at random moments and starts it again with the same command, again and again.

`python -m tests.faults.kill_runs --kills 200 --processes 1 2 --output faults.json` prints a table and writes all
figures. A run is killed until it comes to its end and is compared, bit for bit, with one that never was interrupted;
then the next one begins, until there were so many kills. Half of the kills are of runs that write checkpoints while
training goes on. Several processes are killed all at once, or only one of them, or only their launcher.

With `--forks` runs are forks of this process without a launcher: importing everything takes longer than what is
looked at.
"""

import importlib
import json
import os
import random
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from tests.faults.starts import MODULE, Start, start_command, start_forks
from tests.training.run_folder import course, same_weights
from training.checkpoint import find_defect
from training.config import setting
from training.markdown import markdown_table
from training.monitor import provenance
from training.parser import parse_settings


KEEP, KEEP_EVERY = 3, 16
HANGS = 120  # seconds without what is waited for after which a start is killed all the same
# Two threads, as one would become as many as there are cores, which decide on the rounding and may change.
ENVIRONMENT = {"OMP_NUM_THREADS": "2", "ACCELERATE_USE_CPU": "true", "PYTHONUNBUFFERED": "1"}
RUN: dict[str, Any] = {
    **{"image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"mask_ratio": 0.5, "shuffle_window": 8, "contrastive_batch_size": 8, "negatives": "global", "epochs": 100},
    **{"warmup_epochs": 1, "base_lr": 0.02, "mixed_precision": "no", "num_workers": 0, "logging_steps": 1},
    **{"save_steps": 2, "save_total_limit": KEEP, "keep_every_steps": KEEP_EVERY, "knn_images": 0},
    **{"report_to": "none", "process_timeout": 30},
}


@dataclass
class KillSettings:
    """How often what is killed."""

    kills: int = setting(200, "of all runs together")
    processes: list[int] = setting([1, 2], "numbers of processes, to which the kills are shared out")
    steps: int = setting(60, "optimiser steps of a run")
    forks: bool = setting(False, "start runs as forks of this process instead of by python and torchrun")
    seed: int = setting(0, "of the moments")
    output: str = setting("runs/faults/kills.json", "file for all figures")

    def validate(self) -> None:
        """Raise a ValueError that names the first impossible setting, its value and the remedy."""
        if not self.processes or min(self.processes) < 1:
            raise ValueError(f"processes takes numbers from 1 up, got {self.processes}.")
        if self.kills < 2 * len(self.processes):
            raise ValueError(f"kills must be at least {2 * len(self.processes)}, got {self.kills}.")


@dataclass
class Found:
    """What happened to the runs of one kind; all below `kills_while_saving` should be 0."""

    processes: int
    async_checkpoints: bool
    runs: int = 0
    restarts: int = 0
    kills: int = 0
    kills_of: dict[str, int] = field(default_factory=dict)
    kills_at_start: int = 0
    kills_while_saving: int = 0
    lost_checkpoints: int = 0
    older_resumes: int = 0
    failed_starts: int = 0
    differing_losses: int = 0
    differing_weights: int = 0
    seconds: float = 0.0

    def faults(self) -> int:
        """How often something was not as it should be."""
        return sum(getattr(self, name) for name in FAULTS)


FAULTS = ("lost_checkpoints", "older_resumes", "failed_starts", "differing_losses", "differing_weights")


def write_images(folder: Path) -> Path:
    """Shards of unequal length."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for shard, length in enumerate((20, 13, 8)):
        pictures = [Image.fromarray(rng.integers(0, 256, (16, 20, 3), dtype=np.uint8)) for _ in range(length)]
        features = datasets.Features({"image": datasets.Image()})
        rows = datasets.Dataset.from_dict({"image": pictures}, features=features)
        rows.to_parquet(folder / f"train-{shard:05d}-of-00003.parquet")
    return folder


class KilledRuns:
    """Runs of one kind, and what is found of them.

    Args:
        config: how often they are killed.
        folder: for all runs and their images.
        processes: of each.
        background: whether they write checkpoints while they train.
        kills: of all these runs together.
        report: is called after each.
    """

    def __init__(
        self,
        config: KillSettings,
        folder: Path,
        processes: int,
        background: bool,
        kills: int,
        report: Callable[[], None],
    ) -> None:
        self.report = report
        self.config, self.folder, self.kills = config, folder / f"{processes}-{background}", kills
        self.folder.mkdir()
        self.found = Found(processes, background)
        self.moments = random.Random(f"{config.seed} {processes} {background}")
        self.settings = RUN | {"dataset": folder / "data", "max_steps": config.steps, "async_checkpoints": background}
        self.targets = ["all"] if processes == 1 else ["all", "all", "one"] + ["launcher"] * (not config.forks)
        self.measure(self.folder / "whole")

    def start(self, run: Path) -> Start:
        """Start a run, or the same one again."""
        flags = [f"--{name}={value}" for name, value in (self.settings | {"output_dir": run}).items()]
        start = start_forks if self.config.forks else start_command
        return start(flags, self.found.processes, run.with_suffix(".log"), ENVIRONMENT)

    def measure(self, whole: Path) -> None:
        """The uninterrupted run, and the time that it takes to begin."""
        began, start = time.monotonic(), self.start(whole)
        while not (whole / "metrics.jsonl").exists() and start.is_running():
            time.sleep(0.01)
        self.start_up = time.monotonic() - began
        assert start.status() == 0, whole.with_suffix(".log").read_text()

    def kill_until_the_end(self) -> None:
        """Kill the next run until it comes to its end, or there were enough kills, and compare it."""
        found, began = self.found, time.monotonic()
        found.runs += 1
        run, whole = self.folder / f"run-{found.runs}", self.folder / "whole"
        log = run.with_suffix(".log")
        checkpoints = Checkpoints(run / "checkpoints")
        while True:
            start = self.start(run)
            target = self.kill_sometime(run, start, checkpoints) if found.kills < self.kills else None
            status = start.status()
            found.older_resumes += begins_at(log.read_text()) not in (None, checkpoints.newest)
            if status == 0:
                break
            if target is None:
                found.failed_starts += 1
                print(log.read_text()[-5000:], file=sys.stderr)  # noqa: T201
                return
            found.kills += 1
            found.kills_of[target] = found.kills_of.get(target, 0) + 1
            found.kills_at_start += begins_at(log.read_text()) is None
            found.kills_while_saving += checkpoints.check()
            found.restarts += 1
            self.report()
        found.lost_checkpoints += len(checkpoints.lost)
        differing = [pair for pair in zip_longest(course(run), course(whole)) if pair[0] != pair[1]]
        if differing:
            print(f"{run.name} of {self.folder.name}: {differing[0]}", file=sys.stderr)  # noqa: T201
        found.differing_losses += len(differing)
        found.differing_weights += not same_weights(run, whole)
        found.seconds += time.monotonic() - began

    def kill_sometime(self, run: Path, start: Start, checkpoints: "Checkpoints") -> str | None:
        """Kill at a random moment: while it starts, after a few steps, or when a checkpoint is begun.

        Returns:
            What was killed; None if the run had come to its end before.
        """
        moments, metrics = self.moments, run / "metrics.jsonl"
        moment = moments.choices(["start", "step", "saving"], [1, 9, 10])[0]
        changes = {"start": 0, "step": moments.randint(1, 9), "saving": moments.randint(1, 4)}[moment]
        before, deadline = None, time.monotonic() + HANGS
        while changes and start.is_running() and time.monotonic() < deadline:
            checkpoints.look()
            now = checkpoints.unfinished() if moment == "saving" else metrics.exists() and metrics.stat().st_mtime_ns
            changes -= bool(now) and before is not None and now != before
            before = now
            time.sleep(0.0005)
        time.sleep(moments.uniform(0, {"start": self.start_up, "step": 0.05, "saving": 0.02}[moment]))
        target = "all" if moment == "start" else moments.choice(self.targets)
        if not start.is_running():
            return None
        start.kill(target, moments)
        return target


class Checkpoints:
    """What is known of the checkpoints of a run that is killed.

    Attributes:
        newest: step of the newest that was complete when all processes had ended, 0 if there was none.
        lost: steps of those that were complete once, had to be kept, and are damaged or no more.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.newest = folder, 0
        self.lost: set[int] = set()
        self.complete: set[int] = set()
        self.left = self.unfinished()

    def look(self) -> None:
        """Remember what is there; it has its name only when it is complete."""
        self.complete |= {int(path.name.removeprefix("step-")) for path in self.folder.glob("step-*")}

    def unfinished(self) -> set[tuple[str, int]]:
        """What is being written, or was when its process was killed."""
        found = set()
        for path in self.folder.glob(".tmp-*"):
            with suppress(FileNotFoundError):  # it has become a checkpoint in the meantime
                found.add((path.name, path.stat().st_ctime_ns))
        return found

    def check(self) -> bool:
        """Look for lost ones when all processes have ended; returns whether they were writing one."""
        self.look()
        kept = sorted(self.complete)[-KEEP:] + [step for step in self.complete if step % KEEP_EVERY == 0]
        good = {step for step in kept if find_defect(self.folder / f"step-{step:06d}") is None}
        self.lost |= set(kept) - good
        self.newest = max(good, default=0)
        self.left, before = self.unfinished(), self.left
        return bool(self.left - before)


def begins_at(printed: str) -> int | None:
    """The step that a start went on from, 0 if it began anew, None if it did not come so far."""
    resumed = re.search(r"resuming from \S+/step-(\d+)", printed)
    if resumed:
        return int(resumed[1])
    return 0 if "images per optimiser step" in printed else None


def table(results: list[Found]) -> str:
    """What was found, a row for each kind of run."""
    columns = [name for name in asdict(results[0]) if name not in ("kills_of", "seconds")]
    rows = [[str(getattr(found, name)) for name in columns] for found in results]
    return markdown_table([name.replace("_", " ") for name in columns], rows)


def write(config: KillSettings, results: list[Found]) -> None:
    """All figures as JSON."""
    command = shlex.join(["python", "-m", "tests.faults.kill_runs", *sys.argv[1:]])
    report = {"command": command, "settings": asdict(config), "run": RUN}
    report |= {"results": [asdict(found) for found in results], **provenance()}
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    Path(config.output).write_text(json.dumps(report, indent=2) + "\n")


def main(config: KillSettings) -> int:
    """Kill runs of each kind in turn; returns the number of faults."""
    kinds = [(processes, background) for processes in config.processes for background in (False, True)]
    with tempfile.TemporaryDirectory() as folder:
        if config.forks:
            importlib.import_module(MODULE)
        writer = os.fork()  # as writing starts threads, and a process with threads must not be forked
        if not writer:
            write_images(Path(folder, "data"))
            os._exit(0)
        os.waitpid(writer, 0)
        runs: list[KilledRuns] = []

        def report() -> None:
            write(config, [run.found for run in runs])

        for kind in kinds:
            runs.append(KilledRuns(config, Path(folder), *kind, config.kills // len(kinds), report))
        while unfinished := [run for run in runs if run.found.kills < run.kills]:
            for run in unfinished:
                run.kill_until_the_end()
                report()
    print(table([run.found for run in runs]))  # noqa: T201
    return sum(run.found.faults() for run in runs)


if __name__ == "__main__":
    sys.exit(min(main(parse_settings(KillSettings, "tests.faults.kill_runs")), 1))
