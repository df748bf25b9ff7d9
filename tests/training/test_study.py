"""A study from its file to its results: interrupted, continued, with a run that fails, and then asked for more."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from study_files import small_study

from training import study, study_runs
from training.log_files import read_metrics
from training.results import read_evaluation
from training.stop import STOPPED_STATUS
from training.study_plan import Planner
from training.study_report import RESULTS
from training.study_settings import StudySettings


# A study whose choice is confirmed on test: with all and with half of the labels, and fine-tuned.
FINETUNE = {"config": "training/recipes/finetune_cifar10.yaml", "epochs": 1, "max_images": 30}
FINETUNE |= {"per_device_batch_size": 10}
CONFIRMED = {"judge_images": 30, "final_seeds": [7], "references": True, "few_shot": [0.5], "finetune": FINETUNE}


def check_confirmed(scores: dict[str, dict[str, float]], from_scratch: list[float]) -> None:
    assert 0 <= scores["finetuned"]["accuracy"] <= 1
    assert set(scores["cls"]) == {"knn", "probe", "knn, 50 %", "probe, 50 %"}
    assert len(from_scratch) == 1


def as_flags(settings: StudySettings) -> list[str]:
    told = {name: value for name, value in vars(settings).items() if value not in (None, [], "", False)}
    flags: list[str] = []
    for name, value in told.items():
        flags += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
    return flags


def until(condition: Callable[[], object]) -> None:
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < 300
        time.sleep(0.1)


@pytest.mark.slow
def test_a_study_survives_interruptions_and_failures_and_grows(
    tmp_path: Path, write_shards: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(75)
    write_shards(40, split="test")
    common = {"logging_steps": 1, "save_steps": 5}
    settings = small_study(tmp_path, steps=3000, common=common, jobs=1)
    (long,) = Planner(settings).plan().runs
    started = subprocess.Popen([sys.executable, "-m", "training.study", *as_flags(settings)])
    until(lambda: len(read_metrics(long.folder / "metrics.jsonl")) > 20)
    started.send_signal(signal.SIGTERM)
    assert started.wait(timeout=300) == STOPPED_STATUS
    assert (long.folder / "STOPPED").exists()
    assert not study_runs.is_trained(long)
    assert not (tmp_path / "results").exists()

    # At fewer steps in all; with a rate that makes a run fail, and a choice that is confirmed on test.
    factors: dict[str, Any] = {"base_lr": [1e30], "temperature": [0.2]}
    settings = small_study(tmp_path, steps=30, common=common, jobs=2, factors=factors, **CONFIRMED)
    assert not study.main(settings)
    said = capsys.readouterr().out
    record = json.loads((tmp_path / "results" / "mine.json").read_text())
    assert [failed.split(":")[0] for failed in record["failed"]] == ["base_lr=1e+30, seed 0"], record["failed"]
    assert "FAILED  base_lr=1e+30, seed 0: training.pretrain: Step" in said
    assert {record["points"][run["point"]] for run in record["runs"] if not run["final"]} == {
        "centre",
        "temperature=0.2",
    }
    (confirmed,) = [run for run in record["runs"] if run["final"]]
    assert (confirmed["seed"], confirmed["point"]) == (7, record["final"][0])
    assert set(record["references"]) == {"validation", "test"}
    for run in record["runs"]:
        assert run["images"] == 240
        assert set(run["scores"]) == ({"cls", "mean", "finetuned"} if run["final"] else {"cls", "mean"})
    check_confirmed(confirmed["scores"], record["from_scratch"])
    page = (tmp_path / "results" / RESULTS).read_text()
    assert "**Failed:** base_lr=1e+30, seed 0" in page
    assert (tmp_path / "results" / "mine.png").stat().st_size > 10_000

    runs = {run.label: run for run in Planner(settings).plan().runs}
    command = read_evaluation(runs["centre"].folder / "model")["training"]["command"]
    assert command.startswith("python -m training.pretrain --config")
    before = (runs["centre"].folder / "log.txt").stat().st_mtime_ns
    more = replace(settings, factors=json.dumps({"temperature": [0.2, 0.5]}))
    assert study.main(more)
    assert "4 of 5 runs" not in capsys.readouterr().out
    assert (runs["centre"].folder / "log.txt").stat().st_mtime_ns == before
    record = json.loads((tmp_path / "results" / "mine.json").read_text())
    assert {record["points"][run["point"]] for run in record["runs"]} >= {
        "centre",
        "temperature=0.2",
        "temperature=0.5",
    }
    assert record["failed"] == []


def test_the_cores_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 3, 5, 7}, raising=False)
    assert study_runs.shared_cores(0) == [{2}, {3}, {5}, {7}]
    assert study_runs.shared_cores(2) == [{2, 3}, {5, 7}]
    assert study_runs.shared_cores(1) == [{2, 3, 5, 7}]
    assert study_runs.shared_cores(5) == [{2}, {3}, {5}, {7}, {2}]


def test_a_run_is_trained_when_its_settings_and_its_steps_are_there(
    tmp_path: Path, write_shards: Callable[..., Path]
) -> None:
    write_shards(20)
    (run,) = Planner(small_study(tmp_path)).plan().runs
    assert not study_runs.is_trained(run)
    folder = run.folder / "model"
    folder.mkdir(parents=True)
    settings = {name: value for name, value in run.config.to_dict().items() if name != "method"}
    for changed, steps, expected in (({}, 10, True), ({"temperature": 0.9}, 10, False), ({}, 9, False)):
        training = {"settings": settings | changed, "progress": {"step": steps}}
        (folder / "eval.json").write_text(json.dumps({"training": training, "results": []}))
        assert study_runs.is_trained(run) == expected
