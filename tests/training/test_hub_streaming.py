"""Datasets stream from a loopback Hub while a model trains, also over bad connections; no token is left anywhere."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from hub_client import environment, files_with, hub_for_this_process, upload
from hub_server import TOKEN, HubServer
from huggingface_hub import HfFileSystem
from source_rows import all_rows

from modeling_micl import MiclForPreTraining
from training import loop, pretrain
from training.config import PretrainConfig
from training.log_files import read_metrics
from training.loop import train
from training.results import save_model
from training.run import Run, save_run
from training.source import open_source


Write = Callable[..., Path]
Settings = Callable[..., PretrainConfig]
Train = Callable[..., Path]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with hub_for_this_process(tmp_path / "home") as server:
        yield server


@pytest.fixture
def data(write_shards: Write) -> Path:
    """Three shards to learn from, one to evaluate on."""
    write_shards(11, 9, 12)
    return write_shards(16, split="test")


def losses(run: Path) -> list[float]:
    return [entry["loss"] for entry in read_metrics(run / "metrics.jsonl") if "loss" in entry]


@pytest.mark.slow
def test_a_stream_from_the_hub_gives_the_losses_of_the_local_folder(
    hub: HubServer,
    data: Path,
    settings: Settings,
    run_pretraining: Train,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    upload(hub, data, "datasets/me/pictures", private=True)
    expected = losses(run_pretraining(settings(epochs=2, output_dir=str(tmp_path / "local"))))
    assert len(expected) == 8
    for line in ("good", "breaks before an answer", "breaks amid an answer"):

        def train_over_it(*arguments: Any, line: str = line) -> bool:
            hub.break_at = "" if line == "good" else "GET /datasets/me/pictures/resolve/"
            hub.break_amid = "amid" in line
            return train(*arguments)

        monkeypatch.setattr(pretrain, "train", train_over_it)
        run = run_pretraining(settings(epochs=2, dataset="me/pictures", output_dir=str(tmp_path / line)))
        assert losses(run) == expected, line
        assert not hub.break_at


@pytest.mark.parametrize("what", ["the Hub", "the right to read"])
def test_a_run_that_loses_its_source_ends_with_clear_words_and_can_be_resumed(
    hub: HubServer,
    data: Path,
    settings: Settings,
    run_pretraining: Train,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
) -> None:
    upload(hub, data, "datasets/me/pictures")
    expected = losses(run_pretraining(settings(epochs=2, output_dir=str(tmp_path / "local"))))
    config = settings(epochs=2, dataset="me/pictures", save_steps=1, stream_timeout=1)

    def save_and_go(run: Run, stopping: bool, at_once: bool = False) -> None:
        save_run(run, stopping, at_once)
        hub.down = what == "the Hub" and run.progress.step >= 3
        hub.token = "another" if what == "the right to read" and run.progress.step >= 3 else TOKEN

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_run", save_and_go)
        with pytest.raises(
            RuntimeError, match="'train' cannot be read any more .*Run the same command again"
        ) as error:
            run_pretraining(config)
    assert TOKEN not in str(error.value)
    hub.down, hub.token = False, TOKEN
    assert 3 <= len(losses(tmp_path / "run")) < 8
    assert losses(run_pretraining(config)) == expected


@pytest.mark.slow
def test_the_token_is_nowhere_after_a_run_from_private_repositories(
    hub: HubServer, data: Path, settings: Settings, run_pretraining: Train, tmp_path: Path
) -> None:
    upload(hub, data, "datasets/me/pictures", private=True)
    save_model(MiclForPreTraining(settings().model_config()), tmp_path / "tiny")
    upload(hub, tmp_path / "tiny", "me/tiny", private=True)
    small = settings(init_from="me/tiny", epochs=1, max_steps=2, warmup_epochs=0, knn_images=8)
    expected = losses(run_pretraining(replace(small, output_dir=str(tmp_path / "local"))))

    config = replace(small, dataset="me/pictures", num_workers=2, report_to="tensorboard")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(config.to_dict()))
    command = [sys.executable, "-m", "training.pretrain", "--config", str(tmp_path / "recipe.yaml")]
    home = tmp_path / "empty"
    done = subprocess.run(command, cwd=ROOT, env=environment(hub, home), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    torch.testing.assert_close(losses(tmp_path / "run"), expected)
    assert (tmp_path / "run" / "checkpoints" / "step-000002").is_dir()
    assert TOKEN not in done.stdout + done.stderr
    assert files_with(TOKEN, tmp_path / "run") + files_with(TOKEN, home) == []


def test_a_commit_that_leaves_the_data_alone_keeps_the_fingerprint(hub: HubServer, data: Path) -> None:
    repository = upload(hub, data, "datasets/me/pictures")
    first = open_source("me/pictures")
    (data / "README.md").write_text("# Pictures")
    upload(hub, data, "datasets/me/pictures")
    described = open_source("me/pictures")
    assert described.fingerprint == first.fingerprint
    assert described.version != first.version

    repository.commits[-1].files["data/train-00001-of-00003.parquet"] = other_pictures(data)
    HfFileSystem.clear_instance_cache()
    assert open_source("me/pictures").lengths == first.lengths
    assert open_source("me/pictures").fingerprint != first.fingerprint


def other_pictures(data: Path) -> bytes:
    """The second shard with its rows the other way round."""
    shard = datasets.Dataset.from_parquet(str(data / "data" / "train-00001-of-00003.parquet"))
    shard.select(range(len(shard) - 1, -1, -1)).to_parquet(data / "other.parquet")
    return (data / "other.parquet").read_bytes()


def test_opening_asks_for_each_shards_length_only(hub: HubServer, write_shards: Write) -> None:
    upload(hub, write_shards(*[3] * 12), "datasets/me/pictures")
    hub.requests.clear()
    assert len(all_rows(open_source("me/pictures"))) == 36
    listings = [each for each in hub.requests if "/tree/" in each or "/paths-info/" in each]
    assert len(listings) < 12, listings


def test_a_loading_script_is_not_run_but_refused(hub: HubServer, data: Path, tmp_path: Path) -> None:
    (data / "pictures.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    upload(hub, data, "datasets/me/pictures")
    with pytest.raises(ValueError, match="--dataset 'me/pictures' .*authors' code.*refs/convert/parquet.*the folder"):
        open_source("me/pictures")
    assert not (tmp_path / "ran").exists()
