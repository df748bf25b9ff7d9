"""A MiCL folder brings its code along: it is run for those who lack this package and say so, and for nobody else."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import auto_answers
import pytest
import torch
from auto_answers import AUTO_CLASSES, Request, answers
from hub_server import Commit, Repository, serve_hub
from PIL import Image
from stored_models import HEADS, PHOTOS, PROCESSOR, plant, values

import modeling_micl
from modeling_micl import (
    MiclBackbone,
    MiclConfig,
    MiclForImageClassification,
    MiclModel,
)
from modeling_micl.remote_code import AUTO_MAP, REMOTE_FILES, add_remote_code


PACKAGE = Path(modeling_micl.__file__).parent
KINDS = [*HEADS, "model", "backbone"]
NOISE = torch.rand(2, 16, generator=torch.Generator().manual_seed(3))
STAGES = ["stem", "stage1", "stage2"]


# In a process without this package


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("remote")


@pytest.fixture(scope="module")
def folders(place: Path) -> dict[str, Path]:
    """A folder of each class and pooling, with code."""
    found = {}
    for kind in KINDS:
        model_class, options = HEADS.get(kind, (MiclModel if kind == "model" else MiclBackbone, {}))
        torch.manual_seed(7)
        geometry = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        model = model_class(MiclConfig(**geometry, image_size=32, patch_size=8, mask_ratio=0.5, **options))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        found[kind] = place / kind
        model.save_pretrained(found[kind])
        PROCESSOR.save_pretrained(found[kind])
        add_remote_code(found[kind])
    return found


@pytest.fixture(scope="module")
def elsewhere(place: Path, folders: dict[str, Path]) -> dict[str, Any]:
    """What a fresh process without this package finds, in local folders and in one repository of a loopback Hub."""
    planted = place / "planted"
    MiclForImageClassification.from_pretrained(folders["cls"]).save_pretrained(planted)
    plant(planted)
    sources = {kind: str(folder) for kind, folder in folders.items()}
    request = Request(sources, "me/micl-tiny", str(PHOTOS[0]), NOISE, str(planted), str(place / "resaved"))
    torch.save(request.__dict__, place / "request")
    with serve_hub() as hub:
        files = {path.name: path.read_bytes() for path in folders["encoder"].iterdir()}
        hub.repositories["me/micl-tiny"] = Repository(private=False, commits=[Commit(files, [])])
        settings = {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
        }
        settings |= {"HF_HOME": str(place / "hf"), "HF_MODULES_CACHE": str(place / "modules")}
        done = subprocess.run(
            [sys.executable, "-I", auto_answers.__file__, str(place / "request"), str(place / "answers")],
            cwd=place,
            env=os.environ | settings,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = torch.load(place / "answers")
    return found


def test_nothing_of_a_folder_is_run_unless_the_user_trusts_it(elsewhere: dict[str, Any]) -> None:
    assert len(elsewhere["refusals"]) == 9
    assert all("trust_remote_code=True" in said for said in elsewhere["refusals"])
    assert not elsewhere["ran without trust"]
    assert elsewhere["ran with trust"]  # the marker does tell


@pytest.mark.parametrize("kind", [*KINDS, "hub"])
def test_every_auto_class_gives_the_same_from_every_folder_without_this_package(
    kind: str, elsewhere: dict[str, Any], folders: dict[str, Path]
) -> None:
    theirs = dict(elsewhere[kind])
    ours = answers(str(folders["encoder" if kind == "hub" else kind]), str(PHOTOS[0]), NOISE)
    assert {name.split(".")[0] for name in ours.pop("module").values()} == {"modeling_micl"}
    assert {name.split(".")[0] for name in theirs.pop("module").values()} == {"transformers_modules"}
    maps = theirs.pop("feature maps", ())
    assert len(maps) == (3 if kind == "hub" else 0)
    assert "pipeline" not in ours or {each["label"] for each in ours["pipeline"]} == {"cat", "rocket", "coffee", "owl"}
    assert ours.keys() >= {"from scratch", "missing", *(auto.__name__ for auto in AUTO_CLASSES)}
    assert ours["AutoModelForPreTraining"]["loss"].isfinite()
    assert ("pipeline" in ours) == (kind in ("cls", "mean"))
    torch.testing.assert_close(_numbers(theirs), _numbers(ours), rtol=0, atol=1e-6)


def _numbers(found: dict[str, Any]) -> dict[str, Any]:
    """Strings out of the way of `assert_close`, but not out of the comparison."""
    pipeline_ = {each["label"]: each["score"] for each in found.get("pipeline", [])}
    missing = {f"{auto} {name}": 0 for auto, names in found["missing"].items() for name in names}
    return found | {"pipeline": pipeline_, "missing": missing}


def test_auto_backbone_gives_the_same_feature_maps_from_the_hub(
    elsewhere: dict[str, Any], folders: dict[str, Path]
) -> None:
    pixel_values = PROCESSOR(Image.open(PHOTOS[0]), return_tensors="pt").pixel_values
    backbone = MiclBackbone.from_pretrained(folders["encoder"], out_features=STAGES)
    with torch.no_grad():
        expected = backbone(pixel_values).feature_maps
    torch.testing.assert_close(elsewhere["hub"]["feature maps"], expected, rtol=0, atol=1e-6)


def test_models_from_scratch_have_the_released_initialisation(elsewhere: dict[str, Any]) -> None:
    weights = elsewhere["encoder"]["from scratch"]
    xavier = (6 / (4 * 32)) ** 0.5
    attention = torch.cat([weights[name].flatten() for name in weights if name.endswith("q_proj.weight")])
    assert 0.98 * xavier < attention.abs().max() <= xavier
    assert not any(weights[name].any() for name in weights if name.endswith("q_proj.bias"))
    assert weights["vit.embeddings.position_embeddings"][0, 1:].any()


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("kind", [*KINDS, "hub"])
def test_the_code_survives_saving_again_without_this_package(kind: str, place: Path) -> None:
    saved = sorted((place / "resaved" / kind).iterdir())
    assert len(saved) == len(AUTO_CLASSES) + (kind == "hub")
    for folder in saved:
        assert values(folder)["auto_map"] == AUTO_MAP
        assert values(folder)["architectures"] == [AUTO_MAP[folder.name].split(".")[1]]
        for name in REMOTE_FILES:
            assert (folder / name).read_bytes() == (PACKAGE / name).read_bytes()
