"""A model folder and its eval.json."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import ViTForImageClassification, ViTModel

from modeling_micl import MiclForImageClassification, MiclForPreTraining, MiclPreTrainedModel
from modeling_micl.remote_code import AUTO_MAP, REMOTE_FILES
from training.config import DataSettings
from training.results import add_results, result, save_model, table
from training.source import open_source


Write = Callable[..., Path]
Entry = dict[str, Any]


def entry(value: float, **differing: Any) -> Entry:
    """A measurement; the value, where and with what it was measured do not tell it from others."""
    facts = {"protocol": "kNN", "dataset": "pictures", "seed": 0, "label_share": 1.0, "features": "cls"}
    measured = {"value": value, "command": f"try {value}", "hardware": {"cpu": value}, "versions": {"torch": value}}
    return facts | measured | {"details": {"rate": value}} | differing


def held(folder: Path) -> list[Entry]:
    entries: list[Entry] = json.loads((folder / "eval.json").read_text())["results"]
    return entries


# eval.json


def test_the_first_results_make_the_folder_and_the_file(tmp_path: Path) -> None:
    folder = tmp_path / "some" / "where"
    add_results(folder, [entry(0.5)])
    assert held(folder) == [entry(0.5)]
    assert [path.name for path in folder.iterdir()] == ["eval.json"]


def test_no_results_change_nothing(tmp_path: Path) -> None:
    add_results(tmp_path, [])
    assert held(tmp_path) == []
    add_results(tmp_path, [entry(0.5)])
    add_results(tmp_path, [])
    assert held(tmp_path) == [entry(0.5)]


def test_a_measurement_takes_the_place_of_an_older_one_of_the_same_thing(tmp_path: Path) -> None:
    add_results(tmp_path, [entry(0.5), entry(0.6, seed=1)])
    add_results(tmp_path, [entry(0.7)])
    assert held(tmp_path) == [entry(0.6, seed=1), entry(0.7)]
    add_results(tmp_path, [entry(0.7)])
    assert held(tmp_path) == [entry(0.6, seed=1), entry(0.7)]


@pytest.mark.parametrize(
    "differing",
    [
        *({"protocol": "probe"}, {"dataset": "others"}, {"seed": 1}, {"label_share": 0.1}),
        *({"features": "mean"}, {"task": "segmentation"}, {"corruption": "fog"}),
    ],
    ids=str,
)
def test_other_measurements_are_kept_beside_it(differing: Entry, tmp_path: Path) -> None:
    add_results(tmp_path, [entry(0.5)])
    add_results(tmp_path, [entry(0.5, **differing)])
    assert held(tmp_path) == [entry(0.5), entry(0.5, **differing)]


def test_numbers_that_json_changes_still_tell_the_same_thing(tmp_path: Path) -> None:
    for _ in range(2):
        add_results(tmp_path, [entry(0.5, label_share=0.1 + 0.2, kappa=1 / 3, max_images=None, classes=["à", "b"])])
    assert len(held(tmp_path)) == 1


def test_a_crash_while_writing_leaves_the_old_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_results(tmp_path, [entry(0.5)])
    write = Path.write_text

    def crash(self: Path, text: str) -> int:
        write(self, text[: len(text) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", crash)
        with pytest.raises(KeyboardInterrupt):
            add_results(tmp_path, [entry(0.7)])
    assert held(tmp_path) == [entry(0.5)]
    add_results(tmp_path, [entry(0.7)])
    assert held(tmp_path) == [entry(0.7)]


def test_a_new_model_starts_without_results(tmp_path: Path, tiny_model: Callable[..., MiclPreTrainedModel]) -> None:
    for _ in range(2):
        save_model(tiny_model(MiclForPreTraining), tmp_path / "model")
        assert held(tmp_path / "model") == []
        add_results(tmp_path / "model", [entry(0.5)])


# The model folder


@pytest.mark.parametrize("model_class", [MiclForPreTraining, MiclForImageClassification])
def test_a_model_folder_brings_its_code_and_is_a_stock_vit(
    model_class: type[MiclPreTrainedModel], tmp_path: Path, tiny_model: Callable[..., MiclPreTrainedModel]
) -> None:
    options = {"classifier_pooling": "cls"} if model_class is MiclForImageClassification else {}
    for _ in range(2):
        save_model(tiny_model(model_class, **options), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (config["auto_map"], config["architectures"]) == (AUTO_MAP, [model_class.__name__])
    others = {"config.json", "eval.json", "model.safetensors", "preprocessor_config.json"}
    assert {path.name for path in (tmp_path / "model").iterdir()} == others | set(REMOTE_FILES)
    stock = ViTModel if model_class is MiclForPreTraining else ViTForImageClassification
    pooler = {"add_pooling_layer": False} if stock is ViTModel else {}
    _, info = stock.from_pretrained(tmp_path / "model", output_loading_info=True, **pooler)
    assert not any(info.values())


def test_an_entry_has_all_that_is_needed_to_repeat_it(write_shards: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["somewhere.py", "--dataset", "my pictures", "--seed", "3"])
    settings = DataSettings(dataset="my pictures", dataset_config="small", max_images=7)
    source = open_source(str(write_shards(5, split="test")), "test")
    found = result("training.knn", settings, source, 4, protocol="p", value=0.25, seed=3, label_share=0.1)
    assert json.loads(json.dumps(found)) == found
    about = {"dataset": "my pictures", "dataset_config": "small", "max_images": 7, "split": "test"}
    about |= {"fingerprint": source.fingerprint, "num_test_images": 4, "seed": 3, "label_share": 0.1}
    about |= {"protocol": "p", "value": 0.25, "metric": "top-1 accuracy", "task": "image-classification"}
    about |= {"command": "python -m training.knn --dataset 'my pictures' --seed 3"}
    assert {name: found[name] for name in about} == about
    assert found.keys() - about.keys() == {"hardware", "versions"}


def test_tables_are_aligned() -> None:
    lines = table("accuracy", {"short": "1", "much longer": "2"}).splitlines()
    assert lines == ["accuracy", "  short        1", "  much longer  2"]
    assert table("nothing", {}) == "nothing"
