"""The figure of a study: a curve for each factor, a map for each pair of them, a column for each method."""

from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from training.study_report import COLUMNS, NAMES, Record, Scores
from training.study_settings import BUDGETS


matplotlib.use("Agg")
MOST_COLUMNS = 3
STYLES = {"knn": "-", "probe": "--"}
COLOURS = {"cls": "tab:blue", "mean": "tab:orange"}


def save_study(path: Path, record: Record) -> None:
    """Draw all factors, grids and trials of a study.

    Args:
        path: PNG to write.
        record: of the study.
    """
    scores = Scores(record)
    panels: list[tuple[str, Any]] = [(name, points) for name, points in record["factors"].items()]
    panels += [(name, cells) for name, cells in record["grids"].items()]
    if record["trials"]:
        panels.append(("method", record["trials"]))
    columns = min(len(panels), MOST_COLUMNS)
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.4 * max(columns, 2), 3.6 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (name, content) in zip(axes.flat, panels, strict=False):
        axis.set_title(name, fontsize=10)
        if name == "method" and record["trials"]:
            draw_methods(axis, record)
        elif isinstance(content, dict):
            draw_factor(axis, scores, name, content)
        elif set(content[0]["values"]) & set(BUDGETS):
            draw_compute(axis, scores, content)
        else:
            draw_grid(axis, scores, content)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_factor(axis: Axes, scores: Scores, name: str, points: dict[str, str]) -> None:
    """Accuracy against one setting, the centre marked."""
    record, centre = scores.record, scores.record["centre"]
    named = dict(points)
    if centre not in named.values():
        named[record["values"][name]] = centre
    labels = sorted(named, key=number) if all(is_number(label) for label in named) else list(named)
    places = range(len(labels))
    for features, protocol in COLUMNS:
        column = (features, protocol)
        drawn = [(place, named[label]) for place, label in zip(places, labels, strict=True) if scores.of(named[label])]
        error = scores.spread(column)
        axis.errorbar(
            [place for place, _ in drawn],
            [mean(scores.values(point, column)) for _, point in drawn],
            [error / len(scores.of(point)) ** 0.5 for _, point in drawn],
            color=COLOURS[features],
            linestyle=STYLES[protocol],
            marker="o",
            markersize=3,
            capsize=2,
            label=COLUMNS[column],
        )
    axis.axvline(next(place for place in places if named[labels[place]] == centre), color="gray", linestyle=":")
    axis.set_xticks(places, labels, fontsize=8)
    axis.set_ylabel("top-1 accuracy, held out (%)", fontsize=8)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)


def draw_grid(axis: Axes, scores: Scores, cells: list[Record]) -> None:
    """A map of the kNN accuracy of [CLS] by two settings; of more, the others stand beside the first."""
    first, *others = cells[0]["values"]
    across = list(dict.fromkeys(beside(cell, others) for cell in cells))
    down = list(dict.fromkeys(cell["values"][first] for cell in cells))
    found = [[float("nan")] * len(across) for _ in down]
    for cell in cells:
        if values := scores.values(cell["point"], ("cls", "knn")):
            place = down.index(cell["values"][first]), across.index(beside(cell, others))
            found[place[0]][place[1]] = mean(values)
            number_of_cell = f"{mean(values):.1f}"
            on_white = {"facecolor": "white", "linewidth": 0, "pad": 2}
            axis.text(place[1], place[0], number_of_cell, ha="center", va="center", fontsize=8, bbox=on_white)
    axis.imshow(found, cmap="viridis", aspect="auto")
    axis.set_xticks(range(len(across)), across, fontsize=8)
    axis.set_yticks(range(len(down)), down, fontsize=8)
    axis.set_xlabel(", ".join(others), fontsize=8)
    axis.set_ylabel(first, fontsize=8)


def beside(cell: Record, names: list[str]) -> str:
    """The values of some settings."""
    return ", ".join(cell["values"][name] for name in names)


def draw_compute(axis: Axes, scores: Scores, cells: list[Record]) -> None:
    """Accuracy of the better features against GFLOP, a line for each combination of the other settings."""
    others = [name for name in cells[0]["values"] if name not in BUDGETS]
    for line in dict.fromkeys(beside(cell, others) for cell in cells):
        drawn = [cell["point"] for cell in cells if beside(cell, others) == line and scores.of(cell["point"])]
        columns = [(scores.best([point])[1], "knn") for point in drawn]
        axis.errorbar(
            [mean(run["gigaflop"] for run in scores.of(point)) for point in drawn],
            [mean(scores.values(point, column)) for point, column in zip(drawn, columns, strict=True)],
            [
                scores.spread(column) / len(scores.of(point)) ** 0.5
                for point, column in zip(drawn, columns, strict=True)
            ],
            marker="o",
            markersize=3,
            capsize=2,
            label=line,
        )
    axis.set_xscale("log")
    if budgets := sorted({float(cell["values"]["gigaflop"]) for cell in cells if "gigaflop" in cell["values"]}):
        axis.set_xticks(budgets, [f"{budget:,g}" for budget in budgets])
        axis.set_xticks([], minor=True)
    axis.set_xlabel("GFLOP of pre-training", fontsize=8)
    axis.set_ylabel("kNN, [CLS] or mean, held out (%)", fontsize=8)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, title=", ".join(others), title_fontsize=7)


def draw_methods(axis: Axes, record: Record) -> None:
    """All trials of each method on its better features, and the chosen one on test images."""
    choosing, confirming = Scores(record), Scores(record, final=True)
    for place, cells in enumerate(record["trials"].values()):
        points = [cell["point"] for cell in cells if choosing.of(cell["point"])]
        best = [max(mean(choosing.values(point, (name, "knn"))) for name in COLOURS) for point in points]
        axis.plot([place] * len(best), best, "o", color="tab:blue", alpha=0.4, markersize=4)
        if points and confirming.runs:
            chosen, features = choosing.best(points)
            values = confirming.values(chosen, (features, "knn"))
            error = confirming.spread((features, "knn")) / len(values) ** 0.5
            axis.errorbar(place, mean(values), error, marker="D", color="tab:red", capsize=3)
    axis.plot([], [], "o", color="tab:blue", alpha=0.4, label="trials, held out")
    axis.plot([], [], "D", color="tab:red", label="chosen, test")
    for split, found in list(record["references"].items())[-1:]:  # test, where the chosen are scored on it
        for style, (name, values) in zip((":", "--", "-.", "-", (0, (1, 5))), found.items(), strict=False):
            label = f"{NAMES.get(name, name)}, {split}"
            axis.axhline(100 * values["knn"], color="gray", linestyle=style, linewidth=1, label=label)
    axis.set_xticks(range(len(record["trials"])), list(record["trials"]), fontsize=8)
    axis.set_ylabel("kNN (%)", fontsize=8)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))


def is_number(label: str) -> bool:
    """Whether a value can be put in order."""
    try:
        number(label)
    except ValueError:
        return False
    return True


def number(label: str) -> float:
    """A value as a number."""
    return float(label)
