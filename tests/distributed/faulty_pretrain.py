"""`training.pretrain` with what FAULT says done to one process, and a line from each with a checksum of its weights.

FAULT is JSON: the `rank` that it concerns; the `signal` to send "to" itself or its launcher after the forward pass
number `forward`, or the numbers of those whose images are `spoilt`.
"""

import hashlib
import json
import os
import runpy
import signal
from typing import Any

from torch import Tensor

from training import features
from training.log import Logger
from training.run import Run


FAULT = json.loads(os.environ.get("FAULT", "{}"))
HERE = FAULT.get("rank") == int(os.environ["RANK"])
passes = 0

add, normalize, whole = Logger.add, features.normalize_pixels, Run.whole_model


def normalize_and_spoil(pixels: Tensor) -> Tensor:
    global passes
    passes += 1
    return normalize(pixels) * (float("nan") if HERE and passes in FAULT.get("spoilt", ()) else 1.0)


def add_and_signal(self: Logger, *args: Any) -> None:
    add(self, *args)
    if HERE and passes == FAULT.get("forward"):
        target = os.getpid() if FAULT["to"] == "itself" else os.getppid()
        os.kill(target, getattr(signal, FAULT["signal"]))


def whole_and_checksum(self: Run) -> Any:
    model = whole(self)
    digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters()))
    os.write(1, f"weights {digest.hexdigest()}\n".encode())  # in one piece, as the other process writes there, too
    return model


features.normalize_pixels, Logger.add, Run.whole_model = normalize_and_spoil, add_and_signal, whole_and_checksum
runpy.run_module("training.pretrain", run_name="__main__", alter_sys=True)
