"""The picture of a batch shows what the loss compares."""

import numpy as np
import pytest
import torch

from modeling_micl import micl_loss
from training.batch_figure import NEGATIVE, NOT_COMPARED, POSITIVE, PROCESSES, compared


@pytest.mark.parametrize(("one_pass", "pool"), [(True, 4), (False, 8)])
def test_within_a_process_it_is_what_the_local_loss_depends_on(one_pass: bool, pool: int) -> None:
    shown = compared(process=True, one_pass=one_pass)
    embeds = torch.nn.functional.normalize(torch.randn(len(shown), 2, 8), dim=-1)
    for first in range(0, len(shown), pool):  # the images that are in one loss
        own = slice(first, first + pool)
        logits = micl_loss(embeds[own])[1]
        assert logits.shape == (pool, pool)
        assert np.array_equal(shown[own, own] == POSITIVE, np.eye(pool, dtype=bool))
        assert (shown[own, own] != NOT_COMPARED).all()
        assert (np.delete(shown[own], np.arange(first, first + pool), axis=1) == NOT_COMPARED).all()


@pytest.mark.parametrize(("one_pass", "negatives"), [(True, 7), (False, 15)])
def test_global_negatives_come_from_all_processes(one_pass: bool, negatives: int) -> None:
    shown = compared(process=False, one_pass=one_pass)
    assert ((shown == NEGATIVE).sum(axis=1) == negatives).all()
    assert np.array_equal(shown, shown.T)
    half = len(shown) // PROCESSES
    assert (shown[:half, half:] == NEGATIVE).any()
