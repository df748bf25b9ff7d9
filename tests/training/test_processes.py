"""A process that dies or hangs ends the others in time, with a message and a checkpoint to go on from."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from training.log_files import read_metrics


ROOT = Path(__file__).parents[2]
TIMEOUT = 8  # seconds, for process_timeout
STEPS = 100

pytestmark = pytest.mark.slow
Start = Callable[[], list[subprocess.Popen[str]]]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def start(run: Path, write_shards: Callable[..., Path]) -> Iterator[Start]:
    """Start two processes without a launcher, which would end them all by itself."""
    write_shards(40)
    settings = {
        **{"dataset": run.parent / "data", "output_dir": run, "image_size": 16, "patch_size": 4, "hidden_size": 32},
        **{"num_hidden_layers": 1, "num_attention_heads": 2, "mask_ratio": 0.5, "mixed_precision": "no"},
        **{"contrastive_batch_size": 16, "negatives": "global", "epochs": 1000, "max_steps": STEPS, "save_steps": 10},
        **{"logging_steps": 1, "num_workers": 0, "knn_images": 0, "report_to": "none", "process_timeout": TIMEOUT},
    }
    command = [sys.executable, "-m", "training.pretrain", *(f"--{key}={value}" for key, value in settings.items())]
    started: list[subprocess.Popen[str]] = []

    def start() -> list[subprocess.Popen[str]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        common |= {"ACCELERATE_USE_CPU": "true", "HF_HOME": str(run.parent / "home")}
        pair = [
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        started.extend(pair)
        return pair

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("lost", [signal.SIGKILL, signal.SIGSTOP])
def test_the_others_end_in_time_and_the_same_command_goes_on(lost: signal.Signals, start: Start, run: Path) -> None:
    first, second = start()
    while not list(run.glob("checkpoints/step-*")):
        assert first.poll() is None, first.communicate()[1][-3000:]
        time.sleep(0.1)
    second.send_signal(lost)
    _, complaints = first.communicate(timeout=TIMEOUT + 60)
    assert first.returncode == 1
    said = complaints.strip().splitlines()[-1] if lost == signal.SIGKILL else complaints
    assert "training.pretrain: Process 0 lost process 1 (no sign of life" in said, complaints[-3000:]
    assert f"having waited for up to process_timeout={TIMEOUT} seconds" in said
    assert str(run / "checkpoints") in said
    second.kill()

    saved = max(int(path.name.removeprefix("step-")) for path in run.glob("checkpoints/step-*"))
    assert saved < STEPS
    pair = start()
    printed = [process.communicate(timeout=600) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], printed[0][1][-3000:]
    assert f"step-{saved:06d}" in printed[0][0]  # resuming from it
    steps = [entry["step"] for entry in read_metrics(run / "metrics.jsonl") if "loss" in entry]
    assert steps == list(range(1, STEPS + 1))
