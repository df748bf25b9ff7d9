"""Running a study's runs: several processes at a time, forked from one that has imported everything."""

import ctypes
import json
import multiprocessing
import multiprocessing.connection
import os
import runpy
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess

import torch

from training.results import EVALUATION
from training.study_judge import FINETUNE, finetuned_accuracy, judge_run, stored_scores
from training.study_plan import PlannedRun


LOG = "log.txt"
_SIGNAL_AT_PARENTS_DEATH = 1  # of Linux's prctl.h
# What the runs import, and the server that they are forked from already has.
IMPORTED = ["training.study_judge", "training.study_plan", "training.cached", "training.card", "training.loop"]
IMPORTED += ["training.alarms", "training.micro_batch", "training.start", "training.uploads", "training.processes"]


def is_trained(run: PlannedRun) -> bool:
    """Whether the run's model is there, with these very settings, at its last step."""
    file = run.folder / "model" / EVALUATION
    if not file.exists():
        return False
    training = json.loads(file.read_text())["training"]
    settings = {name: value for name, value in run.config.to_dict().items() if name in training["settings"]}
    return bool(training["settings"] == settings and training["progress"]["step"] == run.steps)


def is_finished(run: PlannedRun, images: int) -> bool:
    """Whether the run is trained, judged and, where that is asked for, fine-tuned."""
    finetuned = not run.finetuning or finetuned_accuracy(run.finetuning) is not None
    return is_trained(run) and is_judged(run, images) and finetuned


def is_judged(run: PlannedRun, images: int) -> bool:
    """Whether the run's frozen features are."""
    return bool(stored_scores(run.folder / "model", run.judged_on, images, run.few_shot))


def train_and_judge(run: PlannedRun, images: int, command: list[str], cores: set[int]) -> None:
    """In a process of its own: run the entry point as its command line would, judge its model, and fine-tune it."""
    run.folder.mkdir(parents=True, exist_ok=True)
    log = os.open(run.folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SIGNAL_AT_PARENTS_DEATH, signal.SIGTERM)  # a killed study leaves no run behind
        os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))
    if not is_trained(run):
        sys.argv = [run.program, *run.flags]
        print("python -m", *sys.argv, flush=True)  # noqa: T201
        runpy.run_module(run.program, run_name="__main__", alter_sys=True)
    if not is_judged(run, images):
        sys.argv = command
        judge_run(run, images)
    if run.finetuning:  # as another program, which may compute in another precision
        print("python -m", FINETUNE, *run.finetuning, flush=True)  # noqa: T201
        os.execv(sys.executable, [sys.executable, "-m", FINETUNE, *run.finetuning])


@dataclass
class Outcome:
    """How a run ended.

    Attributes:
        run: which one.
        status: exit status of its process; 0 if it is finished.
        seconds: that the process took.
    """

    run: PlannedRun
    status: int
    seconds: float

    @property
    def reason(self) -> str:
        """The last line of its log."""
        log = self.run.folder / LOG
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        return next((line.strip() for line in reversed(lines) if line.strip()), f"status {self.status}")


class Interrupted(Exception):
    """The study was asked to stop; its runs have saved what they have."""


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collects the numbers of the signals that ask to stop."""
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: came.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_all(runs: list[PlannedRun], images: int, jobs: int) -> Iterator[Outcome]:
    """Run what is not finished, and yield each as it ends.

    Args:
        runs: of a study.
        images: of each split to judge by.
        jobs: runs at a time; 0 gives each one core.

    Raises:
        Interrupted: after SIGINT or SIGTERM, when all runs have saved what they have.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    shares = shared_cores(jobs)
    waiting, running = list(runs), dict[int, tuple[PlannedRun, ForkServerProcess, float]]()
    stopping = False
    with stop_requests() as came:
        while waiting or running:
            for place in set(range(len(shares))) - running.keys():
                if waiting and not came:
                    run = waiting.pop(0)
                    process = context.Process(
                        target=train_and_judge, args=(run, images, list(sys.argv), shares[place])
                    )
                    process.start()
                    running[place] = run, process, time.perf_counter()
            if came and not stopping:
                stopping = True
                waiting.clear()
                for _, process, _ in running.values():
                    process.terminate()
            # Ctrl-C reaches the runs, too, and a second signal more than three seconds later would end them at once.
            multiprocessing.connection.wait([process.sentinel for _, process, _ in running.values()], timeout=1)
            for place, (run, process, start) in list(running.items()):
                if process.exitcode is not None:
                    del running[place]
                    yield Outcome(run, process.exitcode, time.perf_counter() - start)
    if came:
        raise Interrupted


def shared_cores(jobs: int) -> list[set[int]]:
    """The cores of each run, as equally many for all as there are; with more runs than cores they take turns."""
    cores = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else list(range(os.cpu_count() or 1))
    jobs = jobs or len(cores)
    each = max(len(cores) // jobs, 1)
    return [{cores[(job * each + core) % len(cores)] for core in range(each)} for job in range(jobs)]
