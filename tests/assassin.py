"""Deaths at any operation on files, and full disks, for code that must survive them."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from training import tensors


class Killed(BaseException):
    """Stands for the end of the process."""


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


class Assassin:
    """Kills at the n-th operation on files: before it, half-way through it, or after it."""

    WATCHED = (
        *((os, "fsync"), (shutil, "rmtree"), (tensors, "save_file")),
        *((Path, name) for name in ("mkdir", "write_text", "rename", "open")),
    )

    def __init__(self, moment: str) -> None:
        self.moment, self.operations, self.victim = moment, 0, -1

    def watch(self, patch: pytest.MonkeyPatch) -> None:
        for owner, name in self.WATCHED:
            patch.setattr(owner, name, self.guarded(name, getattr(owner, name)))

    def guarded(self, name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self.operations += 1
            if self.operations - 1 != self.victim:
                return operation(*args, **kwargs)
            if self.moment == "after":
                operation(*args, **kwargs)
            elif self.moment == "half-way" and name == "rmtree" and Path(args[0]).exists():
                next(path for path in sorted(Path(args[0]).rglob("*")) if path.is_file()).unlink()
            elif self.moment == "half-way" and name == "write_text":
                operation(args[0], args[1][: len(args[1]) // 2])
            elif self.moment == "half-way" and name == "save_file":
                operation(*args, **kwargs)
                truncate(args[1])
            raise Killed

        return guarded


def fill_disk(patch: pytest.MonkeyPatch, name: str, step: int | None = None) -> None:
    """Let a file of a checkpoint, of any step or this one, find no space on the disk when half of it is written."""
    write_text, save_file = Path.write_text, tensors.save_file

    def is_meant(path: Path) -> bool:
        folder = ".tmp-step-" if step is None else f".tmp-step-{step:06d}"
        return path.name == name and path.parent.name.startswith(folder)

    def write_half(path: Path, text: str, **options: Any) -> int:
        if not is_meant(path):
            return write_text(path, text, **options)
        write_text(path, text[: len(text) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    def save_half(content: dict[str, Any], path: Path) -> None:
        save_file(content, path)
        if is_meant(path):
            truncate(path)
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    patch.setattr(Path, "write_text", write_half)
    patch.setattr(tensors, "save_file", save_half)
