"""Kills pre-training runs with SIGKILL at random moments and starts them again, until they come to their end.

`python killed_runs.py SEED KILLS SETTINGS.json ...` prints a JSON object for each file of settings. All runs are forks
of this process, as importing everything takes longer than what is looked at.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

from training import pretrain
from training.checkpoint import newest_checkpoint
from training.config import PretrainConfig


def start(config: PretrainConfig) -> int:
    """The number of a process that trains."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.dup2(os.open(Path(config.output_dir).with_suffix(".log"), os.O_CREAT | os.O_APPEND | os.O_WRONLY), 1)
        pretrain.main(config)
        status = 0
    finally:
        os._exit(status)


def last_change(file: Path) -> int:
    return file.stat().st_mtime_ns if file.exists() else 0


def wait(metrics: Path, moments: random.Random) -> None:
    """Until this file has been changed a few times, as it is when a run begins and with each step, and a bit more."""
    deadline = time.monotonic() + 60
    for _ in range(moments.randint(0, 6)):
        before = last_change(metrics)
        while last_change(metrics) == before and time.monotonic() < deadline:
            time.sleep(0.001)
    time.sleep(moments.uniform(0, 0.05))


def kill_again_and_again(config: PretrainConfig, kills: int, moments: random.Random) -> dict[str, Any]:
    """What happened until the run came to its end."""
    folder = Path(config.output_dir)
    found: dict[str, Any] = {"kills": 0, "while saving": 0, "resumed from": []}
    while True:
        child = start(config)
        if found["kills"] < kills:
            wait(folder / "metrics.jsonl", moments)
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status != -signal.SIGKILL:
            return found | {"status": status}
        newest, refused = newest_checkpoint(folder / "checkpoints")
        assert not refused, refused
        found["kills"] += 1
        found["while saving"] += any((folder / "checkpoints").glob(".tmp-*"))
        found["resumed from"].append(int(newest.name.removeprefix("step-")) if newest else 0)


if __name__ == "__main__":
    for file in sys.argv[3:]:
        config = PretrainConfig(**json.loads(Path(file).read_text()))
        found = kill_again_and_again(config, int(sys.argv[2]), random.Random(int(sys.argv[1])))
        print(json.dumps(found), flush=True)  # noqa: T201
