"""Fine-tuning from an encoder to a classifier that others can load, judged by what it says about the stored images."""

import functools
import http.server
import math
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from classifier_runs import (
    COLOURS,
    EVERYTHING,
    coloured,
    course,
    logged_accuracies,
    logits_of,
    losses,
    png,
    results,
    run_finetuning,
    same,
    save_encoder,
    true_labels,
    weights,
    write_colours,
)
from torch.optim.swa_utils import AveragedModel
from transformers import AutoConfig, pipeline

from modeling_micl import MiclForPreTraining
from modeling_micl.remote_code import REMOTE_FILES
from training import finetune, supervised
from training.classifier_config import FinetuneConfig
from training.log_files import read_metrics
from training.parser import parse_settings


TEST_IMAGES, WRONG = 45, 9  # labels are wrong on purpose, so that accuracies are not simply 1


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data, an encoder, and the run of its fine-tuning to the end."""
    folder = tmp_path_factory.mktemp("finished")
    write_colours(folder / "data", "train", 84, classes=7)
    write_colours(folder / "data", "test", TEST_IMAGES, classes=7, wrong=WRONG)
    save_encoder(folder / "encoder")
    run_finetuning(folder, classifier_pooling="mean", epochs=6, eval_epochs=2, base_lr=0.15)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a small data set of four classes and an encoder."""
    write_colours(tmp_path / "data", "train", 32)
    write_colours(tmp_path / "data", "test", 21, wrong=3)
    save_encoder(tmp_path / "encoder")
    return tmp_path


# What comes out


def test_it_learns(finished: Path) -> None:
    loss = losses(finished / "run")
    assert len(loss) == 60
    assert loss[0] == pytest.approx(math.log(7), abs=0.1)
    assert sum(loss[-10:]) / 10 < 0.3 * loss[0]
    top1 = [entry["value"] for entry in results(finished / "run" / "model") if entry["metric"] == "top-1 accuracy"]
    assert top1 == [pytest.approx(1 - WRONG / TEST_IMAGES, abs=0.07)]


def test_metrics_hold_every_step_and_all_evaluations(finished: Path) -> None:
    entries = read_metrics(finished / "run" / "metrics.jsonl")
    assert [entry["step"] for entry in entries if "loss" in entry] == list(range(1, 61))
    judged = [entry for entry in entries if "top1_accuracy" in entry]
    assert [entry["step"] for entry in judged] == [0, 20, 40, 60]
    final = {entry["metric"]: entry["value"] for entry in results(finished / "run" / "model")}
    assert judged[-1]["top1_accuracy"] == final["top-1 accuracy"]
    assert judged[-1]["top5_accuracy"] == final["top-5 accuracy"]
    assert judged[0]["top1_accuracy"] < 0.5


def test_results_are_those_of_the_stored_classifier_on_the_stored_images(finished: Path) -> None:
    model = finished / "run" / "model"
    colours, labels = true_labels(TEST_IMAGES, 7), torch.tensor(true_labels(TEST_IMAGES, 7, WRONG))
    ranked = logits_of(model, coloured(colours, seed=TEST_IMAGES)).argsort(dim=1, descending=True)
    hits = (ranked == labels[:, None]).float()
    found = {entry["metric"]: entry for entry in results(model)}
    assert found["top-1 accuracy"]["value"] == pytest.approx(float(hits[:, 0].mean()))
    assert found["top-5 accuracy"]["value"] == pytest.approx(float(hits[:, :5].sum(dim=1).mean()))
    assert 0.5 < found["top-1 accuracy"]["value"] < found["top-5 accuracy"]["value"]
    for entry in found.values():
        facts = ("split", "num_test_images", "train_split", "num_train_images", "random_init", "seed", "max_images")
        assert [entry[name] for name in facts] == ["test", TEST_IMAGES, "train", 84, False, 0, None]
        assert entry["protocol"] == "fine-tuning for 6 epochs from MiCL"
        assert entry["model"] == str(finished / "encoder")
        assert entry["command"].startswith("python -m training.finetune")


def test_the_folder_is_complete(finished: Path) -> None:
    model = finished / "run" / "model"
    names = {path.name for path in model.iterdir()}
    others = {"config.json", "model.safetensors", "preprocessor_config.json", "eval.json", "README.md"}
    assert names == others | set(REMOTE_FILES)
    config = AutoConfig.from_pretrained(model)
    assert config.id2label == dict(enumerate(COLOURS))
    assert config.label2id == {name: label for label, name in enumerate(COLOURS)}
    assert config.classifier_pooling == "mean"
    assert config.architectures == ["MiclForImageClassification"]
    assert {path.name for path in (finished / "run").iterdir()} == {"checkpoints", "metrics.jsonl", "model"}


def test_the_card_holds_the_results(finished: Path) -> None:
    card = (finished / "run" / "model" / "README.md").read_text()
    rows = [line for line in card.splitlines() if line.startswith(("| top-1", "| top-5"))]
    for row, entry in zip(rows, results(finished / "run" / "model"), strict=True):
        measured = "fine-tuning for 6 epochs from MiCL; 84 labelled images | 45 images of"
        assert row.startswith(f"| {entry['metric']} | {entry['value']:.1%} | {measured}")
    assert "tells 7 classes apart: red, green, blue, yellow, pink, …" in card
    assert "| 60 optimiser steps, 6.0 epochs" in card
    assert "| 8 images per optimiser step |" in card


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """Address of a web server with one red picture, and that picture in the folder."""
    (tmp_path / "red.png").write_bytes(png(coloured([0])[0]))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_pipeline_names_pictures_from_anywhere(finished: Path, server: str, tmp_path: Path) -> None:
    classify = pipeline("image-classification", str(finished / "run" / "model"))
    answers = [classify(image) for image in (coloured([0])[0], str(tmp_path / "red.png"), f"{server}/red.png")]
    assert answers[0] == answers[1] == answers[2]
    assert answers[0][0]["label"] == "red"
    for label, name in enumerate(COLOURS):
        assert classify(coloured([label], seed=9)[0])[0]["label"] == name


# Where it begins


@pytest.mark.parametrize("random_init", [False, True])
def test_training_begins_with_the_given_weights(random_init: bool, folder: Path) -> None:
    run = run_finetuning(folder, base_lr=0, min_lr=0, max_steps=2, random_init=random_init)
    given = MiclForPreTraining.from_pretrained(folder / "encoder").vit.state_dict()
    kept = weights(run / "model")
    for name in given.keys() - {"layernorm.weight", "layernorm.bias", "embeddings.position_embeddings"}:
        assert torch.equal(kept[f"vit.{name}"], given[name]) != random_init, name
    (entry,) = results(run / "model")
    assert entry["random_init"] is random_init
    assert entry["protocol"].endswith("from random weights" if random_init else "from MiCL")
    assert ("from random weights" in (run / "model" / "README.md").read_text()) == random_init


def test_a_classifier_goes_on_as_it_is(finished: Path, tmp_path: Path) -> None:
    where = {"model": str(finished / "run" / "model"), "output_dir": str(tmp_path / "run")}
    run = run_finetuning(finished, **where, base_lr=0, min_lr=0, max_steps=1, eval_epochs=1)
    before = results(finished / "run" / "model")[0]["value"]
    assert logged_accuracies(run) == [before, before]
    assert same(weights(run / "model"), weights(finished / "run" / "model"))


def test_a_classifier_of_other_classes_gets_a_new_head(finished: Path, folder: Path) -> None:
    model = str(finished / "run" / "model")
    with pytest.raises(ValueError, match=r"has 7 classes, but the dataset has 4.*--new_head"):
        run_finetuning(folder, model=model)
    run = run_finetuning(folder, model=model, new_head=True, max_steps=1)
    assert list(AutoConfig.from_pretrained(run / "model").id2label.values()) == list(COLOURS)[:4]


# Settings


@pytest.mark.parametrize(
    "change",
    [
        *({name: value} for name, value in EVERYTHING.items() if name != "ema_decay"),
        *({"base_lr": 0.1}, {"min_lr": 0.02}, {"weight_decay": 5.0}, {"layer_decay": 0.9}, {"adam_beta1": 0.5}),
        *({"adam_beta2": 0.5}, {"warmup_epochs": 0.5}, {"classifier_pooling": "cls"}, {"seed": 1}),
        *({"max_grad_norm": 0.01}, {"random_init": True}),
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_setting_counts(change: dict[str, Any], finished: Path, tmp_path: Path) -> None:
    plain = _six_steps(finished)
    run = run_finetuning(finished, output_dir=str(tmp_path / "run"), max_steps=6, max_images=24, **change)
    assert losses(run) != plain


@functools.cache
def _six_steps(folder: Path) -> list[float]:
    return losses(run_finetuning(folder, output_dir=str(folder / "plain"), max_steps=6, max_images=24))


def test_neither_workers_nor_recomputing_change_the_course(folder: Path) -> None:
    same_course = EVERYTHING | {"max_steps": 4}
    first = run_finetuning(folder, **same_course)
    with_workers = run_finetuning(folder, **same_course, num_workers=2, output_dir=str(folder / "w"))
    assert course(with_workers) == course(first)
    recomputed = run_finetuning(folder, **same_course, gradient_checkpointing=True, output_dir=str(folder / "c"))
    assert losses(recomputed) == pytest.approx(losses(first), rel=1e-5)
    assert course(recomputed)[0][-1] == pytest.approx(course(first)[0][-1], rel=1e-5)  # the gradient's norm


def test_accumulated_gradients_are_those_of_the_whole_batch(folder: Path) -> None:
    whole = run_finetuning(folder, label_smoothing=0.1)
    parts = {"per_device_batch_size": 4, "gradient_accumulation_steps": 2, "output_dir": str(folder / "parts")}
    accumulated = run_finetuning(folder, label_smoothing=0.1, **parts)
    assert len(losses(whole)) == 16
    assert results(accumulated / "model")[0]["protocol"] == "fine-tuning for 4 epochs from MiCL"
    for some, others in zip(course(whole), course(accumulated), strict=True):
        assert others == pytest.approx(some, rel=1e-4)


# The moving average


def test_the_average_is_stored_and_judged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Worked out by hand from the weights after each step."""
    raw: list[dict[str, torch.Tensor]] = []
    scores: list[torch.Tensor] = []
    update, predict = AveragedModel.update_parameters, supervised.predict

    def spy_on_update(self: AveragedModel, model: torch.nn.Module) -> None:
        raw.append({name: values.detach().clone() for name, values in model.state_dict().items()})
        update(self, model)

    def spy_on_predict(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        scores.append(predict(*args)[0])
        return predict(*args)

    monkeypatch.setattr(AveragedModel, "update_parameters", spy_on_update)
    monkeypatch.setattr(supervised, "predict", spy_on_predict)
    run = run_finetuning(folder, ema_decay=0.8, base_lr=0.2, eval_epochs=1, drop_path_rate=0.5)
    averages = raw[:1]
    for state in raw[1:]:
        averages.append({name: 0.8 * values + 0.2 * state[name] for name, values in averages[-1].items()})
    torch.testing.assert_close(weights(run / "model"), averages[-1], rtol=1e-4, atol=1e-6)
    assert same(weights(run / "checkpoints" / "step-000016"), raw[-1])

    pictures = coloured(true_labels(21, 4), seed=21)
    assert (len(raw), len(scores)) == (16, 5)  # evaluations before the first step and after each epoch
    for step, found in zip((4, 8, 12, 16), scores[1:], strict=True):
        torch.testing.assert_close(found, logits_of(run / "model", pictures, averages[step - 1]), rtol=1e-3, atol=1e-4)
        assert (found - logits_of(run / "model", pictures, raw[step - 1])).abs().max() > 0.02


# Stopping and resuming


@pytest.mark.parametrize("options", [{}, {"num_workers": 2}, {"gradient_accumulation_steps": 2}], ids=str)
def test_a_resumed_run_is_the_uninterrupted_one(
    options: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, with everything random and the moving average; one break is planned, one is asked for."""
    options = EVERYTHING | {"eval_epochs": 1} | options
    whole = run_finetuning(folder, **options, max_steps=7, output_dir=str(folder / "whole"))
    run_finetuning(folder, **options, max_steps=3)
    shutil.rmtree(folder / "run" / "model")
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "StopRequest", lambda: SimpleNamespace(came=True))
        run = run_finetuning(folder, **options, max_steps=7)
    assert 3 < len(losses(run)) < 7
    assert not (run / "model").exists()
    run_finetuning(folder, **options, max_steps=7)
    assert course(run) == course(whole)
    assert logged_accuracies(run)[-1] == logged_accuracies(whole)[-1]
    for place in ("model", "checkpoints/step-000007"):
        assert same(weights(run / place), weights(whole / place))


# What is refused


def test_nothing_is_written_before_all_is_checked(folder: Path) -> None:
    bad_data = write_colours(folder / "bad", "train", 16, labels=[0] * 16, kind=datasets.Value("int64"))
    write_colours(folder / "few", "train", 7)
    for change, reason in (
        ({"dataset": str(bad_data)}, "no label column"),
        ({"dataset": str(folder / "few")}, "lower per_device_batch_size to at most 7"),
        ({"eval_split": "validation"}, "no split 'validation'"),
        ({"model": str(folder / "nowhere")}, "is no local path, and not a model on the Hub"),
        ({"rand_augment": "rand-m9-mstd"}, "rand_augment='rand-m9-mstd' is no policy"),
        ({"per_device_batch_size": 7, "mixup_alpha": 0.8}, "per_device_batch_size=7 must be even"),
        ({"model": None}, "name a portable folder or a Hub id with --model"),
    ):
        with pytest.raises(ValueError, match=reason):
            run_finetuning(folder, **change)
        assert not (folder / "run").exists(), change
    run_finetuning(folder, per_device_batch_size=7, max_steps=1)


def test_a_mistyped_flag_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_settings(FinetuneConfig, "training.finetune", ["--model", "x", "--mixup_alhpa", "0"])
    assert "unknown flag --mixup_alhpa: did you mean 'mixup_alpha'?" in capsys.readouterr().err


def test_without_labelled_test_images_there_are_no_results(tmp_path: Path) -> None:
    write_colours(tmp_path / "data", "train", 16)
    save_encoder(tmp_path / "encoder")
    run = run_finetuning(tmp_path, max_steps=2, eval_epochs=1)
    assert results(run / "model") == logged_accuracies(run) == []
    assert "Not evaluated yet." in (run / "model" / "README.md").read_text()
