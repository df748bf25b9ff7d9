"""Runs that are killed at random moments, again and again, end as those that never were."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.kill_runs import KEEP, KEEP_EVERY, Checkpoints, begins_at


ROOT = Path(__file__).parents[2]
KILLS = 16


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_is_the_uninterrupted_one(tmp_path: Path) -> None:
    output = tmp_path / "kills.json"
    command = [sys.executable, "-m", "tests.faults.kill_runs", "--forks", f"--kills={KILLS}", "--steps=16"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [*command, f"--output={output}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    results = json.loads(output.read_text())["results"]
    kinds = [(processes, background) for processes in (1, 2) for background in (False, True)]
    assert [(found["processes"], found["async_checkpoints"]) for found in results] == kinds
    assert sum(found["kills"] for found in results) == KILLS
    assert sum(found["restarts"] for found in results) == KILLS
    assert sum(found["kills_while_saving"] for found in results) > 0  # else nothing was going on when it was killed
    assert sum(found["kills_at_start"] for found in results) < KILLS / 2
    faults = ("lost_checkpoints", "older_resumes", "failed_starts", "differing_losses", "differing_weights")
    assert {found[name] for found in results for name in faults} == {0}


def test_a_checkpoint_is_lost_if_it_had_to_be_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    steps = [KEEP_EVERY, *range(KEEP_EVERY + 1, KEEP_EVERY + 6)]
    for step in steps:
        folder = tmp_path / f"step-{step:06d}"
        folder.mkdir()
        (folder / "optimizer.json").write_text("{}")
        digest = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"  # of {}
        names = ("model.safetensors", "optimizer.safetensors")
        for name in names:
            (folder / name).write_text("{}")
        (folder / "manifest.json").write_text(json.dumps(dict.fromkeys(names, digest)))
    assert not checkpoints.check()
    assert checkpoints.lost == set()
    assert checkpoints.newest == steps[-1]
    for step in (KEEP_EVERY, steps[1], steps[-KEEP]):  # the second is old enough to go
        (tmp_path / f"step-{step:06d}" / "model.safetensors").write_text("{")
    (tmp_path / ".tmp-step-000099").mkdir()
    assert checkpoints.check()
    assert checkpoints.lost == {KEEP_EVERY, steps[-KEEP]}
    (tmp_path / f"step-{steps[-1]:06d}").rename(tmp_path / "gone")
    assert not checkpoints.check()  # what was left before
    assert checkpoints.lost == {KEEP_EVERY, steps[-KEEP], steps[-1]}
    assert checkpoints.newest == steps[-2]


def test_a_start_tells_where_it_begins() -> None:
    assert begins_at("resuming from runs/x/checkpoints/step-000012\nimages per optimiser step  8") == 12
    assert begins_at("images per optimiser step  8") == 0
    assert begins_at("Traceback") is None
