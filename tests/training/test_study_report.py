"""RESULTS.md is made of the records alone; its errors are those of the spread between seeds."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib import pyplot as plt

from training import study_report
from training.parser import parse_settings
from training.study_figures import draw_compute, draw_factor, draw_grid, draw_methods
from training.study_plan import Planner
from training.study_report import RESULTS, Scores, budgets, read_records, render, section, write_record
from training.study_settings import StudySettings


STUDIES = Path(study_report.__file__).parent / "recipes" / "studies"
KNN = ("cls", "knn")


def row(point: str, seed: int, knn: float, mean: float = 0.2, **changes: Any) -> dict[str, Any]:
    scores = {"cls": {"knn": knn, "probe": knn}, "mean": {"knn": mean, "probe": mean}}
    told = {"point": point, "seed": seed, "final": False, "images": 1000, "gigaflop": 50.0, "seconds": 3.0}
    told |= {"contrastive_accuracy": 0.25}
    return told | {"loss": 2.0, "guessing": 4.0, "scores": scores} | changes


def record(*runs: dict[str, Any], **changes: Any) -> dict[str, Any]:
    known: dict[str, Any] = {
        "name": "mine",
        "question": "Why?",
        "command": "python -m training.study --config mine.yaml",
        "recipe": "recipe.yaml",
        "dataset": "data",
        "common": {},
        "budget": {"gigaflop": 50.0},
        "seeds": [0, 1],
        "final_seeds": [],
        "judge_images": 100,
        "held_out": 5,
        "hardware": ["a computer"],
        "commits": ["abc"],
        "centre": "c",
        "values": {"temperature": "0.1"},
        "factors": {},
        "grids": {},
        "trials": {},
        "points": {"c": "centre"},
        "final": [],
        "references": {},
        "failed": [],
        "runs": list(runs),
    }
    return known | changes


TWO_POINTS = (row("c", 0, 0.50), row("c", 1, 0.52), row("x", 0, 0.60), row("x", 1, 0.66), row("y", 0, 0.40))


def test_the_spread_is_pooled_over_all_settings() -> None:
    """Deviations ±1 and ±3 with a degree of freedom each; the setting with one seed has none."""
    scores = Scores(record(*TWO_POINTS))
    assert scores.spread(KNN) == pytest.approx(math.sqrt((1 + 1 + 9 + 9) / 2))
    assert scores.mean("x", KNN) == f"63.0 ± {math.sqrt(10 / 2):.1f}"
    assert scores.mean("y", KNN) == f"40.0 ± {math.sqrt(10):.1f}"
    assert scores.difference("x", "c", KNN) == f"+12.0 ± {math.sqrt(10):.1f}"
    assert scores.difference("y", "c", KNN) == f"-11.0 ± {math.sqrt(10 * 1.5):.1f}"
    assert scores.difference("c", "c", KNN) == ""
    assert Scores(record(row("c", 0, 0.5))).mean("c", KNN) == "50.0"
    assert scores.mean("gone", KNN) == "failed"


def test_the_best_is_that_of_the_better_features_and_final_runs_play_no_part() -> None:
    runs = [*TWO_POINTS, row("y", 1, 0.40, mean=0.9), row("y", 0, 0.4, mean=0.9), row("c", 7, 1.0, final=True)]
    assert Scores(record(*runs)).best(["c", "x"]) == ("x", "cls")
    assert Scores(record(*runs)).best(["c", "x", "y"]) == ("y", "mean")
    assert Scores(record(*runs), final=True).values("c", KNN) == [100.0]


def test_the_table_of_a_factor_marks_the_centre_and_shows_it_where_it_is_no_value() -> None:
    factors = {"temperature": {"0.2": "x", "0.3": "y", "0.4": "gone"}}
    text = section(record(*TWO_POINTS, factors=factors, failed=["temperature=0.4, seed 0: no memory"]))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert [cells[0] for cells in rows[2:]] == ["**0.1**", "0.2", "0.3", "0.4"]
    assert rows[3][1:3] == ["63.0 ± 2.2", "+12.0 ± 3.2"]
    assert rows[3][-5:] == ["0.50", "25 %", "1,000", "50", "3"]
    assert "**Failed:** temperature=0.4, seed 0: no memory" in text
    assert "5 runs of 50 GFLOP each" in text


def test_all_budgets_are_named_where_they_differ() -> None:
    cells = [{"values": {"gigaflop": value, "method": "mae"}, "point": "c"} for value in ("2000.0", "25")]
    varied = record(*TWO_POINTS, grids={"compute": cells}, factors={"gigaflop": {"75": "x"}})
    assert budgets(varied) == "25, 50, 75 or 2,000 GFLOP"
    assert budgets(record(*TWO_POINTS)) == "50 GFLOP"


GRID = [
    {"values": {"a": first, "b": second}, "point": point}
    for (first, second), point in zip((("1", "3"), ("1", "4"), ("2", "3"), ("2", "4")), "cxyz", strict=True)
]


def test_the_centre_alone_has_no_figure() -> None:
    assert "![mine](mine.png)" in section(record(*TWO_POINTS, factors={"temperature": {"0.2": "x"}}))
    assert ".png" not in section(record(*TWO_POINTS))


def test_labels_that_mean_nothing_are_passed_over() -> None:
    text = section(record(*TWO_POINTS, factors={"temperature": {"0.2": "x"}}, grids={"both": GRID}, labels=False))
    assert "| temperature | loss / guessing | views found | images | GFLOP | seconds |" in text
    assert "| 0.2 | 0.50 | 25 % | 1,000 | 50 | 3 |" in text
    assert "| a | b | loss / guessing | views found | images | GFLOP | seconds |" in text
    assert "| 1 | 4 | 0.50 | 25 % | 1,000 | 50 | 3 |" in text
    assert ".png" not in text
    assert "judged by" not in text


def test_a_grid_of_two_is_a_map() -> None:
    text = section(record(*TWO_POINTS, row("z", 0, 0.3), grids={"both": GRID}))
    assert "| 1 | 51.0 ± 2.2 | 63.0 ± 2.2 |\n| 2 | 40.0 ± 3.2 | 30.0 ± 3.2 |" in text


def test_trials_show_the_chosen_setting_held_out_and_on_test() -> None:
    trials = {
        "mae": [
            {"values": {"method": "mae", "base_lr": rate, "seen": "all"}, "point": point}
            for rate, point in (("1", "x"), ("2", "y"))
        ],
        "micl": [{"values": {"method": "micl", "base_lr": "1"}, "point": "gone"}],
    }
    runs = [*TWO_POINTS, row("x", 5, 0.55, final=True), row("x", 6, 0.57, final=True)]
    references = {"test": {"raw pixels": {"knn": 0.3, "probe": 0.35}}}
    text = section(record(*runs, trials=trials, references=references))
    assert "| mae | 2 | base_lr 1 | cls | 63.0 ± 2.2 |" in text
    assert "| micl | 1 | failed |" in text
    assert "On test images" not in text
    assert "| raw pixels | test | 30.0 | 35.0 |" in text


def test_the_chosen_are_judged_with_few_labels_and_fine_tuned_beside_random_weights() -> None:
    runs = [row("c", 0, 0.5), row("x", 0, 0.6)]
    for seed, tuned in ((5, 0.70), (6, 0.74)):
        last = row("x", seed, 0.55, final=True)
        last["scores"]["cls"] |= {"knn, 10 %": 0.41, "probe, 10 %": 0.42}
        last["scores"]["finetuned"] = {"accuracy": tuned}
        runs.append(last)
    known = {"trials": {"mae": [{"values": {"base_lr": "1"}, "point": point} for point in "cx"]}, "final": ["x"]}
    asked = {"final_seeds": [5, 6], "few_shot": [0.1], "finetune": {"config": "it.yaml", "epochs": "2"}}
    lines = section(record(*runs, from_scratch=[0.5, 0.6], **known, **asked)).splitlines()
    assert (
        "On test images, seeds 5, 6; percentages are shares of each class's labels; fine-tuned with config it.yaml, "
        "epochs 2." in lines
    )
    assert "| method | kNN | probe | kNN, 10 % | probe, 10 % | fine-tuned |" in lines
    assert "| mae | 55.0 ± 0.0 | 55.0 ± 0.0 | 41.0 ± 0.0 | 42.0 ± 0.0 | 72.0 ± 2.0 |" in lines
    assert "| random weights |  |  |  |  | 55.0 ± 2.0 |" in lines


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = record(*TWO_POINTS)
    write_record(tmp_path / "mine.json", written)
    assert read_records(tmp_path) == [written]
    assert sum(line.startswith("  {") for line in (tmp_path / "mine.json").read_text().splitlines()) == 5


def test_figures_show_the_means_and_their_errors() -> None:
    factors = {"temperature": {"0.3": "y", "0.2": "x"}}
    scores = Scores(record(*TWO_POINTS, factors=factors))
    figure, axes = plt.subplots(1, 4)
    draw_factor(axes[0], scores, "temperature", factors["temperature"])
    assert [label.get_text() for label in axes[0].get_xticklabels()] == ["0.1", "0.2", "0.3"]
    line, _, (errors,) = axes[0].containers[0]
    assert list(line.get_ydata()) == pytest.approx([51, 63, 40])
    lengths = [float(segment[1, 1] - segment[0, 1]) / 2 for segment in errors.get_segments()]
    assert lengths == pytest.approx([math.sqrt(5), math.sqrt(5), math.sqrt(10)])

    draw_grid(axes[1], Scores(record(*TWO_POINTS, row("z", 0, 0.3))), GRID)
    assert axes[1].images[0].get_array().tolist() == [[pytest.approx(51), pytest.approx(63)], [40, pytest.approx(30)]]

    cells = [{"values": {"gigaflop": "1", "mask_ratio": "0.5"}, "point": "c"}]
    cells += [{"values": {"gigaflop": "2", "mask_ratio": "0.5"}, "point": "x"}]
    draw_compute(axes[2], Scores(record(*TWO_POINTS, row("x", 3, 0.63, gigaflop=80.0))), cells)
    assert list(axes[2].containers[0][0].get_xdata()) == pytest.approx([50, 60])

    trials = {"mae": [{"values": {}, "point": "x"}, {"values": {}, "point": "y"}]}
    draw_methods(axes[3], record(*TWO_POINTS, row("x", 5, 0.5, final=True), trials=trials))
    assert list(axes[3].lines[0].get_ydata()) == pytest.approx([63, 40])
    assert list(axes[3].containers[0][0].get_ydata()) == pytest.approx([50])
    plt.close(figure)


def test_the_page_is_that_of_the_records() -> None:
    """If this fails, run `python -m training.study --render`."""
    records = read_records(STUDIES)
    for one in filter(study_report.varies, records):
        assert (STUDIES / f"{one['name']}.png").exists()
        assert re.search(r"[0-9a-f]{12}$", one["commits"][0])
        assert not re.search(r"(?<![\w.])/\w+/", json.dumps(one))  # of somebody's disk
    if records:
        assert (STUDIES / RESULTS).read_text(encoding="utf-8") == render(records)


@pytest.mark.parametrize("file", sorted(STUDIES.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_study_can_be_planned(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = parse_settings(StudySettings, "training.study", ["--config", str(file)])
    assert settings.name == file.stem
    assert f"--config training/recipes/studies/{file.name}" in file.read_text()
    monkeypatch.setattr(Planner, "_data", lambda *_: (tmp_path, 40_000))
    plan = Planner(settings).plan()
    assert len(plan.runs) > 1
    assert min(run.steps for run in plan.runs) >= 20
