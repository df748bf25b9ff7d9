"""Models and datasets come from a loopback Hub, through the unmodified clients and real HTTP."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hub_client import WRONG_TOKEN, environment, files_with, hub_for_this_process, upload
from hub_server import TOKEN, HubServer, Repository
from huggingface_hub import HfApi, constants
from PIL import Image
from transformers import AutoImageProcessor

from modeling_micl import MiclBackbone, MiclForImageClassification, MiclForPreTraining, MiclModel
from modeling_micl.convert_checkpoint import read_model
from modeling_micl.export_vit import export
from training import finetune, knn
from training.classifier_config import FinetuneConfig
from training.config import PretrainConfig
from training.evaluation import load_frozen
from training.knn import KnnConfig
from training.parser import parse_settings
from training.results import save_model
from training.source import open_source
from training.start import read_start


Write = Callable[..., Path]
Settings = Callable[..., PretrainConfig]
ROOT = Path(__file__).parents[2]
# Reads a model in every way that users have, in a process that knows nothing but its name.
USE = """
import sys, torch
from PIL import Image
from modeling_micl import MiclModel
from transformers import AutoBackbone, AutoImageProcessor, AutoModel, pipeline
picture, output = sys.argv[1:]
pixels = AutoImageProcessor.from_pretrained("me/tiny")(Image.open(picture), return_tensors="pt").pixel_values
found = {
    "model": MiclModel.from_pretrained("me/tiny")(pixels).last_hidden_state,
    "auto": AutoModel.from_pretrained("me/tiny")(pixels).last_hidden_state,
    "v1": MiclModel.from_pretrained("me/tiny", revision="v1")(pixels).last_hidden_state,
    "backbone": AutoBackbone.from_pretrained("me/tiny")(pixels).feature_maps[0],
    "classes": pipeline("image-classification", "me/classifier")(Image.open(picture)),
}
torch.save(found, output)
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with hub_for_this_process(tmp_path / "home") as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path, settings: Settings) -> Path:
    """A portable folder of the smallest model that `settings` trains."""
    torch.manual_seed(3)
    save_model(MiclForPreTraining(settings().model_config()), tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def tiny(hub: HubServer, folder: Path) -> Repository:
    """The model on the Hub as me/tiny."""
    return upload(hub, folder, "me/tiny")


def start_from(model: str) -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return read_start(model, PretrainConfig(image_size=[16], patch_size=[4], mask_ratio=0.5, **sizes).model_config())


def converted(model: str) -> Any:
    return read_model(model)


def exported(model: str) -> str:
    with TemporaryDirectory() as folder:
        return export(model, folder, "vit")


READERS = {"--model": load_frozen, "--init_from": start_from, "SOURCE": converted, "MODEL": exported}


@pytest.mark.slow
def test_a_fresh_process_gets_what_the_folder_holds(
    hub: HubServer, tiny: Repository, folder: Path, tmp_path: Path
) -> None:
    HfApi().create_tag("me/tiny", tag="v1")
    old = MiclModel.from_pretrained(folder)
    new = MiclForPreTraining.from_pretrained(folder)
    torch.nn.init.normal_(new.vit.embeddings.cls_token)
    new.save_pretrained(folder)
    upload(hub, folder, "me/tiny")
    classifier = MiclForImageClassification.from_pretrained(folder, num_labels=3)
    save_model(classifier, tmp_path / "classifier")
    upload(hub, tmp_path / "classifier", "me/classifier", private=True)
    Image.effect_mandelbrot((40, 30), (-2, -1, 1, 1), 20).convert("RGB").save(tmp_path / "picture.png")

    command = [sys.executable, "-c", USE, str(tmp_path / "picture.png"), str(tmp_path / "found")]
    home = tmp_path / "empty"
    done = subprocess.run(command, cwd=ROOT, env=environment(hub, home), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert TOKEN not in done.stdout + done.stderr
    assert files_with(TOKEN, home) == []

    found = torch.load(tmp_path / "found")
    processor = AutoImageProcessor.from_pretrained(folder)
    pixels = processor(Image.open(tmp_path / "picture.png"), return_tensors="pt").pixel_values
    expected = new.vit.eval()(pixels).last_hidden_state
    torch.testing.assert_close(found["model"], expected)
    torch.testing.assert_close(found["auto"], expected)
    torch.testing.assert_close(found["v1"], old(pixels).last_hidden_state)
    torch.testing.assert_close(found["backbone"], MiclBackbone.from_pretrained(folder)(pixels).feature_maps[0])
    scores = classifier.eval()(pixels).logits.softmax(-1)[0]
    assert {each["label"]: each["score"] for each in found["classes"]} == pytest.approx(
        {f"LABEL_{label}": float(score) for label, score in enumerate(scores)}, abs=1e-5
    )


@pytest.fixture
def data(write_shards: Write) -> Path:
    """Three shards to learn from, one to evaluate on."""
    write_shards(11, 9, 12)
    return write_shards(16, split="test")


def test_evaluation_and_fine_tuning_take_hub_ids(
    hub: HubServer, tiny: Repository, folder: Path, data: Path, tmp_path: Path, no_accelerator: Callable[[], None]
) -> None:
    upload(hub, data, "datasets/me/pictures")
    small = ["--num_workers", "0", "--features_cache", str(tmp_path / "cache")]
    for model, dataset in ((str(folder), str(data)), ("me/tiny", "me/pictures")):
        flags = ["--model", model, "--dataset", dataset, "--output_dir", str(tmp_path / dataset / "knn"), *small]
        knn.main(parse_settings(KnnConfig, "", flags))
        no_accelerator()
    here, there = (
        [entry["value"] for entry in json.loads((tmp_path / dataset / "knn" / "eval.json").read_text())["results"]]
        for dataset in (str(data), "me/pictures")
    )
    assert here == there

    flags = ["--model", "me/tiny", "--dataset", "me/pictures", "--output_dir", str(tmp_path / "run")]
    flags += ["--num_workers", "0", "--per_device_batch_size", "8", "--max_steps", "1", "--report_to", "none"]
    finetune.main(parse_settings(FinetuneConfig, "", [*flags, "--mixed_precision", "no", "--logging_steps", "1"]))
    assert MiclForImageClassification.from_pretrained(tmp_path / "run" / "model").config.num_labels == 4


PROBLEMS = {  # what is wrong: the token that is used, whether the repository is gated, and what must be said
    "missing": (TOKEN, None, "check the name; if it is private, log in with `hf auth login` or set HF_TOKEN"),
    "private": ("", False, "check the name; if it is private, log in with `hf auth login` or set HF_TOKEN"),
    "gated": (
        TOKEN,
        True,
        "is gated: ask for access at http.*me/it, then log in with `hf auth login` or set HF_TOKEN",
    ),
    "gated and no token": ("", True, "is gated: ask for access at http.*me/it, then log in"),
    "wrong token": (WRONG_TOKEN, False, "the Hub refuses the access token: run `hf auth login`, or correct HF_TOKEN"),
}


@pytest.fixture(params=PROBLEMS)
def problem(request: pytest.FixtureRequest, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """A Hub whose me/it cannot be read, model or dataset; returns the words for it."""
    token, gated, words = PROBLEMS[request.param]
    monkeypatch.setenv("HF_TOKEN", token)
    for name in ("me/it", "datasets/me/it") if gated is not None else ():
        hub.repositories[name] = Repository(private=request.param == "private", gated=gated)
    return words


@pytest.mark.parametrize("option", READERS)
def test_a_model_that_cannot_be_read_tells_why_and_the_remedy(
    problem: str, option: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match=f"^{option} 'me/it' .*{problem}") as error:
        READERS[option]("me/it")
    assert "\n" not in str(error.value)
    said = str(error.value) + "".join(capfd.readouterr()) + caplog.text
    assert TOKEN not in said
    assert WRONG_TOKEN not in said


def test_a_hub_out_of_reach_and_offline_mode_are_told_apart(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)  # between the client's attempts
    hub.shutdown()
    hub.server_close()
    for read, option in ((load_frozen, "--model"), (open_source, "--dataset")):
        with pytest.raises(ValueError, match=f"^{option} 'me/it' .*{hub.url} cannot be reached.*or the connection"):
            read("me/it")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for read, option in ((load_frozen, "--model"), (open_source, "--dataset")):
        with pytest.raises(ValueError, match=f"^{option} 'me/it' .*HF_HUB_OFFLINE is set: unset it"):
            read("me/it")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("runs/photos/modle", "is no local path, .*names are USER/NAME: check the path"),
        (
            "me/it@v1",
            "is no local path, .*: `hf download me/it --type .* --revision v1 --local-dir FOLDER`, then give FOLDER",
        ),
    ],
)
def test_what_is_no_name_on_the_hub_is_not_asked_for_there(hub: HubServer, name: str, words: str) -> None:
    for read, option in ((load_frozen, "--model"), (open_source, "--dataset")):
        with pytest.raises(ValueError, match=f"^{option} '{name}' {words}"):
            read(name)
    assert not hub.requests


@pytest.mark.parametrize("model_type", ["micl", "planted"])
@pytest.mark.parametrize("option", READERS)
def test_code_in_a_models_repository_is_never_run(
    hub: HubServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, model_type: str
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # a user who agrees to everything, but was asked nothing
    config = json.loads((folder / "config.json").read_text())
    classes = {
        "AutoConfig": "planted.PlantedConfig",
        "AutoModel": "planted.Planted",
        "AutoBackbone": "planted.Planted",
    }
    (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type, "auto_map": classes}))
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nclass PlantedConfig: pass\nclass Planted: pass\n"
    (folder / "planted.py").write_text(code)
    upload(hub, folder, "me/tiny")
    for model in ("me/tiny", str(folder)):
        if model_type == "micl" and option != "SOURCE":  # which is a stock ViT
            READERS[option](model)
        else:
            with pytest.raises(ValueError, match=f"{model!r} .*'{model_type}'"):
                READERS[option](model)
    assert not (tmp_path / "ran").exists()


def test_a_dataset_that_cannot_be_read_tells_why_before_anything_is_trained(
    problem: str,
    settings: Settings,
    run_pretraining: Callable[..., Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(
        ValueError, match=f"^--dataset 'me/it' .*{problem.replace('http.*', 'http.*/datasets/')}"
    ) as error:
        run_pretraining(settings(dataset="me/it"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
    said = str(error.value) + "".join(capfd.readouterr()) + caplog.text
    assert WRONG_TOKEN not in said
    assert TOKEN not in said


@pytest.mark.slow
def test_the_command_says_it_in_one_line_and_keeps_a_refused_token_to_itself(hub: HubServer, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "training.pretrain", "--dataset", "me/it", "--output_dir", str(tmp_path / "run")]
    command += ["--mixed_precision", "no", "--report_to", "none"]
    home = tmp_path / "empty"
    done = subprocess.run(command, cwd=ROOT, env=environment(hub, home, WRONG_TOKEN), capture_output=True, text=True)
    assert done.returncode == 1
    assert "training.pretrain: --dataset 'me/it' cannot be read, as the Hub refuses the access token" in done.stderr
    assert "Traceback" not in done.stderr
    assert WRONG_TOKEN not in done.stdout + done.stderr
    assert not [path for path in home.rglob("*") if path.is_file() and WRONG_TOKEN.encode() in path.read_bytes()]
    assert not (tmp_path / "run").exists()
