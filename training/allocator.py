"""What the C library does with memory that is freed: new pages from the system cost time in every step."""

import ctypes
import sys


# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MOST_MMAP_THRESHOLD = 32 * 2**20
_FIRST_MMAP_THRESHOLD = 128 * 2**10


def keep_freed_memory(most: int = 2**30) -> None:
    """Keep up to `most` bytes that were freed, for what is allocated next; processes that are forked do so, too.

    By itself glibc gives tensors of a step, and files and images of a batch, back to the system and asks for them
    again. Other C libraries are left as they are.
    """
    _set(_M_MMAP_THRESHOLD, _MOST_MMAP_THRESHOLD)
    _set(_M_TRIM_THRESHOLD, most)


def give_back_freed_memory() -> None:
    """Give the memory of each freed tensor back at once, so that a process holds what it uses."""
    _set(_M_MMAP_THRESHOLD, _FIRST_MMAP_THRESHOLD)  # as it is set, it does not grow


def _set(parameter: int, value: int) -> None:
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(parameter, value)
