"""A run that is killed at any moments, again and again, ends as the one that never was."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from run_folder import course, same_weights

from training.config import PretrainConfig


ROOT = Path(__file__).parents[2]
KILLS = 10


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_is_the_uninterrupted_one(
    write_shards: Callable[..., Path],
    settings: Callable[..., PretrainConfig],
    run_pretraining: Callable[..., Path],
    tmp_path: Path,
) -> None:
    write_shards(20, 13, 8)
    whole = run_pretraining(settings(max_steps=24, output_dir=str(tmp_path / "whole")))
    files = []
    for name, options in (("at once", {"keep_every_steps": 8}), ("in background", {"async_checkpoints": True})):
        config = settings(max_steps=24, save_steps=1, output_dir=str(tmp_path / name), **options)
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps(config.to_dict()))
    program = [sys.executable, str(Path(__file__).with_name("killed_runs.py")), "0", str(KILLS), *map(str, files)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    for file, line in zip(files, done.stdout.splitlines(), strict=True):
        run, found = file.with_suffix(""), json.loads(line)
        assert found["status"] == 0, done.stderr[-5000:]
        assert found["kills"] == KILLS
        assert found["resumed from"] == sorted(found["resumed from"])
        assert len(set(found["resumed from"])) > 2  # else nothing was going on when it was killed
        assert course(run) == course(whole)
        assert same_weights(run, whole)
        kept = {8, 16, 24} if file.stem == "at once" else set()
        assert {int(path.name[5:]) for path in (run / "checkpoints").glob("step-*")} == kept | {22, 23, 24}
