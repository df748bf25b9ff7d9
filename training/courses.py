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


# Minutes of training, GFLOP of training and accuracies in [0, 1], equally many
Curve = tuple[list[float], list[float], list[float]]


@dataclass
class Course:
    """What a run found on its way.

    Attributes:
        method: by which it was trained.
        minutes: that training took.
        gigaflop: of all its steps.
        curves: by the name in the log.
    """

    method: str
    minutes: float
    gigaflop: float
    curves: dict[str, Curve]


def read_course(run: Path) -> Course:
    """The course of a finished run."""
    training: dict[str, Any] = read_evaluation(run / "model")["training"]
    config = ComparisonConfig(**training["settings"])
    images_per_step, cost = training["plan"]["images_per_step"], gigaflop_per_trained_image(config)
    seconds, step, curves = 0.0, 0, dict[str, Curve]()
    for entry in read_metrics(run / "metrics.jsonl"):
        if "images_per_second" in entry:
            seconds += (entry["step"] - step) * images_per_step / entry["images_per_second"]
            step = entry["step"]
        for name in SHOWN.keys() & entry.keys():
            point = seconds / 60, entry["step"] * images_per_step * cost, entry[name]
            for values, value in zip(curves.setdefault(name, ([], [], [])), point, strict=True):
                values.append(value)
    return Course(config.method, seconds / 60, step * images_per_step * cost, curves)


def table(courses: list[Course]) -> str:
    """What each run found last."""
    rows = []
    for course in courses:
        cells = [f"{100 * course.curves[name][2][-1]:.1f}" if name in course.curves else "–" for name in SHOWN]
        rows.append([course.method, f"{course.minutes:.1f}", f"{course.gigaflop:,.0f}", *cells])
    return markdown_table(["method", "minutes", "GFLOP", *SHOWN.values()], rows)


def main(config: CoursesConfig) -> None:
    """Read, draw and print."""
    courses = [read_course(Path(run)) for run in config.runs]
    for run, course in zip(config.runs, courses, strict=True):
        if not course.curves:
            raise ValueError(f"runs: nothing was evaluated amid the training of {run!r} (--knn_epochs).")
    curves = {
        f"{course.method}: {words}": course.curves[name]
        for course in courses
        for name, words in SHOWN.items()
        if name in course.curves
    }
    save_courses(Path(config.output), curves)
    print(table(courses))  # noqa: T201
    print(config.output)  # noqa: T201


if __name__ == "__main__":
    try:
        main(parse_settings(CoursesConfig, "training.courses"))
    except (ValueError, RuntimeError) as error:
        sys.exit(f"training.courses: {error}")
