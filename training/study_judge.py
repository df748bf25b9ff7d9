"""Judging the runs of a study: kNN and the fast linear probe, of [CLS] and of the mean of the patches."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from modeling_micl import MiclForPreTraining, MiclModel
from modeling_micl.configuration_micl import height_and_width
from training.batch import Batch
from training.classifier_config import FinetuneConfig
from training.features import (
    BASELINES,
    Extractor,
    LabelledFeatures,
    extract_features,
    normalize_pixels,
    with_centred_pixels,
)
from training.judge import FAST
from training.labels import few_shot
from training.parser import parse_settings
from training.processes import use_all_cores
from training.results import METRICS, add_results, read_evaluation, result
from training.scores import score_features
from training.source import open_split
from training.study_plan import PlannedRun


KNN = "kNN, k=20, cosine, votes weighted by exp(cosine / 0.07), whole central crop"
PROTOCOLS = {"knn": KNN, "probe": FAST}
FINETUNE = "training.finetune"
Scores = dict[str, dict[str, float]]  # by the features' name, then by the protocol's


def pooled(encoder: MiclModel, accelerator: Accelerator) -> Extractor:
    """[CLS] and the mean of the patches beside each other, from one pass."""

    def extract(batch: Batch) -> Tensor:
        with accelerator.autocast():
            states = encoder(normalize_pixels(batch.pixels)).last_hidden_state
        return torch.cat([states[:, 0], states[:, 1:].mean(dim=1)], dim=1).float()

    return extract


def split_pooled(found: LabelledFeatures) -> LabelledFeatures:
    """The two parts of what `pooled` gives, each by its name, and the other features as they are."""
    cls, mean = found.features["both"].chunk(2, dim=1)
    others = {name: values for name, values in found.features.items() if name != "both"}
    return LabelledFeatures({"cls": cls, "mean": mean} | others, found.labels)


def protocols(shares: Sequence[float]) -> dict[str, str]:
    """How features are judged, in words: with all labels, and with each of these shares of them."""
    few = {
        few_labels(name, share): f"{words}; {share:.3g} of each class's labels"
        for share in shares
        for name, words in PROTOCOLS.items()
    }
    return PROTOCOLS | few


def few_labels(protocol: str, share: float) -> str:
    """The name of a protocol with a share of the labels."""
    return f"{protocol}, {100 * share:.3g} %"


def scores_of(train: LabelledFeatures, test: LabelledFeatures, shares: Sequence[float] = (), seed: int = 0) -> Scores:
    """Top-1 accuracies in [0, 1] of each kind of features, with all labels and with shares of them drawn by a seed."""
    found: Scores = {name: {} for name in train.features}
    for share in (1.0, *shares):
        chosen = few_shot(train.labels, share, seed)
        part = LabelledFeatures(
            {name: values[chosen] for name, values in train.features.items()}, train.labels[chosen]
        )
        scores = score_features(part, test, with_probe=True)
        for kind, accuracies in (("knn", scores.knn), ("probe", scores.probe)):
            for name, value in accuracies.items():
                found[name][kind if share == 1 else few_labels(kind, share)] = value
    return found


def judge_run(run: PlannedRun, images: int) -> None:
    """Add a run's scores to its eval.json.

    Args:
        run: trained.
        images: of each split to judge by.
    """
    accelerator = start_judging(run)
    encoder = MiclModel.from_pretrained(run.folder / "model").eval().to(accelerator.device)
    judge(run, accelerator, {"both": pooled(encoder, accelerator)}, run.judged_on, images, run.folder / "model")


def judge_references(run: PlannedRun, split: str, images: int, folder: Path) -> None:
    """Write to a folder's eval.json how pixels and colour histograms do, and the run's encoder with random weights.

    Args:
        run: names the data and the encoder.
        split: to classify.
        images: of each split to judge by.
        folder: for eval.json.
    """
    accelerator = start_judging(run)
    set_seed(run.config.seed)
    encoder = MiclForPreTraining(run.config.model_config()).vit.eval().to(accelerator.device)
    judge(run, accelerator, BASELINES | {"both": pooled(encoder, accelerator)}, split, images, folder)


def start_judging(run: PlannedRun) -> Accelerator:
    """One process, with the precision of training."""
    accelerator = Accelerator(mixed_precision=run.config.mixed_precision)
    use_all_cores(accelerator)
    return accelerator


def judge(
    run: PlannedRun, accelerator: Accelerator, extractors: dict[str, Extractor], split: str, images: int, folder: Path
) -> None:
    """Add the scores of some features to a folder's eval.json."""
    sources = [open_split(run.config, name) for name in ("train", split)]
    size = height_and_width(run.config.model_config().image_size)
    found = [extract_features(accelerator, source, extractors, size, images, num_workers=0) for source in sources]
    train, test = with_centred_pixels(*map(split_pooled, found))
    words = protocols(run.few_shot)
    entries = [
        result(
            "training.study",
            run.config,
            sources[1],
            len(test.labels),
            protocol=words[protocol],
            value=value,
            seed=run.config.seed,
            max_images=images,
            features=name,
            train_split="train",
            train_fingerprint=sources[0].fingerprint,
            num_train_images=len(train.labels),
        )
        for name, values in scores_of(train, test, run.few_shot, run.config.seed).items()
        for protocol, value in values.items()
    ]
    add_results(folder, entries)


def stored_scores(folder: Path, split: str, images: int, shares: Sequence[float] = ()) -> Scores:
    """What `judge` has found for a split with so many images; empty where it has not judged so yet."""
    names = {words: name for name, words in protocols(shares).items()}
    found: Scores = {}
    for entry in read_evaluation(folder)["results"]:
        if entry["split"] == split and entry["max_images"] == images and entry["protocol"] in names:
            found.setdefault(entry["features"], {})[names[entry["protocol"]]] = entry["value"]
    complete = all(values.keys() == set(names.values()) for values in found.values())
    return found if complete else {}


def finetuned_evaluation(finetuning: list[str]) -> dict[str, Any]:
    """What is known of a fine-tuning, by its command line."""
    config = parse_settings(FinetuneConfig, FINETUNE, finetuning)
    return read_evaluation(Path(config.output_dir) / "model")


def finetuned_accuracy(finetuning: list[str]) -> float | None:
    """Its top-1 accuracy; None where it has not ended yet."""
    found = finetuned_evaluation(finetuning)["results"]
    return next((float(entry["value"]) for entry in found if entry["metric"] == METRICS["top1_accuracy"]), None)
