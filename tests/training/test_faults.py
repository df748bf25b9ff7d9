"""What happens to one of two processes, or to their launcher, is answered by both alike."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Done, command, run
from safetensors.torch import load_file
from torch import Tensor


ROOT = Path(__file__).parents[2]
STEPS = 300
FAULTY = "tests.distributed.faulty_pretrain"

pytestmark = pytest.mark.slow
Train = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def settings(tmp_path: Path, write_shards: Callable[..., Path]) -> dict[str, Any]:
    """Of runs in which each process has its own negatives, so its own loss."""
    write_shards(41)
    return {
        **{"dataset": tmp_path / "data", "image_size": 16, "patch_size": 4},
        **{"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "mask_ratio": 0.5, "epochs": 200},
        **{"contrastive_batch_size": 8, "max_steps": STEPS, "mixed_precision": "no", "logging_steps": STEPS},
        **{"report_to": "none", "num_workers": 0, "knn_images": 0},
    }


@pytest.fixture
def train(tmp_path: Path, settings: dict[str, Any]) -> Train:
    """Start two processes by torchrun and wait for its end."""

    def train(
        folder: Path, fault: dict[str, Any], environment: dict[str, str] | None = None, **changes: Any
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", FAULTY]
        command += [f"--{name}={value}" for name, value in (settings | {"output_dir": folder} | changes).items()]
        variables = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HOME": str(tmp_path / "home")}
        variables |= {"FAULT": json.dumps(fault)} | (environment or {})
        return subprocess.run(
            command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, timeout=600, check=False
        )

    return train


@pytest.fixture
def train_alone(tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """Let two processes without a launcher do the same."""

    def train(folder: Path, fault: dict[str, Any], **changes: Any) -> Done:
        monkeypatch.setenv("FAULT", json.dumps(fault))
        return run(command(FAULTY, **settings | {"output_dir": folder} | changes), tmp_path / "home", processes=2)

    return train


def state(folder: Path, step: int) -> dict[str, Tensor]:
    checkpoint = folder / "checkpoints" / f"step-{step:06d}"
    return load_file(checkpoint / "model.safetensors") | load_file(checkpoint / "optimizer.safetensors")


def same_state(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in some)


def saved_steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*"))


def wait_for_end(run: Path) -> int:
    """The step at which processes that have lost their launcher say that they have stopped."""
    deadline = time.monotonic() + 600
    while not (run / "STOPPED").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return int((run / "STOPPED").read_text().removeprefix("step "))


def test_a_signal_to_one_process_or_the_launcher_stops_both_at_the_same_step(
    train: Train, train_alone: Callable[..., Done], tmp_path: Path
) -> None:
    """One run is stopped three times; in between and at the end it is the uninterrupted one. Nothing is logged."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert train_alone(whole, {}, save_steps=STEPS // 2).status == 0

    done = train(run, {"rank": 1, "forward": 7, "to": "itself", "signal": "SIGUSR1"})
    assert done.returncode == 1, done.stderr[-3000:]  # torchrun's
    assert re.search(r"exitcode *: 75", done.stderr)
    assert 'Traceback (most recent call last):\n  File "' + str(ROOT) not in done.stderr
    assert saved_steps(run) == [7]
    assert (run / "STOPPED").read_text() == "step 7\n"
    assert not (run / "model").exists()

    told = {"rank": 0, "forward": 20, "to": "launcher"}
    done = train(run, told | {"signal": "SIGUSR1"}, {"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGUSR1"})
    assert f"resuming from {run / 'checkpoints' / 'step-000007'}" in done.stdout
    assert done.returncode != 0
    assert "Stopped at step" in done.stdout
    second = wait_for_end(run)
    assert 26 <= second < STEPS
    assert saved_steps(run) == [7, second]

    # Without being told so, torchrun does not pass SIGUSR1 on, but dies of it.
    done = train(run, told | {"signal": "SIGUSR1"})
    third = wait_for_end(run)
    assert second < third < STEPS
    assert saved_steps(run) == [7, second, third]

    done = train(run, {}, save_steps=STEPS // 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (run / "STOPPED").exists()
    assert same_state(state(run, STEPS), state(whole, STEPS))


@pytest.mark.parametrize("most", [2, 1])
def test_numbers_gone_bad_in_one_process_are_skipped_by_both(
    most: int, train_alone: Callable[..., Done], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = train_alone(
        run,
        {"rank": 1, "spoilt": [3, 5, 6]},
        **{"max_steps": 8, "save_steps": 1, "save_total_limit": 10, "max_bad_steps": most},
    )
    if most < 2:
        assert done.status == 1
        assert done.complaints.count("training.pretrain: Step 6: gradient not finite, 2 times in a row.") == 2
        assert saved_steps(run) == [1, 2, 3, 4, 5]
        return
    assert done.status == 0, done.complaints[-3000:]
    for step in range(2, 9):
        assert same_state(state(run, step - 1), state(run, step)) == (step in {3, 5, 6}), step
    assert re.findall(r"WARNING: Step (\d+) is skipped", done.complaints) == ["3", "5"]
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [entry["skipped_steps"] for entry in entries if "loss" in entry] == [0, 0, 1, 1, 2, 3, 3, 3]
    checksums = re.findall(r"weights (\w+)", done.printed)
    assert len(checksums) == 2
    assert len(set(checksums)) == 1
