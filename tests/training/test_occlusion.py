"""Accuracy by the share of hidden patches, against the model called directly."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forks
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import renormalize
from PIL import Image
from torch import Tensor

from modeling_micl import MiclForImageClassification, MiclForPreTraining, MiclModel, MiclPreTrainedModel
from training.evaluation import accuracies, load_classifier, load_frozen, open_labelled, predict
from training.features import (
    IMAGENET,
    Frozen,
    Normalization,
    encoder_features,
    extract_features,
    normalize_pixels,
    stored_normalization,
)
from training.images import central_crop, to_pixels
from training.judge import knn_accuracy
from training.occlusion import TIMED_PASSES, OcclusionConfig, main, timings
from training.parser import parse_settings
from training.results import save_model
from training.source import open_source


TRAIN, TEST, CLASSES, PATCHES = 40, 60, 4, 16
SHARES = [0.0, 0.5, 0.95]

Write = Callable[..., Path]
Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def data(write_shards: Write) -> Path:
    write_shards(25, 15, labels=CLASSES)
    return write_shards(33, 27, split="test", labels=CLASSES)


@pytest.fixture
def save(tiny_model: Callable[..., MiclPreTrainedModel], tmp_path: Path) -> Callable[..., Path]:
    """Write a model folder, of a classifier or an encoder."""

    def write(kind: type[MiclPreTrainedModel], names: list[str] | None = None, **overrides: Any) -> Path:
        names = names or [f"class {label}" for label in range(CLASSES)]
        model = tiny_model(kind, id2label=dict(enumerate(names)), **overrides)
        save_model(model, tmp_path / "run" / "model")
        return tmp_path / "run" / "model"

    return write


@pytest.fixture
def run(data: Path, no_accelerator: None) -> Run:
    """Run the command in this process; gives the entries of eval.json."""

    def judge(model: Path, **overrides: Any) -> list[dict[str, Any]]:
        few: dict[str, Any] = {"hidden_shares": SHARES, "timing_batch_size": 2, "num_workers": 0}
        config = OcclusionConfig(**({"dataset": str(data), "model": str(model)} | few | overrides))
        config.validate()
        main(config)
        entries: list[dict[str, Any]] = json.loads((config.results_folder() / "eval.json").read_text())["results"]
        return entries

    return judge


def values(entries: list[dict[str, Any]], protocol: str) -> dict[float, float]:
    """Accuracies by the share of hidden patches."""
    return {entry["hidden_share"]: entry["value"] for entry in entries if entry["protocol"].startswith(protocol)}


@torch.no_grad()
def outputs(
    model: Frozen,
    data: Path,
    split: str,
    share: float = 0.0,
    seed: int = 0,
    pooling: str = "cls",
    normalization: Normalization = IMAGENET,
) -> Tensor:
    """Features or logits of a split's pictures, from the model called with the visible patches."""
    pixels, visible = [], []
    for number, row in enumerate(open_source(str(data), split, streaming=False).rows):
        image = central_crop((32, 32))(Image.open(io.BytesIO(row["image"]["bytes"])), np.random.default_rng(0))
        pixels.append(torch.tensor(to_pixels(image)))
        order = np.random.default_rng((seed, number)).permutation(PATCHES)
        visible.append([order[: round(PATCHES * (1 - share))].tolist()])
    pixel_values = normalize_pixels(torch.stack(pixels), normalization)
    output = model(pixel_values, ids_visible=torch.tensor(visible) if share else None)
    if isinstance(model, MiclForImageClassification):
        logits: Tensor = output.logits
        return logits
    features: Tensor = output.pooler_output if pooling == "cls" else output.last_hidden_state[:, 1:].mean(dim=1)
    return features


def labels_of(count: int) -> Tensor:
    return torch.arange(count) % CLASSES


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_classifier_is_judged_by_its_own_answers_and_by_its_features(
    pooling: str, save: Callable[..., Path], run: Run, data: Path
) -> None:
    model = save(MiclForImageClassification, classifier_pooling=pooling)
    entries = run(model, seed=2)
    assert len(entries) == 2 * len(SHARES)
    classifier, frozen = load_classifier(str(model)), load_frozen(str(model))
    votes = outputs(frozen, data, "train")
    expected: dict[str, dict[float, float]] = {"classifier": {}, "kNN": {}}
    for share in SHARES:
        answers = outputs(classifier, data, "test", share, seed=2).argmax(dim=1)
        expected["classifier"][share] = float((answers == labels_of(TEST)).float().mean())
        queries = outputs(frozen, data, "test", share, seed=2)
        expected["kNN"][share] = knn_accuracy(votes, labels_of(TRAIN), queries, labels_of(TEST))
    for protocol, curve in expected.items():
        assert values(entries, protocol) == pytest.approx(curve)
        assert len(set(curve.values())) > 1


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_an_encoder_is_judged_by_the_vote_of_whole_images(
    pooling: str, save: Callable[..., Path], run: Run, data: Path
) -> None:
    model = save(MiclForPreTraining)
    entries = run(model, features=pooling)
    frozen = load_frozen(str(model))
    votes = outputs(frozen, data, "train", pooling=pooling)
    for share in SHARES:
        queries = outputs(frozen, data, "test", share, pooling=pooling)
        expected = knn_accuracy(votes, labels_of(TRAIN), queries, labels_of(TEST))
        assert values(entries, "kNN")[share] == pytest.approx(expected)
    assert len(entries) == len(SHARES)


def test_parts_of_images_are_normalised_as_the_models_processor_says(
    save: Callable[..., Path], run: Run, data: Path
) -> None:
    model = save(MiclForPreTraining)
    renormalize(model)
    entries, frozen, own = run(model), load_frozen(str(model)), stored_normalization(str(model))
    votes = outputs(frozen, data, "train", normalization=own)
    for share in SHARES:
        queries = outputs(frozen, data, "test", share, normalization=own)
        expected = knn_accuracy(votes, labels_of(TRAIN), queries, labels_of(TEST))
        assert values(entries, "kNN")[share] == pytest.approx(expected)


def test_with_nothing_hidden_it_is_the_plain_evaluation(save: Callable[..., Path], run: Run, data: Path) -> None:
    model = save(MiclForImageClassification)
    entries = run(model)
    accelerator = Accelerator(mixed_precision="no")
    train, test = open_labelled(OcclusionConfig(dataset=str(data)))
    plain = accuracies(*predict(accelerator, load_classifier(str(model)), test, None, 0))["top1_accuracy"]
    assert values(entries, "classifier")[0.0] == plain
    extractors = {"features": encoder_features(load_frozen(str(model)), accelerator)}
    votes, queries = (extract_features(accelerator, s, extractors, (32, 32), None, 0) for s in (train, test))
    found = knn_accuracy(votes.features["features"], votes.labels, queries.features["features"], queries.labels)
    assert values(entries, "kNN")[0.0] == found


def test_random_weights_have_no_answers_of_their_own(save: Callable[..., Path], run: Run, data: Path) -> None:
    model = save(MiclForImageClassification)
    entries = run(model, random_init=True)
    frozen = load_frozen(str(model), random_init=True)
    queries, votes = outputs(frozen, data, "test", 0.5), outputs(frozen, data, "train")
    expected = knn_accuracy(votes, labels_of(TRAIN), queries, labels_of(TEST))
    assert values(entries, "kNN")[0.5] == pytest.approx(expected)
    assert values(entries, "classifier") == {}


def test_few_labels_vote_as_well(save: Callable[..., Path], run: Run) -> None:
    entries = run(save(MiclForPreTraining), few_shot=[0.5])
    found = [(entry["label_share"], entry["hidden_share"], entry["num_train_images"]) for entry in entries]
    assert found == [(1.0, share, 40) for share in SHARES] + [(0.5, share, 20) for share in SHARES]


def test_an_entry_says_what_was_hidden_and_what_that_saves(
    save: Callable[..., Path], run: Run, tmp_path: Path
) -> None:
    model, elsewhere = save(MiclForImageClassification), str(tmp_path / "elsewhere")
    entries = run(model, max_images=12, output_dir=elsewhere, hidden_shares=[0.95, 0.0, 0.5, 0.5], seed=7)
    assert json.loads((model / "eval.json").read_text()) == {"results": []}
    for protocol in ("classifier", "kNN"):
        curve = [entry for entry in entries if entry["protocol"].startswith(protocol)]
        assert [entry["hidden_share"] for entry in curve] == [0.0, 0.5, 0.95]
        assert [entry["num_visible_patches"] for entry in curve] == [16, 8, 1]
        assert {(entry["num_test_images"], entry["max_images"], entry["split"]) for entry in curve} == {
            (12, 12, "test")
        }
        assert {(entry["seed"], entry["model"]) for entry in curve} == {(7, str(model))}
        assert [entry["details"]["token_share"] for entry in curve] == [1.0, 9 / 17, 2 / 17]
        assert curve[0]["details"]["relative_time"] == 1.0
        assert all(entry["details"]["images_per_second"] > 0 for entry in curve)
        assert {entry["details"]["timing_batch_size"] for entry in curve} == {2}
    again = run(model, max_images=12, output_dir=elsewhere, seed=7)
    assert len(again) == len(entries)  # measured anew, not added


def test_only_the_visible_tokens_are_timed_and_the_shares_take_turns(
    tiny_model: Callable[..., MiclPreTrainedModel], no_accelerator: None
) -> None:
    model = tiny_model(MiclModel)
    shapes: list[tuple[int, ...]] = []
    model.layers[-1].register_forward_hook(lambda layer, inputs, output: shapes.append(tuple(output.shape)))
    config = OcclusionConfig(hidden_shares=[0.95, 0.5], timing_batch_size=3)
    found = timings(Accelerator(mixed_precision="no"), config, model)
    assert list(found) == [0.5, 0.95]
    assert shapes[:3] == [(3, 17, 32), (3, 9, 32), (3, 2, 32)]  # the whole image is what they are compared with
    assert shapes == shapes[:3] * (1 + TIMED_PASSES)


def test_the_table_holds_every_accuracy(
    save: Callable[..., Path], run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = run(save(MiclForImageClassification))
    table = [line.split() for line in capsys.readouterr().out.splitlines()[-4:]]
    assert [row[:2] for row in table] == [["hidden", "patches"], ["0%", "16"], ["50%", "8"], ["95%", "1"]]
    for column, protocol in ((-2, "classifier"), (-1, "kNN")):
        curve = values(entries, protocol)
        assert [row[column] for row in table] == [protocol, *(f"{curve[share]:.1%}" for share in SHARES)]
        assert len(set(curve.values())) > 1


def test_the_figure_is_a_picture(save: Callable[..., Path], run: Run) -> None:
    model = save(MiclForImageClassification)
    run(model)
    with Image.open(model / "figures" / "occlusion.png") as figure:
        assert figure.width >= 800
        assert 400 <= figure.height <= figure.width
        colours = figure.convert("RGB").getcolors(maxcolors=1_000_000)
    counts = {colour: count for count, colour in colours}
    assert counts[(255, 255, 255)] < 0.95 * figure.width * figure.height
    for line in ((31, 119, 180), (255, 127, 14)):  # both curves are there
        assert counts[line] > 200


@pytest.mark.parametrize("share", ["1", "-0.1", "nan"])
def test_a_share_that_cannot_be_hidden_is_refused(
    share: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", str(tmp_path), "--hidden_shares", "0.5", share]
    with pytest.raises(SystemExit) as stopped:
        parse_settings(OcclusionConfig, "training.occlusion", flags)
    assert stopped.value.code == 2
    assert f"hidden_shares takes shares in [0, 1), as one patch must be left, got {float(share)}." in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("names", "complaint"),
    [(["a", "b"], "has 2 classes, but the dataset has 4"), (["a", "b", "c", "d"], "0: 'a', 'class 0'")],
)
def test_a_classifier_of_other_classes_is_refused_before_any_work(
    names: list[str], complaint: str, save: Callable[..., Path], run: Run, tmp_path: Path
) -> None:
    model = save(MiclForImageClassification, names)
    with pytest.raises(ValueError, match=complaint):
        run(model, features_cache=str(tmp_path / "features"))
    assert not (tmp_path / "features").exists()


@pytest.mark.slow
def test_two_processes_find_what_one_does(
    save: Callable[..., Path], run: Run, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = save(MiclForImageClassification), tmp_path / "out"
    one = run(model, num_workers=1)
    assert capsys.readouterr().out.count("accuracy of") == 1
    settings = {"model": model, "dataset": data, "output_dir": out, "num_workers": 1, "timing_batch_size": 2}
    occlusion = forks.command("training.occlusion", **settings, hidden_shares=SHARES)
    done = forks.run(occlusion, tmp_path / "home", processes=2)
    assert done.status == 0, done.complaints[-3000:]
    assert done.printed.count("accuracy of") == 1
    two = json.loads((out / "eval.json").read_text())["results"]
    for protocol in ("classifier", "kNN"):
        assert values(two, protocol) == values(one, protocol)
        assert len(values(two, protocol)) == 3


def test_a_broken_first_image_is_no_example(
    save: Callable[..., Path], run: Run, write_shards: Write, tmp_path: Path
) -> None:
    write_shards(20, folder="other", labels=CLASSES)
    other = write_shards(10, split="test", folder="other", labels=CLASSES, broken=[0])
    entries = run(save(MiclForPreTraining), dataset=str(other))
    assert {entry["num_test_images"] for entry in entries} == {9}
