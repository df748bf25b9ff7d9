"""What is not published, and why."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_publish
from hub_server import TOKEN, HubServer

from training.results import add_results


Publish = Callable[..., str]
folder, run = test_publish.folder, test_publish.run
ENTRY = test_publish.ENTRY


def change_config(folder: Path, **entries: Any) -> None:
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | entries))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: os.truncate(folder / "model.safetensors", 20_000), "weights cannot be read"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "model.bin"), "no model.safetensors"),
        (lambda folder: change_config(folder, num_hidden_layers=3), "lacks weights"),
        (lambda folder: change_config(folder, model_type="vit"), "'vit' model"),
        (lambda folder: (folder / "config.json").write_text("{"), "config"),
        (lambda folder: (folder / "config.json").unlink(), "no model: it has no config.json"),
        (lambda folder: (folder / "preprocessor_config.json").write_text("{"), "preprocessor_config.json cannot"),
        (lambda folder: (folder / "eval.json").write_text('{"results": ['), "eval.json is broken"),
        (lambda folder: (folder / "eval.json").write_text('{"results": [{"value": "x"}]}'), "eval.json is broken"),
        (lambda folder: add_results(folder, [{"value": 0.5}]), "entry of eval.json lacks 'dataset'"),
        (
            lambda folder: add_results(folder, [ENTRY | {"command": TOKEN}]),
            "eval.json holds.*access token",
        ),
        (
            lambda folder: (folder / "README.md").write_text(f"<!-- notes -->\n{TOKEN}<!-- end of notes -->"),
            "README.md",
        ),
        (lambda folder: change_config(folder, note=TOKEN), "config.json holds.*access token"),
    ],
)
def test_a_folder_that_others_could_not_use_is_refused_before_anything_is_sent(
    hub: HubServer, run: Publish, folder: Path, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(folder)
    with pytest.raises((ValueError, RuntimeError), match=message) as error:
        run()
    assert TOKEN not in str(error.value)
    assert not hub.requests


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "nowhere"], "model='nowhere' is no folder"),
        (["--repo", "tiny"], "repo='tiny' is no place on the Hub: write --repo USER/NAME"),
        (["--repo", "me/ti ny"], "repo='me/ti ny' is no place on the Hub"),
    ],
)
def test_impossible_settings_are_named(
    run: Publish, capfd: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        run(*flags)
    assert message in capfd.readouterr().err
