"""A run whose disk is full keeps what it has, and stops or goes on as its settings say."""

import errno
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest
from accelerate import Accelerator
from assassin import fill_disk
from run_folder import course, same_weights, saved_steps

from modeling_micl import MiclForPreTraining
from training import pretrain, results
from training.checkpoint import DiskFull, find_defect
from training.config import PretrainConfig
from training.log_files import MetricsLog, read_metrics
from training.results import save_model


Write = Callable[..., Path]
Settings = Callable[..., PretrainConfig]
Train = Callable[..., Path]


@pytest.fixture
def whole(write_shards: Write, settings: Settings, run_pretraining: Train, tmp_path: Path) -> Path:
    """Six steps on a disk with space."""
    write_shards(20, 13)
    return run_pretraining(settings(max_steps=6, output_dir=str(tmp_path / "whole")))


@pytest.mark.parametrize("in_background", [False, True])
def test_it_stops_with_a_remedy_and_the_checkpoint_before_and_goes_on_later(
    in_background: bool, whole: Path, settings: Settings, run_pretraining: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(max_steps=6, save_steps=2, async_checkpoints=in_background)
    with monkeypatch.context() as patch:
        fill_disk(patch, "optimizer.safetensors", step=4)
        with pytest.raises(DiskFull, match="step 4 could not be written .*: free some space"):
            run_pretraining(config)
    run = Path(config.output_dir)
    assert saved_steps(run) == [2]
    assert len(list((run / "checkpoints").iterdir())) == 1
    run_pretraining(config)
    assert course(run) == course(whole)
    assert same_weights(run, whole)


@pytest.mark.parametrize("in_background", [False, True])
def test_it_goes_on_if_asked_to_and_saves_again_when_there_is_space(
    in_background: bool,
    whole: Path,
    settings: Settings,
    run_pretraining: Train,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fill_disk(monkeypatch, "model.safetensors", step=4)
    options = {"save_steps": 2, "async_checkpoints": in_background, "on_full_disk": "go_on"}
    run = run_pretraining(settings(max_steps=6, **options))
    assert saved_steps(run) == [2, 6]
    assert find_defect(run / "checkpoints" / "step-000006") is None
    assert capsys.readouterr().err.count("WARNING: The checkpoint of step 4 could not be written") == 1
    assert course(run) == course(whole)
    assert same_weights(run, whole)


def test_the_model_is_written_even_if_the_last_checkpoint_does_not_fit(
    whole: Path, settings: Settings, run_pretraining: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_disk(monkeypatch, "model.safetensors")
    run = run_pretraining(settings(max_steps=6, on_full_disk="go_on"))
    assert saved_steps(run) == []
    assert same_weights(run, whole)


def test_a_run_that_is_asked_to_stop_does_not_say_that_all_is_saved(
    write_shards: Write,
    settings: Settings,
    run_pretraining: Train,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_shards(20)
    fill_disk(monkeypatch, "model.safetensors")
    monkeypatch.setattr(pretrain, "StopRequest", lambda: SimpleNamespace(came=True))
    with pytest.raises(DiskFull, match="step 1"):
        run_pretraining(settings(max_steps=6, on_full_disk="go_on"))
    assert "all saved" not in capsys.readouterr().out
    assert not (Path(settings().output_dir) / "STOPPED").exists()


def test_entries_of_the_log_wait_until_there_is_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log, opened = MetricsLog(tmp_path / "metrics.jsonl", 0), Path.open

    class Full:
        """Half of what is written finds space."""

        def __init__(self, file: IO[str]) -> None:
            self.file = file

        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def writelines(self, lines: list[str]) -> None:
            self.file.write("".join(lines)[:-5])
            raise OSError(errno.ENOSPC, "No space left on device")

    def open_full(path: Path, mode: str = "r", **options: Any) -> Any:
        file = opened(path, mode, **options)
        return Full(file) if mode == "a" else file

    log.write({"step": 1})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_full)
        log.write({"step": 2})
        log.write({"step": 3})
        assert [entry["step"] for entry in read_metrics(log.path)] == [1]
    assert capsys.readouterr().err.count("metrics.jsonl cannot be written now") == 2
    log.write({"step": 4})
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [1, 2, 3, 4]


def test_a_tracker_without_space_does_not_end_the_run(
    whole: Path, settings: Settings, run_pretraining: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Accelerator, "log", refuse)
    monkeypatch.setattr(Accelerator, "end_training", refuse)
    run = run_pretraining(settings(max_steps=6))
    assert course(run) == course(whole)
    assert same_weights(run, whole)


def test_a_model_that_does_not_fit_leaves_the_old_one(
    tiny_model: Callable[..., MiclForPreTraining], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model = tmp_path / "model", tiny_model(MiclForPreTraining)
    save_model(model, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(results, "add_remote_code", refuse)
    with pytest.raises(RuntimeError, match="model could not be written .*No space left.*: free some space"):
        save_model(model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
