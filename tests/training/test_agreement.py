"""What is told of a step is known in the order of the steps, on a GPU one step later."""

from collections.abc import Callable

import pytest
import torch
from accelerate import Accelerator

from training.agreement import Agreement, Told


@pytest.fixture
def agreement(no_accelerator: Callable[[], None]) -> Agreement:
    return Agreement(Accelerator())


def test_on_the_cpu_a_step_is_known_at_once(agreement: Agreement) -> None:
    assert agreement.tell(1, False, None) == [Told(1, stop=False, skipped=False)]
    assert agreement.tell(2, False, torch.tensor(True)) == [Told(2, stop=False, skipped=True)]
    assert agreement.tell(3, True, torch.tensor(False)) == [Told(3, stop=True, skipped=False)]


def test_on_a_gpu_a_step_is_known_after_the_next_one_or_when_all_must_be_known(agreement: Agreement) -> None:
    """As on one; the CPU stands in for its memory."""
    agreement.delay = 1
    bad, good = torch.tensor(True), torch.tensor(False)
    assert agreement.tell(1, False, bad) == []
    assert agreement.tell(2, False, good) == [Told(1, stop=False, skipped=True)]
    assert agreement.tell(3, False, bad, at_once=True) == [Told(2, False, False), Told(3, False, True)]
    assert agreement.tell(4, True, bad) == []
    # After a request to stop the checkpoint comes, which counts every step.
    assert agreement.tell(5, False, bad) == [Told(4, stop=True, skipped=True), Told(5, stop=False, skipped=True)]
