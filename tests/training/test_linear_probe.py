"""Linear probes by both protocols, against a probe that is put together by hand from the stored encoder and images."""

import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from classifier_runs import (
    COLOURS,
    coloured,
    course,
    logged_accuracies,
    logits_of,
    losses,
    results,
    run_finetuning,
    run_probe,
    same,
    save_encoder,
    true_labels,
    weights,
    write_colours,
)
from conftest import renormalize
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from modeling_micl import MiclForImageClassification, MiclForPreTraining
from training import linear_probe
from training.judge import fit_probe
from training.linear_probe import fold_batch_norm, with_batch_norm


TRAIN, TEST, WRONG = 72, 41, 9  # some test labels are wrong on purpose, so that accuracies are not simply 1
NAMES = list(COLOURS)
PUBLISHED: dict[str, Any] = {"protocol": "published", "base_lr": 64.0, "per_device_batch_size": 24}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a data set of seven colours and an encoder."""
    write_colours(tmp_path / "data", "train", TRAIN, classes=7)
    write_colours(tmp_path / "data", "test", TEST, classes=7, wrong=WRONG)
    save_encoder(tmp_path / "encoder")
    return tmp_path


def pictures(split: str) -> list[Any]:
    length = TRAIN if split == "train" else TEST
    return coloured(true_labels(length, 7), seed=length)


@torch.no_grad()
def encoded(model: Path, split: str) -> Tensor:
    """[CLS] of a split's images."""
    pixels = AutoImageProcessor.from_pretrained(model)(pictures(split), return_tensors="pt")
    features: Tensor = AutoModel.from_pretrained(model).eval()(**pixels).pooler_output
    return features


def accuracy(logits: Tensor) -> float:
    """Of logits of the test images."""
    return float((logits.argmax(dim=1) == torch.tensor(true_labels(TEST, 7, WRONG))).float().mean())


# The fast protocol


def test_the_fast_probe_is_one_fitted_by_hand(folder: Path) -> None:
    run = run_probe(folder, few_shot=[0.5])
    labels = torch.tensor(true_labels(TRAIN, 7))
    probe = fit_probe(encoded(folder / "encoder", "train"), labels, 7, seed=0)
    expected = probe.scores(encoded(folder / "encoder", "test"))
    found = logits_of(run / "model", pictures("test"))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)

    top1, top5 = results(run / "model")
    assert [top1["metric"], top5["metric"]] == ["top-1 accuracy", "top-5 accuracy"]
    assert top1["value"] == pytest.approx(accuracy(found))
    assert 1.5 / 7 < top1["value"] < top5["value"]
    assert top1["details"] == {
        "learning_rate": probe.learning_rate,
        "weight_decay": probe.weight_decay,
        "held_out_accuracy": probe.held_out_accuracy,
    }
    facts = ("split", "num_test_images", "num_train_images", "label_share", "features", "seed", "model")
    expected_facts = ["test", TEST, TRAIN, 1.0, "cls of the encoder", 0, str(folder / "encoder")]
    assert [top1[name] for name in facts] == expected_facts
    assert top1["command"].startswith("python -m training.linear_probe")


def test_the_fast_probes_classifier_keeps_its_encoders_normalisation(folder: Path) -> None:
    renormalize(folder / "encoder")
    run = run_probe(folder, few_shot=[])
    expected = fit_probe(encoded(folder / "encoder", "train"), torch.tensor(true_labels(TRAIN, 7)), 7, seed=0)
    scores = expected.scores(encoded(folder / "encoder", "test"))
    torch.testing.assert_close(logits_of(run / "model", pictures("test")), scores, rtol=1e-3, atol=1e-3)


def test_the_encoders_folder_gets_all_results_the_classifiers_only_its_own(folder: Path) -> None:
    run = run_probe(folder, few_shot=[0.5, 0.2])
    shares = [(entry["label_share"], entry["num_train_images"]) for entry in results(folder / "encoder")[::2]]
    assert shares == [(1.0, 72), (0.5, 37), (0.2, 14)]
    assert results(run / "model") == results(folder / "encoder")[:2]
    assert {path.name for path in run.iterdir()} == {"model"}


def test_the_fast_probes_classifier_is_the_encoder_with_a_head_on_cls(folder: Path) -> None:
    run = run_probe(folder)
    config = AutoConfig.from_pretrained(run / "model")
    assert list(config.id2label.values()) == NAMES
    assert config.classifier_pooling == "cls"
    given = MiclForPreTraining.from_pretrained(folder / "encoder").vit.state_dict()
    kept = weights(run / "model")
    assert kept.keys() - {f"vit.{name}" for name in given} == {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(kept[f"vit.{name}"], values) for name, values in given.items())


def test_the_mean_of_the_patches_is_probed_without_writing_a_classifier(folder: Path) -> None:
    """There is none whose head sees it: those with mean pooling lack the encoder's final norm."""
    run_probe(folder)
    run = run_probe(folder, features="mean", output_dir=str(folder / "mean"))
    assert not (run / "model").exists()
    by_features = {entry["features"]: entry["value"] for entry in results(folder / "encoder")[::2]}
    assert by_features.keys() == {"cls of the encoder", "mean of the encoder"}


def test_random_weights_are_the_comparison(folder: Path) -> None:
    run_probe(folder)
    run = run_probe(folder, random_init=True, output_dir=str(folder / "random"))
    names = [entry["features"] for entry in results(folder / "encoder")[::2]]
    assert names == ["cls of the encoder", "cls of random weights"]
    assert accuracy(logits_of(run / "model", pictures("test"))) == pytest.approx(results(run / "model")[0]["value"])
    random, given = weights(run / "model"), weights(folder / "encoder")
    assert not torch.equal(random["vit.layers.0.mlp.fc1.weight"], given["vit.layers.0.mlp.fc1.weight"])


def test_a_classifiers_features_are_probed_without_writing_another(folder: Path) -> None:
    """They are its own, after its pooling and norm, which a head on [CLS] would not see."""
    model = run_finetuning(folder, output_dir=str(folder / "tuned"), max_steps=40, epochs=10) / "model"
    run = run_probe(folder, model=str(model))
    assert not (run / "model").exists()
    assert results(model)[-2]["protocol"] == linear_probe.FAST
    assert results(model)[-2]["value"] > 0.6


def test_results_of_a_model_from_the_hub_are_all_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = folder / "hub" / "models--someone--encoder"
    shutil.copytree(folder / "encoder", stored / "snapshots" / "abc")
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(folder)
    run = run_probe(folder, model="someone/encoder", few_shot=[0.5])
    assert [entry["label_share"] for entry in results(run / "model")] == [1.0, 1.0, 0.5, 0.5]
    assert not (folder / "someone").exists()


def test_what_cannot_be_probed_is_refused(folder: Path) -> None:
    for change, reason in (
        ({"protocol": "published", "features": "mean"}, "features='mean' goes with protocol='fast' only"),
        ({"model": str(folder / "data")}, "is no model: it has no config.json"),
        ({"max_images": 9}, "needs at least 10 labelled images, got 9"),
        ({"eval_split": "validation"}, "no split 'validation'"),
        ({"protocol": "published", "model": str(folder / "data")}, "is no model: it has no config.json"),
    ):
        with pytest.raises(ValueError, match=reason):
            run_probe(folder, **change)
        assert not (folder / "run").exists(), change
    write_colours(folder / "other", "train", 16, classes=4)
    write_colours(folder / "other", "test", 16, classes=3)
    for protocol in ("fast", "published"):
        with pytest.raises(ValueError, match="splits 'train' and 'test' have different classes"):
            run_probe(folder, dataset=str(folder / "other"), protocol=protocol)


# The published protocol


def test_the_published_probe_learns_and_leaves_the_encoder_alone(folder: Path) -> None:
    run = run_probe(folder, **PUBLISHED, epochs=40, eval_epochs=20, crop_min_scale=0.5)
    given, kept = MiclForPreTraining.from_pretrained(folder / "encoder").vit.state_dict(), weights(run / "model")
    assert all(torch.equal(kept[f"vit.{name}"], values) for name, values in given.items())
    assert losses(run)[0] == pytest.approx(math.log(7), abs=0.1)
    assert sum(losses(run)[-9:]) / 9 < 0.6 * losses(run)[0]
    top1 = results(run / "model")[0]["value"]
    assert top1 > 0.6
    assert top1 == pytest.approx(accuracy(logits_of(run / "model", pictures("test"))))
    assert [logged_accuracies(run)[n] for n in (0, -1)] == [pytest.approx(1 / 7, abs=0.2), top1]
    assert results(run / "model")[0]["protocol"] == linear_probe.PUBLISHED
    assert results(folder / "encoder") == results(run / "model")
    assert "linear probe as published" in (run / "model" / "README.md").read_text()


def test_batch_norm_is_folded_into_the_stored_head(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = AutoImageProcessor.from_pretrained(folder / "encoder")(pictures("test"), return_tensors="pt")
    before: list[Tensor] = []

    @torch.no_grad()
    def spy(model: MiclForImageClassification) -> MiclForImageClassification:
        assert (model.fc_norm.running_var - 1).abs().max() > 0.2
        before.append(model.eval()(**pixels).logits)
        return fold_batch_norm(model)

    monkeypatch.setattr(linear_probe, "fold_batch_norm", spy)
    run = run_probe(folder, **PUBLISHED)
    torch.testing.assert_close(logits_of(run / "model", pictures("test")), before[0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_fold_holds_for_any_statistics(folder: Path) -> None:
    save_encoder(folder / "encoder")
    model = with_batch_norm(
        MiclForImageClassification.from_pretrained(folder / "encoder", classifier_pooling="cls", num_labels=7)
    ).eval()
    generator = torch.Generator().manual_seed(0)
    assert isinstance(model.fc_norm, torch.nn.BatchNorm1d)
    model.fc_norm.running_mean.copy_(torch.randn(32, generator=generator))
    model.fc_norm.running_var.copy_(torch.rand(32, generator=generator) + 0.01)
    model.classifier.bias.copy_(torch.randn(7, generator=generator))
    pixels = torch.randn(5, 3, 16, 16, generator=generator)
    before = model(pixels).logits
    torch.testing.assert_close(fold_batch_norm(model)(pixels).logits, before, rtol=0, atol=1e-5)


def test_only_the_head_is_trained_and_begins_small(folder: Path) -> None:
    model = with_batch_norm(
        MiclForImageClassification.from_pretrained(folder / "encoder", classifier_pooling="cls", num_labels=100)
    )
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "classifier.weight",
        "classifier.bias",
    }
    assert float(model.classifier.weight.detach().std()) == pytest.approx(0.01, rel=0.05)
    assert (model.fc_norm.eps, model.fc_norm.affine) == (1e-6, False)


def test_a_tuned_encoder_is_probed_without_its_drop_path(folder: Path) -> None:
    """The same forward pass twice gives the same loss, as nothing else in it is random."""
    model = run_finetuning(folder, output_dir=str(folder / "tuned"), drop_path_rate=0.9, max_steps=1) / "model"
    options = {"model": str(model), "max_steps": 2, "crop_min_scale": 1.0, "horizontal_flip": False, "base_lr": 0.0}
    run = run_probe(folder, protocol="published", **options, per_device_batch_size=TRAIN)
    assert losses(run)[0] == pytest.approx(losses(run)[1], rel=1e-6)


def test_a_resumed_probe_is_the_uninterrupted_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run_probe(folder, **PUBLISHED, max_steps=7, output_dir=str(folder / "whole"))
    run_probe(folder, **PUBLISHED, max_steps=3)
    shutil.rmtree(folder / "run" / "model")
    with monkeypatch.context() as patch:
        patch.setattr(linear_probe, "StopRequest", lambda: SimpleNamespace(came=True))
        run = run_probe(folder, **PUBLISHED, max_steps=7)
    assert not (run / "model").exists()
    assert len(losses(run)) == 4
    run_probe(folder, **PUBLISHED, max_steps=7)
    assert course(run) == course(whole)
    assert same(weights(run / "model"), weights(whole / "model"))
