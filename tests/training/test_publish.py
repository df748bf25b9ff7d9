"""Publishing through real HTTP: the unmodified client against a loopback Hub."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hub_server import TOKEN, HubServer, Repository
from huggingface_hub import HfApi, constants
from PIL import Image

from modeling_micl import MiclForPreTraining, MiclModel, MiclPreTrainedModel
from modeling_micl.remote_code import REMOTE_FILES
from training import publish
from training.card import write_card
from training.hub import files_to_publish
from training.parser import parse_settings
from training.publish import PublishConfig
from training.results import add_results, save_model


Publish = Callable[..., str]
ROOT = Path(__file__).parents[2]
ENTRY = {
    **{"task": "image-classification", "protocol": "kNN", "metric": "top-1 accuracy", "value": 0.5, "seed": 0},
    **{"dataset": "pictures", "dataset_config": None, "split": "test", "num_test_images": 8},
}
PORTABLE = {"README.md", "config.json", "eval.json", "preprocessor_config.json", "model.safetensors", *REMOTE_FILES}


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Callable[..., MiclPreTrainedModel]) -> Path:
    """A run's model folder, with a figure of the run beside it."""
    folder = tmp_path / "run" / "model"
    save_model(tiny_model(MiclForPreTraining), folder)
    write_card(folder, "tiny")
    (tmp_path / "run" / "figures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "run" / "figures" / "views.png")
    return folder


@pytest.fixture
def run(folder: Path, capfd: pytest.CaptureFixture[str]) -> Publish:
    """Publish to me/tiny in this process with these flags; returns what is printed on both streams."""

    def run(*flags: str) -> str:
        capfd.readouterr()
        publish.main(parse_settings(PublishConfig, "", ["--model", str(folder), "--repo", "me/tiny", *flags]))
        printed = "".join(capfd.readouterr())
        assert TOKEN not in printed
        return printed

    return run


def tiny(hub: HubServer) -> Repository:
    return hub.repositories["me/tiny"]


def commits(hub: HubServer) -> list[list[str]]:  # the files of each but the initial one
    return [commit.changed for commit in tiny(hub).commits[1:]]


@pytest.mark.slow
def test_a_published_model_gives_the_same_features_in_a_fresh_process(
    hub: HubServer, folder: Path, tmp_path: Path, pixel_values: torch.Tensor
) -> None:
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
    environment = os.environ | settings | {"HF_HOME": str(tmp_path / "empty")}

    def python(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        assert TOKEN not in done.stdout + done.stderr
        return done.stdout

    printed = python("-m", "training.publish", "--model", str(folder), "--repo", "me/tiny", "--tag", "v1")
    assert tiny(hub).commits[-1].oid in printed
    torch.save(pixel_values, tmp_path / "pixels")
    python(
        "-c",
        "import torch; from modeling_micl import MiclModel; from transformers import AutoImageProcessor\n"
        "model = MiclModel.from_pretrained('me/tiny', revision='v1')\n"
        "AutoImageProcessor.from_pretrained('me/tiny')\n"
        f"features = model(torch.load({str(tmp_path / 'pixels')!r})).last_hidden_state\n"
        f"torch.save(features.detach(), {str(tmp_path / 'features')!r})",
    )
    expected = MiclModel.from_pretrained(folder)(pixel_values).last_hidden_state
    torch.testing.assert_close(torch.load(tmp_path / "features"), expected)


def test_all_files_go_up_unchanged_in_one_commit(hub: HubServer, run: Publish, folder: Path) -> None:
    printed = run()
    assert commits(hub) == [sorted(PORTABLE | {"figures/views.png"})]
    published = tiny(hub).at("main")
    assert published is not None
    assert all(published.files[name] == (folder / name).read_bytes() for name in PORTABLE)
    assert 'MiclModel.from_pretrained("me/tiny")' in published.files["README.md"].decode()
    assert published.oid in printed


def test_a_dry_run_writes_the_card_and_sends_nothing(
    hub: HubServer, run: Publish, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert "dry run" in run("--dry_run", "--license", "cc-by-4.0")
    assert not hub.requests
    assert "\nlicense: cc-by-4.0\n" in (folder / "README.md").read_text()


def test_a_model_of_which_nothing_is_recorded_says_so(hub: HubServer, run: Publish, folder: Path) -> None:
    (folder / "eval.json").unlink()  # as after modeling_micl.convert_checkpoint
    run()
    published = tiny(hub).at("main")
    assert published is not None
    assert json.loads(published.files["eval.json"]) == {"results": []}
    assert b"How these weights came about is not recorded." in published.files["README.md"]


def test_absolute_paths_stay_at_home(hub: HubServer, run: Publish, folder: Path) -> None:
    add_results(
        folder, [ENTRY | {"dataset": "/home/me/secret/pictures", "command": "knn --dataset=/home/me/secret/p"}]
    )
    run()
    published = tiny(hub).at("main")
    assert published is not None
    assert all(b"secret" not in content for content in published.files.values())
    entry = json.loads(published.files["eval.json"])["results"][0]
    assert (entry["dataset"], entry["command"]) == ("…/pictures", "knn --dataset=…/p")
    assert "/home/me/secret/pictures" in (folder / "eval.json").read_text()  # to go on with


def test_publishing_twice_makes_one_commit(hub: HubServer, run: Publish) -> None:
    run("--tag", "v1")
    assert "nothing changed" in run("--tag", "v1")
    assert len(commits(hub)) == 1
    assert len(hub.uploads()) == 2  # weights and figure


def test_only_what_changed_is_sent(hub: HubServer, run: Publish, folder: Path) -> None:
    run()
    add_results(folder, [ENTRY])
    run()
    assert commits(hub)[1:] == [["README.md", "eval.json"]]
    assert len(hub.uploads()) == 2  # of the first time


def test_the_client_itself_sends_weights_again_whose_upload_broke_off(hub: HubServer, run: Publish) -> None:
    hub.break_at = "PUT /lfs/"
    run()
    assert (hub.break_at, len(commits(hub))) == ("", 1)


@pytest.mark.parametrize("request_", ["repos/create", "/refs", "/preupload/", "/commit/", "/tag/"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_run_whose_connection_broke_is_repeated(hub: HubServer, run: Publish, request_: str, after: bool) -> None:
    hub.break_at, hub.break_after = request_, after
    if request_ == "/preupload/":  # the client itself tries again
        run("--tag", "v1")
    else:
        with pytest.raises(RuntimeError, match="run the same command again") as error:
            run("--tag", "v1")
        assert TOKEN not in str(error.value)
    assert not hub.break_at
    run("--tag", "v1")
    assert len(commits(hub)) == 1
    assert len(hub.uploads()) == 2
    assert tiny(hub).tags == {"v1": tiny(hub).commits[-1].oid}


def test_a_server_that_is_gone_is_reported_as_such(hub: HubServer, run: Publish) -> None:
    hub.shutdown()
    hub.server_close()
    with pytest.raises(RuntimeError, match="connection broke.*run the same command again"):
        run()


def test_a_wrong_token_is_refused_and_never_repeated(hub: HubServer, run: Publish) -> None:
    hub.token = "hf_other"
    with pytest.raises(RuntimeError, match=r"\(401\).*hf auth login.*TOKEN") as error:
        run()
    assert TOKEN not in str(error.value)
    assert not hub.repositories


@pytest.mark.parametrize(
    ("token", "message"),
    [("", "no access token.*hf auth login.*HF_TOKEN"), (f"{TOKEN}\t{TOKEN}", "characters that no token has")],
)
def test_without_a_usable_token_nothing_is_sent(
    hub: HubServer, run: Publish, monkeypatch: pytest.MonkeyPatch, token: str, message: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ValueError, match=message) as error:
        run()
    assert TOKEN not in str(error.value)
    assert not hub.requests


@pytest.mark.parametrize("exists", [False, True])
def test_a_token_that_may_not_write_is_refused(hub: HubServer, run: Publish, exists: bool) -> None:
    if exists:
        hub.repositories["me/tiny"] = Repository(private=False)
    hub.may_write = False
    with pytest.raises(RuntimeError, match=r"\(403\).*may not write to me/tiny.*write permission"):
        run()
    assert not hub.uploads()


def test_offline_mode_is_named(hub: HubServer, run: Publish, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RuntimeError, match="unset it to publish"):
        run()


def test_a_new_repository_is_as_private_as_asked_for(hub: HubServer, run: Publish) -> None:
    for _ in range(2):
        run("--private")
        assert tiny(hub).private
    run("--repo", "me/open")
    assert not hub.repositories["me/open"].private


def test_what_is_to_be_private_does_not_go_to_a_public_repository(hub: HubServer, run: Publish) -> None:
    hub.repositories["me/tiny"] = Repository(private=False)
    with pytest.raises(ValueError, match="me/tiny exists and is public.*hf repos settings me/tiny --private"):
        run("--private")
    assert commits(hub) == []


def test_a_branch_gets_the_commit_and_main_stays(hub: HubServer, run: Publish) -> None:
    hub.repositories["me/tiny"] = Repository(private=False)
    with pytest.raises(ValueError, match=r"no branch 'long' \(it has main\).*hf repos branch create me/tiny long"):
        run("--revision", "long")
    assert not hub.uploads()
    HfApi(token=TOKEN).create_branch("me/tiny", branch="long")
    run("--revision", "long")
    assert tiny(hub).branches == {"main": tiny(hub).commits[0].oid, "long": tiny(hub).commits[1].oid}


def test_a_tag_never_moves(hub: HubServer, run: Publish, folder: Path) -> None:
    run("--tag", "v1")
    first = tiny(hub).commits[-1].oid
    for seed in range(2):  # at first the tag is at the head of main, so that only the commit shows that it must move
        add_results(folder, [ENTRY | {"seed": seed}])
        with pytest.raises(ValueError, match="tag='v1' names commit.*another --tag"):
            run("--tag", "v1")
    assert len(commits(hub)) == 2
    run("--tag", "v2")
    assert tiny(hub).tags == {"v1": first, "v2": tiny(hub).commits[-1].oid}
    assert tiny(hub).commits[-1].oid != first


def test_pickles_and_whatever_else_lies_there_stay_and_are_named(hub: HubServer, run: Publish, folder: Path) -> None:
    others = ["a.pt", "b.pth", "c.ckpt", "notes.txt", "pytorch_model.bin", "random_states_0.pkl", ".env"]
    for name in others:
        (folder / name).write_text(name)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "model.safetensors").write_text("")
    (folder.parent / "figures" / "views.pkl").write_text("")
    printed = run()
    assert commits(hub) == [sorted(PORTABLE | {"figures/views.png"})]
    assert [name for name in [*others, "checkpoints"] if name not in printed] == []


def test_weights_in_several_files_go_up_with_their_index(hub: HubServer, run: Publish, folder: Path) -> None:
    model = MiclForPreTraining.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="50KB")
    weights = {path.name for path in folder.glob("model*")}
    assert len(weights) > 2
    run()
    assert {name for name in commits(hub)[0] if name.startswith("model")} == weights


def test_figures_of_the_model_win_over_the_runs_and_unrelated_ones_stay(folder: Path) -> None:
    (folder / "figures").mkdir()
    for name in ("views.png", "occlusion.png"):
        Image.new("RGB", (4, 4)).save(folder / "figures" / name)
    beside = folder.parent / "figures"
    Image.new("RGB", (8, 8)).save(beside / "curves.png")

    def figures(folder: Path) -> dict[str, Path]:
        return {name: path.parent for name, path in files_to_publish(folder).items() if name.startswith("figures/")}

    own = dict.fromkeys(("figures/views.png", "figures/occlusion.png"), folder / "figures")
    assert figures(folder) == own | {"figures/curves.png": beside}
    assert set(figures(folder.rename(folder.parent / "downloaded"))) == set(own)
