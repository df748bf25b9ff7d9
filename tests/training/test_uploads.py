"""Runs that send their model to the Hub themselves, through real HTTP to a loopback Hub."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_server import TOKEN, HubServer, Repository

from training import uploads
from training.classifier_config import ProbeConfig
from training.config import PretrainConfig
from training.log_files import read_metrics
from training.uploads import Uploads


Write = Callable[..., Path]
Settings = Callable[..., PretrainConfig]
Train = Callable[..., Path]
PUSH = {"push_to_hub": "me/tiny", "max_steps": 4, "save_steps": 2}


def published(hub: HubServer) -> list[int]:
    """The optimiser step of the model in each commit."""
    return [
        json.loads(commit.files["eval.json"])["training"]["progress"]["step"]
        for commit in hub.repositories["me/tiny"].commits[1:]
    ]


def test_the_finished_model_is_sent_with_its_card(
    hub: HubServer, write_shards: Write, settings: Settings, run_pretraining: Train, capfd: pytest.CaptureFixture[str]
) -> None:
    write_shards(40)
    run = run_pretraining(settings(**PUSH))
    assert published(hub) == [4]
    files = hub.repositories["me/tiny"].commits[-1].files
    assert files["model.safetensors"] == (run / "model" / "model.safetensors").read_bytes()
    assert b'from_pretrained("me/tiny")' in files["README.md"]
    printed = "".join(capfd.readouterr())
    assert "on the Hub: me/tiny" in printed
    assert TOKEN not in printed
    run_pretraining(settings(**PUSH))  # finished already
    assert published(hub) == [4]


def test_the_model_of_every_checkpoint_is_sent(
    hub: HubServer, write_shards: Write, settings: Settings, run_pretraining: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(40)
    send = Uploads.send_checkpoint

    def send_and_wait(self: Uploads, write: Callable[[], Path]) -> None:
        send(self, write)
        assert self.on_the_way is not None
        self.on_the_way.result()

    monkeypatch.setattr(Uploads, "send_checkpoint", send_and_wait)
    run_pretraining(settings(**PUSH, push_checkpoints=True, push_private=True))
    assert published(hub) == [2, 4]
    assert hub.repositories["me/tiny"].private
    assert "2 optimiser steps, 0.4 epochs" in hub.repositories["me/tiny"].commits[1].files["README.md"].decode()
    assert "so far, of 4 steps" in hub.repositories["me/tiny"].commits[1].files["README.md"].decode()


def test_a_checkpoint_is_left_out_while_the_one_before_is_on_its_way(
    hub: HubServer, write_shards: Write, settings: Settings, run_pretraining: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(40)
    slow = uploads.upload
    monkeypatch.setattr(uploads, "upload", lambda *args: time.sleep(2) or slow(*args))
    run_pretraining(settings(**PUSH | {"save_steps": 1}, push_checkpoints=True))
    steps = published(hub)
    assert steps[0] == 1
    assert steps[-1] == 4
    assert len(steps) < 4


def test_a_checkpoint_that_cannot_be_sent_does_not_end_the_run(
    hub: HubServer, write_shards: Write, settings: Settings, run_pretraining: Train, capfd: pytest.CaptureFixture[str]
) -> None:
    write_shards(40)
    hub.break_at = "GET /api/models/me/tiny/refs"
    run = run_pretraining(settings(**PUSH, push_checkpoints=True))
    assert "this checkpoint's model is not on the Hub, and training goes on: the connection broke" in (
        "".join(capfd.readouterr())
    )
    assert read_metrics(run / "metrics.jsonl")[-1]["step"] == 4
    assert published(hub)[-1] == 4


@pytest.mark.parametrize(("token", "message"), [("hf_wrong", r"\(401\).*hf auth login"), ("", "no access token")])
def test_a_wrong_token_ends_the_run_before_it_begins(
    hub: HubServer,
    settings: Settings,
    run_pretraining: Train,
    monkeypatch: pytest.MonkeyPatch,
    token: str,
    message: str,
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    config = settings(**PUSH, dataset="never opened")
    with pytest.raises((ValueError, RuntimeError), match=message):
        run_pretraining(config)
    assert not (Path(config.output_dir) / "metrics.jsonl").exists()


def test_a_model_that_is_not_to_be_public_is_not_trained_for_a_public_repository(
    hub: HubServer, settings: Settings, run_pretraining: Train
) -> None:
    hub.repositories["me/tiny"] = Repository(private=False)
    with pytest.raises(ValueError, match="me/tiny exists and is public"):
        run_pretraining(settings(**PUSH, push_private=True, dataset="never opened"))


def test_what_could_not_be_sent_at_the_end_is_safe_and_the_command_is_named(
    hub: HubServer, write_shards: Write, settings: Settings, run_pretraining: Train
) -> None:
    write_shards(40)
    config = settings(**PUSH)
    hub.break_at = "POST /api/models/me/tiny/commit/"
    command = f"python -m training.publish --model {config.output_dir}/model --repo me/tiny"
    with pytest.raises(RuntimeError, match=f"is safe in .*{command}"):
        run_pretraining(config)
    assert (Path(config.output_dir) / "model" / "README.md").exists()
    run_pretraining(config)  # the same command again
    assert published(hub) == [4]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"push_to_hub": "tiny"}, "push_to_hub='tiny' is no place on the Hub: write USER/NAME"),
        ({"push_checkpoints": True}, "go with push_to_hub"),
        ({"push_private": True}, "go with push_to_hub"),
    ],
)
def test_impossible_settings_are_named(wrong: dict[str, object], message: str, settings: Settings) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**wrong).validate()
    with pytest.raises(ValueError, match=r"publish a probe with training\.publish"):
        ProbeConfig(model="runs/photos/model", push_to_hub="me/tiny").validate()
