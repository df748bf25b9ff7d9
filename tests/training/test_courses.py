"""The courses of runs: what they logged, at the time and the compute of training."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from training import compare, courses
from training.comparison import ComparisonConfig, gigaflop_per_trained_image
from training.config import PretrainConfig
from training.courses import CoursesConfig, read_course
from training.log_files import read_metrics


Settings = Callable[..., PretrainConfig]


@pytest.fixture
def runs(
    settings: Settings,
    run_pretraining: Callable[..., Path],
    write_shards: Callable[..., Path],
    no_accelerator: Callable[[], None],
    tmp_path: Path,
) -> list[str]:
    """One of MiCL and one of MAE, both evaluated every second epoch."""
    write_shards(32, labels=2)
    write_shards(12, split="test", labels=2)
    asked: dict[str, Any] = {"epochs": 4, "knn_epochs": 2, "knn_images": 20}
    micl = run_pretraining(settings(output_dir=str(tmp_path / "micl"), **asked))
    no_accelerator()
    other = vars(settings(output_dir=str(tmp_path / "mae"), **asked)) | {"method": "mae", "mask_ratio": 0.75}
    compare.main(ComparisonConfig(**other, decoder_width=32))
    return [str(micl), str(tmp_path / "mae")]


def test_accuracies_stand_at_the_time_and_compute_of_training(runs: list[str]) -> None:
    for run, method, steps in zip(runs, ("micl", "mae"), ([0, 8, 16], [8, 16]), strict=True):
        course = read_course(Path(run))
        assert course.method == method
        training = json.loads(Path(run, "model", "eval.json").read_text())["training"]
        cost = gigaflop_per_trained_image(ComparisonConfig(**training["settings"]))
        assert course.gigaflop == pytest.approx(8 * 16 * cost)
        assert course.minutes == pytest.approx(training["progress"]["seconds"] / 60, rel=0.05)
        minutes, gigaflop, accuracies = course.curves["knn_accuracy"]
        assert gigaflop == pytest.approx([8 * step * cost for step in steps])
        assert minutes == sorted(minutes)
        assert minutes[-1] == course.minutes
        assert accuracies == [
            entry["knn_accuracy"] for entry in read_metrics(Path(run, "metrics.jsonl")) if "knn_accuracy" in entry
        ]
    assert "knn_accuracy_mean" in course.curves


def test_a_figure_and_a_table_show_them(runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    courses.main(CoursesConfig(runs=runs, output=str(tmp_path / "courses.png")))
    assert Image.open(tmp_path / "courses.png").width > 500
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| micl", "| mae"]
    assert lines[2].count("–") == 3  # no probe, and nothing of the mean of the patches
    assert lines[3].count("–") == 2


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="runs is empty"):
        CoursesConfig().validate()
    with pytest.raises(ValueError, match="there is no finished run in '.*nowhere'"):
        CoursesConfig(runs=[str(tmp_path / "nowhere")]).validate()
