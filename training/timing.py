"""Times of training steps: interleaved, as medians, and on a GPU without waiting for it within a step.

On the CPU a repetition is one step. On a CUDA GPU it is ten in a row between CUDA events, so that the host can hurry
ahead as it does in training; the GPU is waited for only when they are over. The first repetition of each step warms up
and is not counted.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
import torch


STEPS_IN_A_ROW = {"cpu": 1, "cuda": 10}

Step = Callable[[], None]
Name = TypeVar("Name", bound=Hashable)


class Stopwatch:
    """Marks in time: the host's on the CPU, the stream's on a CUDA GPU."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.marks: list[Any] = []

    def mark(self) -> None:
        """Remember when this was reached; on a GPU, when the work before it is done, without waiting for that."""
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(perf_counter())

    def seconds(self) -> list[float]:
        """From each mark to the next; waits for a GPU."""
        neighbours = list(zip(self.marks[:-1], self.marks[1:], strict=True))
        if not self.on_gpu:
            return [end - begin for begin, end in neighbours]
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1000 for begin, end in neighbours]


def time_phases(
    steps: Mapping[Name, Sequence[Step]], repetitions: int, device: torch.device
) -> dict[Name, list[list[float]]]:
    """Seconds of every phase of a step in every repetition, interleaved: what else the machine does hits all alike.

    Args:
        steps: by name, the phases of each, in their order.
        repetitions: counted ones.
        device: that they run on.

    Returns:
        By name, for each repetition the seconds of each phase.
    """
    seconds: dict[Name, list[list[float]]] = {name: [] for name in steps}
    in_a_row = STEPS_IN_A_ROW[device.type]
    for number in range(1 + repetitions):
        for name, phases in steps.items():
            watch = Stopwatch(device)
            watch.mark()
            for _ in range(in_a_row):
                for phase in phases:
                    phase()
                    watch.mark()
            times = np.reshape(watch.seconds(), (in_a_row, len(phases)))
            if number:
                seconds[name].append(times.mean(axis=0).tolist())
    return seconds


def time_steps(steps: Mapping[Name, Step], repetitions: int, device: torch.device) -> dict[Name, list[float]]:
    """As `time_phases` for whole steps: seconds of every repetition."""
    seconds = time_phases({name: [step] for name, step in steps.items()}, repetitions, device)
    return {name: [time for (time,) in times] for name, times in seconds.items()}


def per_image(seconds: Sequence[float], images: int) -> dict[str, Any]:
    """Median and interquartile range of the milliseconds per image, and the seconds that they come from."""
    first, middle, third = np.percentile(seconds, [25, 50, 75]) * 1000 / images
    return {"ms_per_image": float(middle), "ms_per_image_iqr": float(third - first), "seconds": list(seconds)}
