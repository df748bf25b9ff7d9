"""What a study has found: a compact record of its runs, and the tables of RESULTS.md made of records alone."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

from training.markdown import markdown_table
from training.study_judge import protocols
from training.study_settings import BUDGETS


RESULTS = "RESULTS.md"
# (features, protocol) of the columns, in their order
COLUMNS = {
    ("cls", "knn"): "kNN, [CLS]",
    ("cls", "probe"): "probe, [CLS]",
    ("mean", "knn"): "kNN, mean",
    ("mean", "probe"): "probe, mean",
}
FINETUNED = ("finetuned", "accuracy")
# Features of references
NAMES = {"cls": "random weights, [CLS]", "mean": "random weights, mean of the patches"}
HEAD = """# What matters in MiCL, at small scale

Each section is one study: a file of this folder (`NAME.yaml`), run by `python -m training.study --config` and that
file; `NAME.json` has every run. All runs of a study have the same budget. Settings are judged on a part of the train
split that was held out, never on test images: top-1 accuracy (%) of kNN (k = 20) and of the fast linear probe, on
frozen features of the whole image, [CLS] or the mean of the patches. "±" is the standard error of a mean over seeds,
from the spread between seeds pooled over all settings of the study; it does not cover the choice of the images.
Differences are to the centre, the recipe with the study's common settings; those below twice their standard error are
noise. "Loss / guessing" is 1 where nothing is learned; "views found" is the share of views that find theirs in the
last batch that was logged; seconds are those of training, on a machine that may have had other work at the same time.
Where few labels are used to judge encoders, supervised ones have been trained with all of them nevertheless.

`python -m training.study --render` writes this page.
"""
Record = dict[str, Any]


def read_records(folder: Path) -> list[Record]:
    """The records of all studies, in the order of their names."""
    return [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]


def write_record(file: Path, record: Record) -> None:
    """A record as JSON, one run in each line."""
    rest = json.dumps({name: value for name, value in record.items() if name != "runs"}, indent=1)
    runs = ",\n".join(f"  {json.dumps(run)}" for run in record["runs"])
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'{rest[:-2]},\n "runs": [\n{runs}\n ]\n}}\n')


class Scores:
    """Means over seeds, with their standard errors.

    Args:
        record: of a study.
        final: whether of the runs on test images, or of those that choose.
    """

    def __init__(self, record: Record, final: bool = False) -> None:
        self.record = record
        self.runs = [run for run in record["runs"] if run["final"] == final]

    def of(self, point: str) -> list[Record]:
        """The runs of a setting."""
        return [run for run in self.runs if run["point"] == point]

    def values(self, point: str, column: tuple[str, str]) -> list[float]:
        """Accuracies in % of a setting, one for each seed."""
        return [100 * run["scores"][column[0]][column[1]] for run in self.of(point)]

    def spread(self, column: tuple[str, str]) -> float:
        """Standard deviation between seeds, pooled over all settings; NaN where none has two seeds."""
        groups = [self.values(point, column) for point in {run["point"] for run in self.runs}]
        squares = sum(sum((value - mean(group)) ** 2 for value in group) for group in groups)
        freedom = sum(len(group) - 1 for group in groups)
        return math.sqrt(squares / freedom) if freedom else math.nan

    def mean(self, point: str, column: tuple[str, str]) -> str:
        """Mean ± standard error."""
        values = self.values(point, column)
        return plus_minus(mean(values), self.spread(column) / math.sqrt(len(values)), "") if values else "failed"

    def difference(self, point: str, centre: str, column: tuple[str, str]) -> str:
        """Difference to the centre ± standard error."""
        ours, theirs = self.values(point, column), self.values(centre, column)
        if point == centre or not ours or not theirs:
            return ""
        error = self.spread(column) * math.sqrt(1 / len(ours) + 1 / len(theirs))
        return plus_minus(mean(ours) - mean(theirs), error, "+")

    def best(self, points: Iterable[str]) -> tuple[str, str]:
        """The setting of the highest mean kNN accuracy on its better features, and these."""
        candidates = [(point, name) for point in points if self.of(point) for name in ("cls", "mean")]
        return max(candidates, key=lambda one: mean(self.values(one[0], (one[1], "knn"))))


def plus_minus(value: float, error: float, sign: str) -> str:
    """A number with its standard error, where that is known."""
    return f"{value:{sign}.1f}" + ("" if math.isnan(error) else f" ± {error:.1f}")


def render(records: list[Record]) -> str:
    """RESULTS.md."""
    return "\n".join([HEAD, *(section(record) for record in records)])


def budgets(record: Record) -> str:
    """What each run may take, in words; of several where that is varied."""
    ((name, common),) = record["budget"].items()
    cells = [cell["values"] for cells in record["grids"].values() for cell in cells]
    varied = [values[name] for values in cells if name in values] + list(record["factors"].get(name, ()))
    *others, most = (f"{value:,.6g}" for value in sorted({float(common), *map(float, varied)}))
    words = f"{', '.join(others)} or {most}" if others else most
    return f"{words} {name.replace('gigaflop', 'GFLOP')}"


def section(record: Record) -> str:
    """One study."""
    seeds = ", ".join(map(str, record["seeds"]))
    total = sum(run["seconds"] for run in record["runs"])
    judged = f"judged by up to {record['judge_images']:,} images of each split of" if has_labels(record) else "images:"
    facts = [
        f"`{record['command']}`",
        f"{len(record['runs'])} runs of {budgets(record)} each around `{record['recipe']}`"
        f"{changed(record['common'])}; seeds {seeds}; {total / 60:.0f} minutes of training; {judged} "
        f"`{record['dataset']}`, "
        f"every {record['held_out']}th train image held out.",
        f"{'; '.join(record['hardware'])}; commit {', '.join(record['commits'])}.",
    ]
    failed = [f"**Failed:** {one}" for one in record["failed"]]
    figure = f"![{record['name']}]({record['name']}.png)" if varies(record) else ""
    parts = [f"## {record['name']}", record["question"], figure, *facts, *failed]
    scores = Scores(record)
    parts += [factor_table(scores, name, points) for name, points in record["factors"].items()]
    parts += [grid_table(scores, name, cells) for name, cells in record["grids"].items()]
    if record["trials"]:
        parts.append(trials_table(record))
    if record["references"]:
        parts.append(references_table(record))
    elif record["final"] and not record["trials"]:
        parts.append(final_line(record))
    return "\n\n".join(part for part in parts if part) + "\n"


def columns_of(record: Record) -> dict[tuple[str, str], str]:
    """The accuracies that mean anything."""
    return COLUMNS if has_labels(record) else {}


def has_labels(record: Record) -> bool:
    """Whether accuracies mean anything."""
    return bool(record.get("labels", True))


def varies(record: Record) -> bool:
    """Whether there is anything to draw."""
    return has_labels(record) and bool(record["factors"] or record["grids"] or record["trials"])


def changed(common: Record) -> str:
    """The settings that make the centre another than the recipe."""
    return " with " + ", ".join(f"{name} {value}" for name, value in common.items()) if common else ""


def factor_table(scores: Scores, name: str, points: dict[str, str]) -> str:
    """One setting varied alone; the centre stands first where it is none of the values."""
    record, centre = scores.record, scores.record["centre"]
    named = dict(points)
    if centre not in named.values():
        named = {record["values"][name]: centre} | named
    rows, columns = [], columns_of(record)
    for label, point in named.items():
        row = [f"**{label}**" if point == centre else label]
        for column in columns:
            row += [scores.mean(point, column), scores.difference(point, centre, column)]
        rows.append(row + costs(scores, point))
    head = [name, *(cell for title in columns.values() for cell in (title, "difference")), *COSTS]
    return markdown_table(head, rows)


COSTS = ["loss / guessing", "views found", "images", "GFLOP", "seconds"]


def costs(scores: Scores, point: str) -> list[str]:
    """What the runs of a setting took, on average."""
    runs = scores.of(point)
    if not runs:
        return [""] * len(COSTS)
    averages = {name: mean(run[name] for run in runs) for name in ("images", "gigaflop", "seconds")}
    guessing = [run["loss"] / run["guessing"] for run in runs if run["guessing"]]
    found = [100 * run["contrastive_accuracy"] for run in runs if "contrastive_accuracy" in run]
    return [
        f"{mean(guessing):.2f}" if guessing else "",
        f"{mean(found):.0f} %" if found else "",
        f"{averages['images']:,.0f}",
        f"{averages['gigaflop']:,.0f}",
        f"{averages['seconds']:.0f}",
    ]


def grid_table(scores: Scores, name: str, cells: list[Record]) -> str:
    """Several settings varied together."""
    factors, accuracies = list(cells[0]["values"]), columns_of(scores.record)
    if accuracies and len(factors) == 2 and not set(factors) & set(BUDGETS):
        down, across = factors
        columns = list(dict.fromkeys(cell["values"][across] for cell in cells))
        rows = {cell["values"][down]: [cell["values"][down]] for cell in cells}
        for cell in cells:
            rows[cell["values"][down]].append(scores.mean(cell["point"], ("cls", "knn")))
        return f"{name}: kNN, [CLS]\n\n" + markdown_table([f"{down} \\ {across}", *columns], list(rows.values()))
    rows_of_cells = [
        [*cell["values"].values(), *(scores.mean(cell["point"], column) for column in accuracies)]
        + costs(scores, cell["point"])
        for cell in cells
    ]
    return f"{name}\n\n" + markdown_table([*factors, *accuracies.values(), *COSTS], rows_of_cells)


def trials_table(record: Record) -> str:
    """Each method's best trial, and how it does on test images."""
    choosing = Scores(record)
    rows, chosen = [], dict[str, tuple[str, str]]()
    for method, cells in record["trials"].items():
        words = {cell["point"]: cell["values"] for cell in cells}
        if not any(map(choosing.of, words)):
            rows.append([method, str(len(cells)), "failed"])
            continue
        point, features = chosen[method] = choosing.best(words)
        best = ", ".join(f"{name} {value}" for name, value in words[point].items() if name in varied(cells))
        row = [method, str(len(cells)), best, features, choosing.mean(point, (features, "knn"))]
        rows.append(row + costs(choosing, point)[2:])
    head = ["method", "trials", "chosen", "features", "kNN, held out", *COSTS[2:]]
    tables = [markdown_table(head, rows)]
    if record["final"]:
        tables.append(test_table(record, chosen))
    return "\n\n".join(tables)


def test_table(record: Record, chosen: dict[str, tuple[str, str]]) -> str:
    """How the chosen settings do on test images: frozen with all and with few labels, and fine-tuned.

    Args:
        record: of the study.
        chosen: point and features of each method.
    """
    confirming = Scores(record, final=True)
    names = list(protocols(record.get("few_shot", [])))
    finetuned = bool(record.get("finetune"))
    rows = [
        [method, *(confirming.mean(point, (features, name)) for name in names)]
        + ([confirming.mean(point, FINETUNED)] if finetuned else [])
        for method, (point, features) in chosen.items()
    ]
    told = f"On test images, seeds {', '.join(map(str, record['final_seeds']))}"
    if record.get("few_shot"):
        told += "; percentages are shares of each class's labels"
    if finetuned:
        told += f"; fine-tuned with {', '.join(f'{name} {value}' for name, value in record['finetune'].items())}"
        scratch = [100 * value for value in record["from_scratch"]]
        error = confirming.spread(FINETUNED) / math.sqrt(len(scratch)) if scratch else math.nan
        rows.append(["random weights", *[""] * len(names), plus_minus(mean(scratch), error, "") if scratch else ""])
    head = ["method", *(name.replace("knn", "kNN") for name in names), *(["fine-tuned"] if finetuned else [])]
    return f"{told}.\n\n{markdown_table(head, rows)}"


def varied(cells: list[Record]) -> set[str]:
    """The settings that have several values."""
    return {name for name in cells[0]["values"] if len({cell["values"][name] for cell in cells}) > 1}


def references_table(record: Record) -> str:
    """Features that learn nothing from these images."""
    rows = []
    for split, found in record["references"].items():
        rows += [
            [NAMES.get(name, name), split, f"{100 * values['knn']:.1f}", f"{100 * values['probe']:.1f}"]
            for name, values in found.items()
        ]
    return markdown_table(["without training", "split", "kNN", "probe"], rows)


def final_line(record: Record) -> str:
    """The chosen setting on test images."""
    confirming, (point,) = Scores(record, final=True), set(record["final"])
    label = record["points"][point]
    found = ", ".join(f"{title} {confirming.mean(point, column)}" for column, title in COLUMNS.items())
    return f"The best by kNN, {label}, on test images (seeds {', '.join(map(str, record['final_seeds']))}): {found}."
