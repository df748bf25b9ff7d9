"""Freed memory that is kept: the same tensors again need no new pages."""

import multiprocessing
import platform
import resource
import sys
from collections.abc import Callable

import pytest
import torch

from training.allocator import give_back_freed_memory, keep_freed_memory


glibc = pytest.mark.skipif(
    sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are"
)
MIB = 2**20
TENSORS = [torch.Size([20 * MIB])] * 5  # bytes each


def new_pages(setting: Callable[[], None]) -> int:
    """Pages that the same tensors take from the system when they are made again."""
    setting()
    for _ in range(4):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        tensors = [torch.ones(size, dtype=torch.uint8) for size in TENSORS]
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def in_a_new_process(setting: Callable[[], None]) -> int:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(new_pages, [setting])


@glibc
def test_kept_memory_is_used_again() -> None:
    assert in_a_new_process(keep_freed_memory) < 20 * MIB / resource.getpagesize()


@glibc
def test_memory_that_is_given_back_is_asked_for_again() -> None:
    assert in_a_new_process(give_back_freed_memory) >= 5 * 20 * MIB / resource.getpagesize()


def test_another_c_library_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda _: object())
    keep_freed_memory()
