"""The code in a MiCL folder, where this package is: it is written as a whole, and never run."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from auto_answers import AUTO_CLASSES
from stored_models import PHOTOS, plant, values
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
