"""The nearest-neighbour program from a model's folder to its eval.json."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from conftest import renormalize
from torch import Tensor
from transformers import AutoImageProcessor, ViTConfig, ViTModel

from modeling_micl import MiclForImageClassification, MiclForPreTraining, MiclModel, MiclPreTrainedModel
from training import evaluation, knn
from training.judge import knn_accuracy
from training.knn import KnnConfig
from training.labels import few_shot
from training.results import add_results, save_model
from training.source import open_source


Write = Callable[..., Path]
Model = Callable[..., MiclPreTrainedModel]
Entry = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path, write_shards: Write, tiny_model: Model) -> Path:
    """With data/, of which the test split has 30 images, and a pre-trained encoder in model/."""
    write_shards(35, 25)
    write_shards(30, split="test")
    save_model(tiny_model(MiclForPreTraining, image_size=16, patch_size=4), tmp_path / "model")
    return tmp_path


@pytest.fixture
def run_knn(folder: Path, no_accelerator: Callable[[], None]) -> Callable[..., list[Entry]]:
    """Run the program in this process; keywords replace single settings. Returns what eval.json then holds."""

    def run(**overrides: Any) -> list[Entry]:
        where = {"dataset": str(folder / "data"), "model": str(folder / "model"), "num_workers": 0}
        config = KnnConfig(**(where | {"features_cache": str(folder / "cache")} | overrides))
        config.validate()
        no_accelerator()
        knn.main(config)
        entries: list[Entry] = json.loads((config.results_folder() / "eval.json").read_text())["results"]
        return entries

    return run


@pytest.fixture
def extractions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The splits whose features were extracted."""
    splits: list[str] = []
    extract = evaluation.extract_features

    def spy(accelerator: Any, source: Any, *rest: Any) -> Any:
        splits.append(source.split)
        return extract(accelerator, source, *rest)

    monkeypatch.setattr(evaluation, "extract_features", spy)
    return splits


def outcomes(entries: list[Entry]) -> dict[tuple[float, bool], float]:
    """Accuracies by share of the labels and whether the votes were weighted."""
    found = {(entry["label_share"], "exp(" in entry["protocol"]): entry["value"] for entry in entries}
    assert len(found) == len(entries)
    return found


# What is measured


def by_transformers(folder: Path, split: str, pooling: str) -> tuple[Tensor, Tensor]:
    """Features and labels of a split, as anybody else would get them."""
    model = MiclModel.from_pretrained(folder / "model").eval()
    processor = AutoImageProcessor.from_pretrained(folder / "model")
    files = sorted((folder / "data" / "data").glob(f"{split}-*.parquet"))
    rows = datasets.Dataset.from_parquet([str(path) for path in files])
    with torch.no_grad():
        tokens = model(processor(list(rows["image"]), return_tensors="pt").pixel_values).last_hidden_state
    return tokens[:, 0] if pooling == "cls" else tokens[:, 1:].mean(dim=1), torch.tensor(rows["label"])


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_accuracies_are_those_of_the_features_that_transformers_gives(
    pooling: str, folder: Path, run_knn: Callable[..., list[Entry]]
) -> None:
    (train, labels), (test, answers) = (by_transformers(folder, split, pooling) for split in ("train", "test"))
    expected = {}
    for share in (1.0, 0.25, 0.5):
        chosen = few_shot(labels, share, seed=3)
        for temperature in (0.1, None):
            value = knn_accuracy(train[chosen], labels[chosen], test, answers, 5, temperature)
            expected[share, temperature is not None] = value
    found = run_knn(features=pooling, k=5, temperature=0.1, few_shot=[0.25, 0.5], seed=3)
    assert outcomes(found) == pytest.approx(expected)
    assert len(set(expected.values())) > 3


def test_a_model_sees_images_normalised_as_its_own_processor_says(
    folder: Path, run_knn: Callable[..., list[Entry]], extractions: list[str]
) -> None:
    """Also where features with another normalisation are in the cache."""
    votes = []
    for change in (lambda _: None, renormalize):
        change(folder / "model")
        (train, labels), (test, answers) = (by_transformers(folder, split, "cls") for split in ("train", "test"))
        votes.append(knn_accuracy(train, labels, test, answers, 5, None))
        assert outcomes(run_knn(k=5, few_shot=[]))[1.0, False] == pytest.approx(votes[-1])
    assert votes[0] != votes[1]
    assert extractions == ["train", "test"] * 2


def test_an_entry_says_what_was_measured_how_and_on_what(
    folder: Path, run_knn: Callable[..., list[Entry]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["knn.py", "--model", "a folder"])
    entries = run_knn(few_shot=[0.1])
    test, train = (open_source(str(folder / "data"), split) for split in ("test", "train"))
    for entry in entries:
        expected = {
            **{"task": "image-classification", "metric": "top-1 accuracy", "seed": 0, "max_images": None},
            **{"dataset": str(folder / "data"), "dataset_config": None, "model": str(folder / "model")},
            **{"split": "test", "fingerprint": test.fingerprint, "num_test_images": 30},
            **{"train_split": "train", "train_fingerprint": train.fingerprint, "features": "cls of the encoder"},
            **{"command": "python -m training.knn --model 'a folder'"},
        }
        assert {name: entry[name] for name in expected} == expected
        assert 0 <= entry["value"] <= 1
        assert entry["hardware"]["cpu_cores"] >= 1
        assert {"python", "torch", "transformers"} <= entry["versions"].keys()
    assert [(entry["label_share"], entry["num_train_images"]) for entry in entries] == [(1.0, 60)] * 2 + [(0.1, 8)] * 2
    weighted, plain = "votes weighted by exp(cosine / 0.07)", "votes of equal weight"
    protocols = [f"kNN, k=20, cosine, {votes}, whole central crop" for votes in (weighted, plain)]
    assert [entry["protocol"] for entry in entries] == 2 * protocols


def test_a_classifier_is_judged_by_what_its_head_sees(
    folder: Path, tiny_model: Model, run_knn: Callable[..., list[Entry]]
) -> None:
    """Another head does not change its features, another norm before the head does."""
    values, model = [], tiny_model(MiclForImageClassification, image_size=16, patch_size=4, num_labels=9)
    for change in (None, model.classifier.weight, model.fc_norm.bias):
        if change is not None:
            torch.nn.init.normal_(change)
        save_model(model, folder / "classifier")
        values.append(outcomes(run_knn(model=str(folder / "classifier"), few_shot=[], k=3)))
    assert values[0] == values[1] != values[2]


def test_only_a_part_of_the_images_can_be_used(run_knn: Callable[..., list[Entry]]) -> None:
    for entry in run_knn(max_images=20, few_shot=[]):
        assert [entry[name] for name in ("num_train_images", "num_test_images", "max_images")] == [20] * 3


# What is written and what is kept


def test_measuring_again_replaces_the_entries_and_takes_the_features_from_the_cache(
    folder: Path, run_knn: Callable[..., list[Entry]], extractions: list[str]
) -> None:
    other = {"protocol": "another one", "value": 0.25}
    add_results(folder / "model", [other])
    first = run_knn()
    assert extractions == ["train", "test"]
    assert len(first) == 1 + 6
    assert first[0] == other
    assert run_knn() == first
    assert extractions == ["train", "test"]


def test_another_protocol_gets_its_own_entries_from_the_same_features(
    run_knn: Callable[..., list[Entry]], extractions: list[str]
) -> None:
    run_knn(few_shot=[])
    entries = run_knn(few_shot=[], k=3)
    assert len(entries) == 4
    assert len(run_knn(few_shot=[0.5], k=3)) == 6
    assert extractions == ["train", "test"]


@pytest.mark.parametrize(
    "change", [{"features": "mean"}, {"max_images": 25}, {"mixed_precision": "bf16"}, {"random_init": True}], ids=str
)
def test_other_features_are_not_taken_from_the_cache(
    change: dict[str, Any], run_knn: Callable[..., list[Entry]], extractions: list[str]
) -> None:
    run_knn(few_shot=[])
    run_knn(few_shot=[], **change)
    assert extractions == ["train", "test"] * 2


def test_other_weights_or_images_are_not_taken_from_the_cache(
    folder: Path, write_shards: Write, tiny_model: Model, run_knn: Callable[..., list[Entry]], extractions: list[str]
) -> None:
    run_knn(few_shot=[])
    model = tiny_model(MiclForPreTraining, image_size=16, patch_size=4)
    torch.nn.init.ones_(model.vit.layernorm.bias)
    save_model(model, folder / "model")
    run_knn(few_shot=[])
    assert extractions == ["train", "test"] * 2
    write_shards(30, split="test", broken={3})  # files of the same names and lengths
    entries = run_knn(few_shot=[])
    assert extractions == ["train", "test"] * 2 + ["test"]
    assert entries[-1]["num_test_images"] == 29


def test_parts_of_a_stream_are_not_mistaken_for_those_of_data_with_random_access(
    folder: Path, run_knn: Callable[..., list[Entry]], extractions: list[str]
) -> None:
    """A stream's part is the head of its shards, the other one evenly spaced: these are not the same images."""
    run_knn(few_shot=[], max_images=10, split="test", streaming=True)
    run_knn(few_shot=[], max_images=10, split="test", streaming=False)
    assert extractions == ["test"] * 2


def test_random_weights_are_judged_beside_the_trained_ones(
    run_knn: Callable[..., list[Entry]], extractions: list[str]
) -> None:
    trained = run_knn(few_shot=[])
    both = run_knn(few_shot=[], random_init=True)
    assert both[:2] == trained
    assert [entry["features"] for entry in both[2:]] == ["cls of random weights"] * 2
    assert run_knn(few_shot=[], random_init=True) == both
    assert len(extractions) == 4
    assert len(run_knn(few_shot=[], random_init=True, seed=1)) == 6
    assert len(extractions) == 6


def test_results_can_go_elsewhere(folder: Path, run_knn: Callable[..., list[Entry]]) -> None:
    before = (folder / "model" / "eval.json").read_text()
    assert len(run_knn(few_shot=[], output_dir=str(folder / "results" / "deep"))) == 2
    assert (folder / "model" / "eval.json").read_text() == before


# Mistakes


def refused(run: Callable[..., Any], words: str, extractions: list[str], **overrides: Any) -> None:
    with pytest.raises(ValueError, match=words):
        run(**overrides)
    assert extractions == []


def test_data_without_a_split_to_classify_is_refused(
    folder: Path, run_knn: Callable[..., list[Entry]], extractions: list[str]
) -> None:
    next((folder / "data").rglob("test-*")).unlink()
    refused(run_knn, "has no validation or test split: name one with --eval_split", extractions)
    refused(run_knn, "no split 'validation'", extractions, eval_split="validation")


@pytest.mark.parametrize("labels", ["absent", "all -1"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_unlabelled_images_are_refused_before_any_is_seen(
    split: str, labels: str, folder: Path, run_knn: Callable[..., list[Entry]], extractions: list[str]
) -> None:
    for file in (folder / "data").rglob(f"{split}-*"):
        rows = datasets.Dataset.from_parquet(str(file))
        rows = rows.remove_columns("label") if labels == "absent" else rows.map(lambda _: {"label": -1})
        rows.to_parquet(file)
    words = {"absent": "no label column|label", "all -1": f"The split '{split}' is unlabelled"}
    refused(run_knn, words[labels], extractions)


def test_images_that_cannot_be_decoded_are_refused(
    folder: Path, write_shards: Write, run_knn: Callable[..., list[Entry]]
) -> None:
    write_shards(30, split="test", broken=range(30))
    with pytest.raises(ValueError, match="No image of the split 'test' could be decoded"):
        run_knn()


def test_a_model_that_is_not_there_or_of_another_kind_is_refused(
    folder: Path, run_knn: Callable[..., list[Entry]], extractions: list[str]
) -> None:
    (folder / "empty").mkdir()
    refused(run_knn, "empty' is no model: it has no config.json", extractions, model=str(folder / "empty"))
    tiny = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=16)
    ViTModel(tiny).save_pretrained(folder / "vit")
    refused(run_knn, "vit' is a 'vit' model, not a 'micl' one", extractions, model=str(folder / "vit"))


def test_impossible_votes_are_refused(tmp_path: Path) -> None:
    for settings, words in (
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be > 0"),
    ):
        with pytest.raises(ValueError, match=words):
            KnnConfig(model=str(tmp_path), **settings).validate()
