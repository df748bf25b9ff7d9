"""How accuracy grew in several runs, against time and compute.

`python -m training.courses --runs runs/cifar10_hour runs/cifar10_hour_mae --output courses.png`

The runs are of `training.pretrain` or `training.compare`, with evaluations amid training (`--knn_epochs`); what they
logged is shown. Time is that of training alone, compute that of the layers, forward and backward.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.checks import Checks
from training.comparison import ComparisonConfig, gigaflop_per_trained_image
from training.config import setting
from training.figures import save_courses
from training.log_files import read_metrics
from training.markdown import markdown_table
from training.parser import parse_settings
from training.results import read_evaluation


# What is shown of the log, and its name
SHOWN = {
    "knn_accuracy": "kNN, [CLS]",
    "probe_accuracy": "probe, [CLS]",
    "knn_accuracy_mean": "kNN, mean",
    "probe_accuracy_mean": "probe, mean",
}


@dataclass
class CoursesConfig(Checks):
    """Which runs, and where the figure goes."""

    runs: list[str] = setting([], "folders of finished runs")
    output: str = setting("runs/courses.png", "PNG to write")

    def validate(self) -> None:
        """Raise a ValueError that names the first impossible setting, its value and the remedy."""
        if not self.runs:
            raise ValueError("runs is empty: name the folders of some runs.")
        for run in self.runs:
            if not Path(run, "metrics.jsonl").is_file() or read_evaluation(Path(run, "model"))["training"] is None:
                raise ValueError(f"runs: there is no finished run in {run!r}.")


@dataclass
class Course:
    """What a run found on its way.

    Attributes:
        method: by which it was trained.
        minutes: of training until each evaluation.
        gigaflop: the same in compute.
        accuracies: in [0, 1] at each evaluation, by the name in the log.
    """

    method: str
    minutes: list[float]
    gigaflop: list[float]
    accuracies: dict[str, list[float]]


def read_course(run: Path) -> Course:
    """The course of a finished run."""
    training: dict[str, Any] = read_evaluation(run / "model")["training"]
    config = ComparisonConfig(**training["settings"])
    images_per_step, cost = training["plan"]["images_per_step"], gigaflop_per_trained_image(config)
    course, seconds, step = Course(config.method, [], [], {}), 0.0, 0
    for entry in read_metrics(run / "metrics.jsonl"):
        if "images_per_second" in entry:
            seconds += (entry["step"] - step) * images_per_step / entry["images_per_second"]
            step = entry["step"]
        elif found := {name: entry[name] for name in SHOWN if name in entry}:
            course.minutes.append(seconds / 60)
            course.gigaflop.append(entry["step"] * images_per_step * cost)
            for name, value in found.items():
                course.accuracies.setdefault(name, []).append(value)
    return course


def table(courses: list[Course]) -> str:
    """What each run had in the end."""
    rows = []
    for course in courses:
        accuracies = [course.accuracies.get(name) for name in SHOWN]
        cells = [f"{100 * values[-1]:.1f}" if values else "–" for values in accuracies]
        rows.append([course.method, f"{course.minutes[-1]:.1f}", f"{course.gigaflop[-1]:,.0f}", *cells])
    return markdown_table(["method", "minutes", "GFLOP", *SHOWN.values()], rows)


def main(config: CoursesConfig) -> None:
    """Read, draw and print."""
    courses = [read_course(Path(run)) for run in config.runs]
    for run, course in zip(config.runs, courses, strict=True):
        if not course.accuracies:
            raise ValueError(f"runs: nothing was evaluated amid the training of {run!r} (--knn_epochs).")
    curves = {
        f"{course.method}: {SHOWN[name]}": (course.minutes, course.gigaflop, values)
        for course in courses
        for name, values in course.accuracies.items()
    }
    save_courses(Path(config.output), curves)
    print(table(courses))  # noqa: T201
    print(config.output)  # noqa: T201


if __name__ == "__main__":
    try:
        main(parse_settings(CoursesConfig, "training.courses"))
    except (ValueError, RuntimeError) as error:
        sys.exit(f"training.courses: {error}")
