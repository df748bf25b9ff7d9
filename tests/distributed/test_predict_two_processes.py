"""Evaluation on two processes: every image counts exactly once, and the numbers are those of one process."""

import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from forks import run
from PIL import Image

from modeling_micl import MiclConfig, MiclForImageClassification
from training import knn
from training.evaluation import accuracies, predict
from training.features import LabelledFeatures, cached_features
from training.source import open_source


UNEVEN = [3, 25, 0, 9]  # 37 images: neither two processes nor their batches share them out evenly
UNREADABLE, UNLABELLED = {1, 20}, {30}
CLASSES = 7

pytestmark = pytest.mark.slow


def write_shards(folder: Path, lengths: list[int], damaged: bool) -> None:
    rng, first = np.random.default_rng(0), 0
    folder.mkdir()
    for shard, length in enumerate(lengths):
        images, labels = [], []
        for number in range(first, first + length):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(buffer, "PNG")
            content = b"no image" if damaged and number in UNREADABLE else buffer.getvalue()
            images.append({"bytes": content, "path": None})
            labels.append(-1 if damaged and number in UNLABELLED else number % CLASSES)
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=CLASSES)})
        path = folder / f"test-{shard:05d}-of-{len(lengths):05d}.parquet"
        datasets.Dataset.from_dict({"image": images, "label": labels}, features=features).to_parquet(path)
        first += length


CASES: dict[str, dict[str, Any]] = {
    "stream": {},
    "random access": {"streaming": False},
    "damaged": {"data": "damaged"},
    "part": {"max_images": 20},
    "one image": {"max_images": 1},  # the second process has none at all
    "decoding processes": {"num_workers": 2},
}


def judge(accelerator: Accelerator, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Scores, labels and accuracies of one case."""
    model = MiclForImageClassification.from_pretrained(folder / "model").to(accelerator.device)
    data = folder / options.get("data", "whole")
    source = open_source(str(data), "test", streaming=options.get("streaming"))
    found = predict(accelerator, model, source, options.get("max_images"), options.get("num_workers", 0))
    return {"scores": found[0], "labels": found[1], "accuracies": accuracies(*found)}


def extract_twice(accelerator: Accelerator, folder: Path) -> dict[str, Any]:
    """What this process gets when all ask for the same features twice, and how often it extracted them."""
    times = []

    def extract() -> LabelledFeatures:
        times.append(1)
        accelerator.wait_for_everyone()  # hangs if not all come
        return LabelledFeatures({"cls": torch.arange(6.0).reshape(3, 2)}, torch.arange(3))

    cache = folder / f"cache-of-{accelerator.num_processes}"
    found = [cached_features(accelerator, cache, ["key"], extract) for _ in range(2)]
    accelerator.wait_for_everyone()
    return {"times": len(times), "features": [each.features["cls"] for each in found], "labels": found[1].labels}


def main(folder: Path) -> None:
    """What each of the processes does."""
    accelerator = Accelerator(cpu=True)
    results = {name: judge(accelerator, folder, options) for name, options in CASES.items()}
    results["cache"] = extract_twice(accelerator, folder)
    processes = f"of-{accelerator.num_processes}"
    torch.save(results, folder / f"{accelerator.process_index}-{processes}.pt")
    where = {"output_dir": str(folder / processes), "features_cache": str(folder / f"features-{processes}")}
    data = {"dataset": str(folder / "whole"), "split": "test", "eval_split": "test", "num_workers": 0}
    knn.main(knn.KnnConfig(model=str(folder / "model"), k=5, few_shot=[0.5], **data, **where))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process and two have left behind."""
    folder = tmp_path_factory.mktemp("predictions")
    write_shards(folder / "whole", UNEVEN, damaged=False)
    write_shards(folder / "damaged", UNEVEN, damaged=True)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = MiclConfig(**sizes, image_size=16, patch_size=4, mask_ratio=0.5, num_labels=CLASSES)
    model = MiclForImageClassification(config)
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(folder / "model")
    for processes in (1, 2):
        done = run(partial(main, folder), folder / "home", processes)
        assert done.status == 0, done.complaints[-5000:]
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, dict[str, Any]]:
    """What the one process and each of the two found, by name."""
    return {path.stem: torch.load(path) for path in folder.glob("*-of-*.pt")}


def test_both_processes_and_one_alone_have_finished(results: dict[str, dict[str, Any]]) -> None:
    assert results.keys() == {"0-of-1", "0-of-2", "1-of-2"}


EXPECTED = {
    "stream": list(range(37)),
    "random access": list(range(37)),
    "damaged": sorted(set(range(37)) - UNREADABLE - UNLABELLED),
    "part": [0, *range(3, 17), *range(28, 33)],  # in proportion from the head of each shard
    "one image": [28],
    "decoding processes": list(range(37)),
}


@pytest.mark.parametrize("name", CASES)
def test_every_labelled_image_is_classified_once_and_in_order(name: str, results: dict[str, dict[str, Any]]) -> None:
    for found in results.values():
        assert found[name]["labels"].tolist() == [number % CLASSES for number in EXPECTED[name]]
        assert found[name]["scores"].shape == (len(EXPECTED[name]), CLASSES)


@pytest.mark.parametrize("name", CASES)
def test_scores_belong_to_their_images_on_every_process(name: str, results: dict[str, dict[str, Any]]) -> None:
    """Those of the whole data, worked out by one process, tell which image a row belongs to."""
    whole = results["0-of-1"]["stream"]["scores"]
    assert torch.pdist(whole).min() > 1e-2
    for found in results.values():
        torch.testing.assert_close(found[name]["scores"], whole[EXPECTED[name]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_accuracies_are_exactly_those_of_one_process(name: str, results: dict[str, dict[str, Any]]) -> None:
    alone, *several = (results[process][name]["accuracies"] for process in ("0-of-1", "0-of-2", "1-of-2"))
    assert several == [alone, alone]
    if name == "stream":
        assert 0 < alone["top1_accuracy"] < alone["top5_accuracy"] < 1


def test_features_are_extracted_together_and_then_read_by_all(results: dict[str, dict[str, Any]]) -> None:
    for found in results.values():
        assert found["cache"]["times"] == 1
        assert all(torch.equal(each, torch.arange(6.0).reshape(3, 2)) for each in found["cache"]["features"])
        assert found["cache"]["labels"].tolist() == [0, 1, 2]


def test_the_program_for_nearest_neighbours_writes_the_same_results(folder: Path) -> None:
    alone, several = (
        [(entry["protocol"], entry["num_train_images"], entry["num_test_images"], entry["value"]) for entry in entries]
        for entries in (json.loads((folder / name / "eval.json").read_text())["results"] for name in ("of-1", "of-2"))
    )
    assert several == alone
    assert [entry[2] for entry in alone] == [37] * 4
