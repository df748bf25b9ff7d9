"""Groups of processes of which one is lost, each in its own way; prints what all others say, as JSON.

All are forks of this process, as importing everything takes longer than what is looked at.
"""

import json
import os
import signal
import socket
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from training.processes import lost_processes


PROCESSES, TIMEOUT = 4, 10  # seconds
LOST = {"killed": 2, "killed server of the store": 0, "stopped": 1, "stopped server of the store": 0, "sleeping": 3}
LOST |= {"failed": 1}


def lose(fault: str) -> None:
    """Be the one that is lost."""
    if fault == "sleeping":
        time.sleep(10 * TIMEOUT)
    if fault == "failed":
        raise ValueError("its own error")
    os.kill(os.getpid(), signal.SIGKILL if fault.startswith("killed") else signal.SIGSTOP)


def work(fault: str, rank: int, port: int) -> str:
    """Meet the others again and again."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=PROCESSES, timeout=timedelta(seconds=TIMEOUT))
    run = SimpleNamespace(
        accelerator=SimpleNamespace(process_index=rank, num_processes=PROCESSES),
        progress=SimpleNamespace(step=0),
        config=SimpleNamespace(process_timeout=TIMEOUT),
        folder=Path("run"),
    )
    try:
        with lost_processes(run):
            for _ in range(100):
                dist.all_reduce(torch.ones(1000))
                time.sleep(0.02)
                run.progress.step += 1
                if run.progress.step == 30 and rank == LOST[fault]:
                    lose(fault)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "nothing"


if __name__ == "__main__":
    pipe, children = os.pipe(), []
    for fault in LOST:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(PROCESSES):
            children.append(os.fork())
            if not children[-1]:
                said = json.dumps({"fault": fault, "rank": rank, "said": work(fault, rank, port)[:500]})
                os.write(pipe[1], f"{said}\n".encode())  # in one piece
                os._exit(0)
    os.close(pipe[1])
    with os.fdopen(pipe[0]) as lines:
        for _ in range((PROCESSES - 1) * len(LOST) + 1):  # that which failed has something to say, too
            print(lines.readline(), end="", flush=True)  # noqa: T201
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
