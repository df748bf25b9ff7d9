"""What all processes of a run must know alike after each optimiser step."""

from collections import deque
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor


class Told(NamedTuple):
    """What is known of one optimiser step, the same on all processes."""

    step: int
    stop: bool  # some process was asked to stop
    skipped: bool  # the gradient was not finite, and the step did nothing


class Agreement:
    """Lets all processes act alike on what one of them knows.

    The flags travel with the work of the device: what a GPU tells of a step is read after the next one, when it is
    long there, so that the host goes on preparing work. On the CPU there is nothing to wait for.

    Args:
        accelerator: the processes.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator, self.device = accelerator, accelerator.device
        self.delay = 0 if self.device.type == "cpu" else 1  # steps
        self.waiting: deque[tuple[int, Tensor, torch.Event | None]] = deque()

    def tell(self, step: int, stop: bool, skipped: Tensor | None, at_once: bool = False) -> list[Told]:
        """Share what this process knows of a step; all processes call it after every step.

        Args:
            step: optimiser step.
            stop: whether this process was asked to stop.
            skipped: scalar on the device, whether the step did nothing; None where that cannot be.
            at_once: wait for the answer, the same on all processes; as does an answer that says to stop.

        Returns:
            The steps that are known now, in order.
        """
        flags = torch.full((2,), float(stop), device=self.device)  # unlike `torch.tensor` without waiting for a GPU
        flags[1] = 0.0 if skipped is None else skipped
        flags = self.accelerator.reduce(flags, reduction="sum").to("cpu", non_blocking=True)
        arrival = None
        if self.device.type != "cpu":
            arrival = torch.Event(self.device)
            arrival.record()
        self.waiting.append((step, flags, arrival))
        return self.read(0 if at_once else self.delay)

    def read(self, left: int = 0) -> list[Told]:
        """The steps that were told of, in order, but for so many of the last, unless one before says to stop."""
        known: list[Told] = []
        while len(self.waiting) > (0 if any(told.stop for told in known) else left):
            step, flags, arrival = self.waiting.popleft()
            if arrival is not None:
                arrival.synchronize()
            known.append(Told(step, *(flag > 0 for flag in flags.tolist())))
        return known
