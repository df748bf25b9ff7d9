"""Whole runs: what they leave behind."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from run_folder import course, saved_steps
from transformers import AutoImageProcessor

from modeling_micl import MiclModel
from modeling_micl.remote_code import REMOTE_FILES
from training import pretrain
from training.config import PretrainConfig
from training.judge import knn_accuracy
from training.log_files import read_metrics


Write = Callable[..., Path]
Settings = Callable[..., PretrainConfig]
Train = Callable[..., Path]

# What a run leaves behind


@pytest.fixture
def labelled_run(
    write_shards: Write, settings: Settings, run_pretraining: Train, capsys: pytest.CaptureFixture[str]
) -> tuple[Path, str]:
    """A finished run on data with a labelled test split, and what it printed."""
    write_shards(40, 30)
    write_shards(50, split="test")
    config = settings(image_size=[16, 20], epochs=3, knn_images=60, knn_epochs=2, save_steps=10)
    return run_pretraining(config, figures=True), capsys.readouterr().out


def test_a_run_leaves_a_folder_to_resume_and_one_to_share(labelled_run: tuple[Path, str]) -> None:
    run, printed = labelled_run
    assert {path.name for path in run.iterdir()} == {"checkpoints", "metrics.jsonl", "model", "figures"}
    assert saved_steps(run) == [16, 20, 24]  # before an evaluation, too
    found = {path.name for path in (run / "model").iterdir()}
    others = {"config.json", "model.safetensors", "preprocessor_config.json", "eval.json", "README.md"}
    assert found == others | set(REMOTE_FILES)

    for figure in ("views", "similarity", "curves"):
        with Image.open(run / "figures" / f"{figure}.png") as image:
            assert min(image.size) > 300
            assert np.asarray(image.convert("L")).std() > 10

    entries = read_metrics(run / "metrics.jsonl")
    batch = {"negatives": "local", "global_batch_size": 8, "images_per_process": 8, "images_per_pass": 8}
    assert entries.pop(0) == {"step": 0, "processes": 1, "images_per_step": 8} | batch
    steps = [entry for entry in entries if "loss" in entry]
    assert [entry["step"] for entry in steps] == list(range(1, 25))
    assert [entry["epoch"] for entry in steps] == [n / 8 for n in range(1, 25)]
    assert [entry["step"] for entry in entries if "knn_accuracy" in entry] == [0, 16, 24]
    fields = {"step", "epoch", "loss", "learning_rate", "images_per_second", "grad_norm", "broken_images"}
    fields |= {"skipped_steps", "contrastive_accuracy", "negative_cosine", "effective_rank", "data_wait", "mfu"}
    for entry in steps:
        assert entry.keys() == fields
        assert all(math.isfinite(value) for value in entry.values())

    results = json.loads((run / "model" / "eval.json").read_text())
    assert results["training"]["program"] == "training.pretrain"
    assert results["training"]["progress"]["step"] == 24
    assert results["training"]["plan"]["contrasted_images"] == 8
    by_name = {result["features"]: result for result in results["results"]}
    assert len(by_name) == 5
    printed_values = dict(re.findall(r"^  (\S.*?)  +(\d+\.\d)%$", printed, flags=re.MULTILINE))
    assert printed_values == {name: f"{100 * result['value']:.1f}" for name, result in by_name.items()}
    for result in by_name.values():
        assert (result["num_train_images"], result["num_test_images"], result["seed"]) == (60, 50, 0)
        assert "k=20" in result["protocol"]
        assert {"dataset", "split", "fingerprint", "command", "hardware", "versions"} <= result.keys()
    assert by_name["encoder after training"]["value"] == entries[-1]["knn_accuracy"]
    assert by_name["encoder before training"]["value"] == entries[0]["knn_accuracy"]


def test_the_portable_model_has_the_accuracy_that_it_claims(labelled_run: tuple[Path, str], tmp_path: Path) -> None:
    """Anybody can repeat the evaluation with transformers alone."""
    folder = labelled_run[0] / "model"
    model, processor = MiclModel.from_pretrained(folder).eval(), AutoImageProcessor.from_pretrained(folder)
    features, labels = {}, {}
    for split, files in (("train", "train-*.parquet"), ("test", "test-*.parquet")):
        rows = datasets.Dataset.from_parquet([str(path) for path in sorted((tmp_path / "data/data").glob(files))])
        if split == "train":  # 60 of 40 + 30, in proportion
            rows = rows.select([*range(34), *range(40, 66)])
        with torch.no_grad():
            features[split] = model(processor(list(rows["image"]), return_tensors="pt").pixel_values).pooler_output
        labels[split] = torch.tensor(rows["label"])
    accuracy = knn_accuracy(features["train"], labels["train"], features["test"], labels["test"])
    results = json.loads((folder / "eval.json").read_text())["results"]
    assert next(r["value"] for r in results if r["features"] == "encoder after training") == pytest.approx(accuracy)


def test_the_card_claims_what_eval_json_holds_and_nothing_else(labelled_run: tuple[Path, str]) -> None:
    folder = labelled_run[0] / "model"
    results = json.loads((folder / "eval.json").read_text())["results"]
    section = (folder / "README.md").read_text().split("## Results")[1].split("\n## ")[0]
    claimed = re.findall(
        r"^\| top-1 accuracy \| (.+?) \|.*; features: (.+?); 60 labelled images \| 50 images of", section, re.MULTILINE
    )
    expected = [(f"{result['value']:.1%}", result["features"]) for result in [results[-1], *results[:-1]]]
    assert claimed == expected  # the model first, then what it is compared with
    assert len(re.findall(r"\d%", section)) == len(results)


def test_without_labels_there_is_no_evaluation(
    write_image_folder: Write, settings: Settings, run_pretraining: Train, tmp_path: Path
) -> None:
    write_image_folder(20)
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (tmp_path / "pictures").rglob("*.png"):
        shutil.copy(path, flat)
    run = run_pretraining(settings(dataset=str(flat), knn_images=10, epochs=2), figures=True)
    assert json.loads((run / "model" / "eval.json").read_text())["results"] == []
    assert (run / "figures" / "views.png").exists()


@pytest.mark.parametrize("labels", ["absent", "all -1", "of broken images"])
def test_an_unlabelled_test_split_does_not_cost_the_model(
    labels: str, write_shards: Write, settings: Settings, run_pretraining: Train
) -> None:
    """The Hub's test splits often have no labels, or -1 for all."""
    broken = range(10) if labels == "of broken images" else ()
    test = next(write_shards(10, split="test", broken=broken).rglob("*.parquet"))
    write_shards(16)
    rows = datasets.Dataset.from_parquet(str(test))
    if labels != "of broken images":
        rows = rows.remove_columns("label") if labels == "absent" else rows.map(lambda _: {"label": -1})
        rows.to_parquet(test)
    run = run_pretraining(settings(epochs=2, knn_images=10))
    assert (run / "model" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("splits", "asked", "chosen"),
    [
        (("test", "validation"), None, 7),
        (("test",), None, 5),
        (("test", "validation"), "test", 5),
        (("other",), None, None),
    ],
)
def test_the_split_for_knn_is_found(
    splits: tuple[str, ...], asked: str | None, chosen: int | None, write_shards: Write, settings: Settings
) -> None:
    write_shards(12)
    for split in splits:
        write_shards({"test": 5, "validation": 7, "other": 9}[split], split=split)
    _, evaluated = pretrain.open_sources(settings(eval_split=asked, knn_images=10))
    assert (evaluated.num_images if evaluated else None) == chosen
    assert pretrain.open_sources(settings(eval_split=asked, knn_images=0))[1] is None


@pytest.mark.parametrize(
    "options",
    [
        {"num_views": 3, "image_size": [16, 24]},
        {"mixed_precision": "bf16"},
        {"negatives": "global", "similarity": "cosine"},
        {"gradient_checkpointing": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_kind_of_run_comes_to_its_end(
    options: dict[str, Any], write_shards: Write, settings: Settings, run_pretraining: Train
) -> None:
    write_shards(20)
    run = run_pretraining(settings(epochs=2, **options), figures=True)
    assert [step for step, *_ in course(run)] == [1, 2, 3, 4]
    assert all(math.isfinite(value) for entry in course(run) for value in entry)


@pytest.mark.parametrize("way", ["of the run", "of accelerate"])
def test_a_compiled_run_takes_the_same_course(
    way: str,
    write_shards: Write,
    settings: Settings,
    run_pretraining: Train,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_shards(20)
    expected = course(run_pretraining(settings(output_dir=str(tmp_path / "plain"))))
    # As inductor takes much longer; accelerate has a variable for it.
    compiled, real = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **_: compiled.append(a) or real(*a, backend="aot_eager"))
    if way == "of accelerate":
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    options = {"torch_compile": "default"} if way == "of the run" else {}
    run_pretraining(settings(output_dir=str(tmp_path / "run"), max_steps=10, **options))
    assert len(compiled) == 1
    monkeypatch.undo()
    run = run_pretraining(settings(output_dir=str(tmp_path / "run")))  # goes on uncompiled
    for step, expected_step in zip(course(run), expected, strict=True):
        assert step == pytest.approx(expected_step, rel=1e-4)


def test_plain_colours_are_soon_told_apart(
    settings: Settings, run_pretraining: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    for number, colour in enumerate(np.random.default_rng(0).integers(0, 256, (64, 3)).tolist()):
        Image.new("RGB", (16, 16), tuple(colour)).save(tmp_path / "data" / f"{number}.png")
    run = run_pretraining(settings(epochs=15, per_device_batch_size=16, base_lr=0.05))
    losses = [loss for _, _, loss, *_ in course(run)]
    assert np.mean(losses[-4:]) < 0.5 * np.mean(losses[:4]) < 0.5 * math.log(16)
    assert "nothing is learned" not in capsys.readouterr().err


def test_tensorboard_gets_settings_of_any_type(
    write_shards: Write, settings: Settings, run_pretraining: Train
) -> None:
    write_shards(20)
    run = run_pretraining(settings(max_steps=2, report_to="tensorboard", max_grad_norm=None))
    assert list(run.rglob("events.out.tfevents.*"))
