"""Checkpoints: whatever happens while one is written, the one before it is found again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from assassin import Assassin, Killed, fill_disk, truncate
from torch import nn

from training import checkpoint as checkpoint_module
from training.checkpoint import (
    CheckpointWriter,
    DiskFull,
    NotSaved,
    find_defect,
    load_checkpoint,
    newest_checkpoint,
    read_state,
    set_aside_later,
)
from training.tensors import gather_state, write_files


FILES = ("model.safetensors", "optimizer.safetensors", "optimizer.json", "state.json")


@pytest.fixture
def run(no_accelerator: None) -> SimpleNamespace:
    """A small model and an optimiser that has made a step."""
    torch.manual_seed(0)
    accelerator = Accelerator(mixed_precision="no")
    layer = nn.Linear(3, 2)
    model, optimizer = accelerator.prepare(layer, torch.optim.AdamW(layer.parameters()))
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return SimpleNamespace(accelerator=accelerator, model=model, optimizer=optimizer, averaged=None)


def save_checkpoint(run: SimpleNamespace, folder: Path, step: int, keep: int, keep_every: int = 0) -> Path:
    writer = CheckpointWriter(folder, keep, keep_every)
    writer.begin(run, step, {"step": step}, copy=False)
    writer.finish()
    return folder / f"step-{step:06d}"


@pytest.fixture
def save(run: SimpleNamespace, tmp_path: Path) -> Callable[..., Path]:
    """Save a checkpoint whose weights and state are its step."""

    def save(step: int, keep: int = 9) -> Path:
        with torch.no_grad():
            run.model.weight.fill_(step)
        return save_checkpoint(run, tmp_path, step, keep)

    return save


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))


def newest_step(folder: Path) -> int:
    found, _ = newest_checkpoint(folder)
    assert found is not None
    assert found == folder / f"step-{read_state(found)['step']:06d}"
    return int(read_state(found)["step"])


def test_what_is_saved_comes_back(run: SimpleNamespace, save: Callable[..., Path]) -> None:
    model, optimizer = run.model, run.optimizer
    saved = save(7)
    momentum = optimizer.state[model.bias]["exp_avg"].clone()
    assert saved.name == "step-000007"
    assert find_defect(saved) is None
    assert read_state(saved) == {"step": 7}
    with torch.no_grad():
        model.weight.zero_()
        optimizer.state[model.bias]["exp_avg"].zero_()
    load_checkpoint(run, saved)
    assert (model.weight == 7).all()
    assert torch.equal(optimizer.state[model.bias]["exp_avg"], momentum)


def test_every_file_is_in_the_manifest(save: Callable[..., Path]) -> None:
    saved = save(1)
    files = {str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file()}
    assert set(json.loads((saved / "manifest.json").read_text())) == files - {"manifest.json"}
    assert files == {*FILES, "manifest.json"}


def test_the_newest_are_kept(save: Callable[..., Path], tmp_path: Path) -> None:
    for step in (5, 10, 15, 100):
        save(step, keep=2)
    assert steps(tmp_path) == [15, 100]
    assert newest_step(tmp_path) == 100


def test_every_kth_is_kept_beside_the_newest(run: SimpleNamespace, tmp_path: Path) -> None:
    for step in range(2, 27, 2):
        save_checkpoint(run, tmp_path, step, keep=2, keep_every=10)
    assert steps(tmp_path) == [10, 20, 24, 26]
    assert all(find_defect(tmp_path / f"step-{step:06d}") is None for step in (10, 20))


@pytest.mark.parametrize("keep", [1, 2])
def test_the_newest_are_kept_beyond_a_million_steps(keep: int, save: Callable[..., Path], tmp_path: Path) -> None:
    save(999_999, keep)
    save(1_000_000, keep)
    assert newest_step(tmp_path) == 1_000_000


def test_a_new_run_in_an_old_folder_keeps_its_checkpoints(save: Callable[..., Path], tmp_path: Path) -> None:
    save(800)
    save(900)
    save(10, keep=1)
    assert steps(tmp_path) == [10, 800, 900]


def test_what_a_new_run_goes_back_behind_is_set_aside_whole(save: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    shutil.copytree(save(800), folder / "step-000800")
    (folder.parent / "metrics.jsonl").write_text("{}\n")
    assert set_aside_later(folder, 800) is None
    kept = set_aside_later(folder, 10)
    assert kept == folder.parent / "before-1"
    assert find_defect(kept / "checkpoints" / "step-000800") is None
    assert (kept / "metrics.jsonl").exists()
    assert not folder.exists()


def test_what_a_run_goes_on_from_stays_when_later_ones_are_set_aside(
    save: Callable[..., Path], tmp_path: Path
) -> None:
    """If it is stopped before it saves again, the same command must find that once more."""
    folder = tmp_path / "run" / "checkpoints"
    for step in (800, 900, 1000):
        shutil.copytree(save(step), folder / f"step-{step:06d}")
    truncate(folder / "step-001000" / "model.safetensors")
    found, _ = newest_checkpoint(folder)
    kept = set_aside_later(folder, 900)
    assert kept is not None
    assert steps(kept / "checkpoints") == [1000]
    assert newest_checkpoint(folder) == (found, [])
    assert set_aside_later(folder, 900) is None


def test_a_step_can_be_saved_again(save: Callable[..., Path], tmp_path: Path) -> None:
    save(3)
    save(3)
    assert newest_step(tmp_path) == 3


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "checkpoints") == (None, [])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "harm", "reason"),
    [
        *((name, truncate, f"{name} is damaged") for name in FILES),
        *((name, flip_a_bit, f"{name} is damaged") for name in FILES),
        *((name, Path.unlink, f"{name} is missing") for name in FILES),
        ("manifest.json", truncate, "no readable manifest.json"),
        ("manifest.json", Path.unlink, "no readable manifest.json"),
    ],
)
def test_a_harmed_checkpoint_is_refused_with_the_reason_and_an_older_one_chosen(
    name: str, harm: Callable[[Path], None], reason: str, save: Callable[..., Path], tmp_path: Path
) -> None:
    save(1)
    harmed = save(2)
    harm(harmed / name)
    found, refused = newest_checkpoint(tmp_path)
    assert found == tmp_path / "step-000001"
    assert len(refused) == 1
    assert refused[0].startswith(f"{harmed}: {reason}")


def test_if_all_are_harmed_all_reasons_are_given(save: Callable[..., Path], tmp_path: Path) -> None:
    for step in (1, 2):
        truncate(save(step) / "model.safetensors")
    found, refused = newest_checkpoint(tmp_path)
    assert found is None
    assert [Path(reason.split(":")[0]).name for reason in refused] == ["step-000002", "step-000001"]


def test_an_empty_folder_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "step-000001").mkdir()
    assert newest_checkpoint(tmp_path)[0] is None


def survives_every_death(
    save: Callable[..., Path], folder: Path, moment: str, keep: int, monkeypatch: pytest.MonkeyPatch
) -> int:
    """Kill the saving of step 2 at every operation; returns at how many. Step 1 or 2 must be there each time."""
    for victim in range(200):
        shutil.rmtree(folder)
        save(1)
        assassin = Assassin(moment)
        try:
            with monkeypatch.context() as patch:
                assassin.watch(patch)
                assassin.victim = victim
                save(2, keep=keep)
        except Killed:
            assert newest_step(folder) in (1, 2)
        else:
            assert newest_step(folder) == 2
            return victim
        save(3, keep=keep)
        assert newest_step(folder) == 3
        assert len(steps(folder)) <= keep
        assert not list(folder.glob(".tmp*"))
    raise AssertionError("saving never came to its end")


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("moment", ["before", "half-way", "after"])
def test_death_at_any_moment_leaves_a_valid_checkpoint(
    moment: str, keep: int, save: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert survives_every_death(save, tmp_path, moment, keep, monkeypatch) > 10


def delete_first(run: SimpleNamespace, folder: Path, step: int, keep: int) -> Path:
    for old in sorted(folder.glob("step-*"))[: 1 - keep or None]:
        shutil.rmtree(old)
    return save_checkpoint(run, folder, step, keep)


def trust_anything(checkpoint: Path) -> None:
    return None


def test_deleting_old_ones_first_would_be_noticed(
    run: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(step: int, keep: int = 9) -> Path:
        return delete_first(run, tmp_path, step, keep)

    with pytest.raises(AssertionError):
        survives_every_death(save, tmp_path, "before", 1, monkeypatch)


def test_writing_in_place_would_be_noticed(
    run: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(step: int, keep: int = 9) -> Path:
        folder = tmp_path / f"step-{step:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        write_files(gather_state(run), folder)
        (folder / "state.json").write_text(json.dumps({"step": step}))
        return folder

    monkeypatch.setattr(checkpoint_module, "find_defect", trust_anything)
    with pytest.raises((AssertionError, OSError, ValueError)):
        survives_every_death(save, tmp_path, "half-way", 9, monkeypatch)


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_full_disk_leaves_the_checkpoints_before_it_and_nothing_else(
    name: str, save: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(1, keep=1)
    with monkeypatch.context() as patch:
        fill_disk(patch, name)
        with pytest.raises(DiskFull, match=r"step 2 could not be written .*No space left.*save_total_limit"):
            save(2, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    assert newest_step(tmp_path) == 1
    save(3, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"]


def test_another_trouble_is_not_taken_for_a_full_disk(
    save: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError("not allowed")

    monkeypatch.setattr(checkpoint_module, "write_files", refuse)
    with pytest.raises(NotSaved, match="PermissionError: not allowed") as error:
        save(1)
    assert not isinstance(error.value, DiskFull)
    assert list(tmp_path.iterdir()) == []
