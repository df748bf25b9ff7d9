"""A MiCL folder brings its code along: it is run for those who lack this package and say so, and for nobody else."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import auto_answers
import pytest
import torch
from auto_answers import AUTO_CLASSES, Request, answers
from hub_server import Commit, Repository, serve_hub
from PIL import Image
from stored_models import HEADS, PHOTOS, PROCESSOR
from torch import Tensor
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    ViTConfig,
    ViTModel,
    pipeline,
)
from transformers.dynamic_module_utils import get_relative_import_files

import modeling_micl
from modeling_micl import (
    MiclBackbone,
    MiclConfig,
    MiclForImageClassification,
    MiclForPreTraining,
    MiclModel,
    MiclPreTrainedModel,
)
from modeling_micl.remote_code import AUTO_MAP, REMOTE_FILES, add_remote_code


Model = Callable[..., MiclPreTrainedModel]
Store = Callable[..., Path]
PACKAGE = Path(modeling_micl.__file__).parent
KINDS = [*HEADS, "model", "backbone"]
NOISE = torch.rand(2, 16, generator=torch.Generator().manual_seed(3))
STAGES = ["stem", "stage1", "stage2"]


def values(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def plant(folder: Path) -> Path:
    """Have every file of code in a folder write a marker when it is run."""
    marker = folder / "MARKER"
    for name in REMOTE_FILES:
        file = folder / name
        file.write_text(f"{file.read_text()}\n\nopen({str(marker)!r}, 'w').close()\n")
    return marker


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


# Where this package is


def test_the_code_is_complete_and_names_the_classes_that_this_package_registers() -> None:
    needed = get_relative_import_files(PACKAGE / "modeling_micl.py")
    assert sorted(REMOTE_FILES) == sorted({"modeling_micl.py", *(Path(path).name for path in needed)})
    wanted = set(re.findall(r"^(\w+)\.register\(", (PACKAGE / "__init__.py").read_text(), re.MULTILINE))
    assert wanted - {"AutoImageProcessor"} == AUTO_MAP.keys()
    registered: dict[str, type] = {
        auto.__name__: auto._model_mapping[MiclConfig] for auto in (*AUTO_CLASSES, AutoBackbone)
    }
    registered["AutoConfig"] = type(AutoConfig.for_model("micl"))
    assert {auto: f"modeling_micl.{name}" for auto, name in AUTO_MAP.items()} == {
        auto: f"{kind.__module__}.{kind.__name__}" for auto, kind in registered.items()
    }


@pytest.mark.parametrize("options", [{}, {"trust_remote_code": True}, {"trust_remote_code": False}], ids=str)
def test_this_packages_own_code_wins_without_a_question(
    options: dict[str, bool], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = store("cls")
    add_remote_code(folder)
    marker = plant(folder)
    questions: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question: questions.append(question) or "y")
    config = AutoConfig.from_pretrained(folder, **options)
    assert type(config) is MiclConfig
    expected = (MiclModel, MiclForPreTraining, MiclForImageClassification)
    for auto, model_class in zip(AUTO_CLASSES, expected, strict=True):
        assert type(auto.from_pretrained(folder, **options)) is model_class
        assert type(auto.from_config(config, **options)) is model_class
    assert type(AutoBackbone.from_config(config, **options)) is MiclBackbone
    AutoImageProcessor.from_pretrained(folder, **options)
    assert pipeline("image-classification", model=str(folder), **options)(str(PHOTOS[1]))
    pipeline("image-feature-extraction", model=str(folder), **options)(str(PHOTOS[1]))
    assert not marker.exists()
    assert questions == []


def test_stock_vit_still_loads_the_folder(store: Store, photos: Tensor) -> None:
    folder = store("encoder")
    add_remote_code(folder)
    marker = plant(folder)
    stock, info = ViTModel.from_pretrained(folder, add_pooling_layer=False, output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        expected = AutoModel.from_pretrained(folder)(photos).last_hidden_state
        assert torch.equal(stock(photos).last_hidden_state, expected)
    assert not marker.exists()


def test_of_config_json_only_auto_map_changes_and_foreign_code_is_no_longer_named(store: Store) -> None:
    labels = {number: f"Käse {number}" for number in range(12)}  # as strings, 10 would come before 2
    folder = store("mean", id2label=labels, label2id={name: number for number, name in labels.items()})
    before = values(folder)
    foreign = {"AutoImageProcessor": "someone/else--processing.Processor", "AutoModel": "someone/else--modeling.Model"}
    (folder / "config.json").write_text(json.dumps(before | {"auto_map": foreign}))
    add_remote_code(folder)
    after, text = values(folder), (folder / "config.json").read_text()
    assert after["auto_map"] == AUTO_MAP
    assert json.dumps(after | {"auto_map": {}}) == json.dumps(before | {"auto_map": {}})
    add_remote_code(folder)
    assert (folder / "config.json").read_text() == text
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_older_code_in_the_folder_is_replaced_without_touching_what_it_links_to(store: Store) -> None:
    folder = store("encoder")
    cached = folder / "blob"
    cached.write_text("older = True\n")
    for name in REMOTE_FILES:
        (folder / name).unlink()
        (folder / name).symlink_to(cached)  # as in the Hub's cache
    add_remote_code(folder)
    assert all((folder / name).read_bytes() == (PACKAGE / name).read_bytes() for name in REMOTE_FILES)
    assert cached.read_text() == "older = True\n"


@pytest.mark.parametrize("crash_at", range(len(REMOTE_FILES) + 1))
def test_a_crash_never_leaves_a_config_that_names_missing_or_half_written_code(
    crash_at: int, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = store("encoder")
    for name in REMOTE_FILES:
        (folder / name).unlink()
    before, write, left = (folder / "config.json").read_text(), Path.write_bytes, iter(range(10))

    def crash(self: Path, content: bytes) -> int:
        if next(left) < crash_at:
            return write(self, content)
        write(self, content[: len(content) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", crash)
    with pytest.raises(KeyboardInterrupt):
        add_remote_code(folder)
    assert (folder / "config.json").read_text() == before
    there = [name for name in REMOTE_FILES if (folder / name).exists()]
    assert there == list(REMOTE_FILES[:crash_at])
    assert all((folder / name).read_bytes() == (PACKAGE / name).read_bytes() for name in there)


def test_a_folder_that_is_no_micl_model_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no config.json with model_type='micl'"):
        add_remote_code(tmp_path)
    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{str(tmp_path)!r} has no config.json with model_type='micl': give"):
        add_remote_code(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("model_class", "auto"),
    [
        (MiclModel, AutoModel),
        (MiclForPreTraining, AutoModelForPreTraining),
        (MiclForImageClassification, AutoModelForImageClassification),
        (MiclBackbone, AutoBackbone),
    ],
)
def test_saving_alone_brings_the_code_for_the_saved_class(
    model_class: type[MiclPreTrainedModel], auto: type, tiny_model: Model, tmp_path: Path
) -> None:
    tiny_model(model_class).save_pretrained(tmp_path)
    assert values(tmp_path)["auto_map"] == {name: AUTO_MAP[name] for name in ("AutoConfig", auto.__name__)}
    assert all((tmp_path / name).read_bytes() == (PACKAGE / name).read_bytes() for name in REMOTE_FILES)


@pytest.mark.parametrize("model_class", [MiclModel, MiclForPreTraining, MiclForImageClassification, MiclBackbone])
def test_a_complete_folder_saved_again_by_this_package_stays_complete(
    model_class: type[MiclPreTrainedModel], store: Store, tmp_path: Path
) -> None:
    folder = store("encoder")
    add_remote_code(folder)
    model_class.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert values(tmp_path / "again")["auto_map"] == AUTO_MAP
    assert all((tmp_path / "again" / name).exists() for name in REMOTE_FILES)
