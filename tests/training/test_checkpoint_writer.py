"""Checkpoints that are written while training goes on."""

from collections.abc import Iterator
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import test_checkpoint
import torch
from assassin import fill_disk

from training import checkpoint as checkpoint_module
from training.checkpoint import (
    CheckpointWriter,
    DiskFull,
    find_defect,
    load_checkpoint,
    newest_checkpoint,
)


run = test_checkpoint.run


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Event]:
    """Nothing is written before this is set."""
    free, write = Event(), checkpoint_module.write_files

    def wait_and_write(*args: Any) -> None:
        assert free.wait(60)
        write(*args)

    monkeypatch.setattr(checkpoint_module, "write_files", wait_and_write)
    yield free
    free.set()


def test_training_goes_on_while_a_checkpoint_is_written(
    run: SimpleNamespace, slow_disk: Event, tmp_path: Path
) -> None:
    writer = CheckpointWriter(tmp_path, keep=9)
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    momentum = run.optimizer.state[run.model.bias]["exp_avg"].clone()
    writer.begin(run, 1, {"step": 1})
    run.model(torch.ones(1, 3)).sum().backward()
    run.optimizer.step()
    assert not torch.equal(run.model.bias, before["bias"])
    assert newest_checkpoint(tmp_path) == (None, [])
    slow_disk.set()
    writer.finish()
    writer.finish()
    load_checkpoint(run, tmp_path / "step-000001")
    assert find_defect(tmp_path / "step-000001") is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.model.state_dict().items())
    assert torch.equal(run.optimizer.state[run.model.bias]["exp_avg"], momentum)


def test_a_failure_in_the_background_comes_out_at_the_end(
    run: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_disk(monkeypatch, "model.safetensors")
    writer = CheckpointWriter(tmp_path, keep=9)
    writer.begin(run, 1, {})
    with pytest.raises(DiskFull, match="step 1"):
        writer.finish()
    writer.finish()
