"""What frozen features are worth amid pre-training and after it: accuracies, their entries of eval.json and table."""

from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator

from modeling_micl import MiclForPreTraining
from modeling_micl.configuration_micl import height_and_width
from training.config import PretrainConfig
from training.features import (
    BASELINES,
    Extractor,
    LabelledFeatures,
    encoder_features,
    extract_features,
    with_centred_pixels,
)
from training.judge import fit_probe, knn_accuracy
from training.results import TRAINED, UNTRAINED, result, table
from training.source import ImageSource


KNN_PROTOCOL = "kNN, k=20, cosine, votes weighted by exp(cosine / 0.07), [CLS] of the whole central crop"


@dataclass
class FrozenScores:
    """Top-1 accuracies in [0, 1] by the features' name, and the labelled images they come from."""

    knn: dict[str, float]
    probe: dict[str, float]
    num_train_images: int
    num_test_images: int


def frozen_scores(
    accelerator: Accelerator,
    extractors: dict[str, Extractor],
    splits: tuple[ImageSource, ImageSource],
    size: tuple[int, int],
    max_images: int,
    num_workers: int,
    with_probe: bool = False,
) -> FrozenScores:
    """Judge each extractor's features: the first split votes or is learned from, the second is classified.

    There are no accuracies if one of the splits has no labels.
    """
    train, test = (extract_features(accelerator, split, extractors, size, max_images, num_workers) for split in splits)
    return score_features(*with_centred_pixels(train, test), with_probe)


def score_features(train: LabelledFeatures, test: LabelledFeatures, with_probe: bool) -> FrozenScores:
    """As `frozen_scores`, of features that are there already."""
    scores = FrozenScores({}, {}, len(train.labels), len(test.labels))
    for name in train.features if len(train.labels) and len(test.labels) else ():
        votes, queries = train.features[name], test.features[name]
        scores.knn[name] = knn_accuracy(votes, train.labels, queries, test.labels)
        if with_probe:
            probe = fit_probe(votes, train.labels, int(train.labels.max()) + 1)
            scores.probe[name] = float((probe.scores(queries).argmax(dim=1) == test.labels).float().mean())
    return scores


def final_scores(
    accelerator: Accelerator,
    untrained: MiclForPreTraining,
    trained: MiclForPreTraining,
    splits: tuple[ImageSource, ImageSource],
    max_images: int,
    num_workers: int,
) -> FrozenScores:
    """Judge features that learn nothing, and those of the encoder before and after training."""
    extractors = BASELINES | {
        UNTRAINED: encoder_features(untrained.vit.eval(), accelerator),
        TRAINED: encoder_features(trained.vit.eval(), accelerator),
    }
    size = height_and_width(trained.config.image_size)
    return frozen_scores(accelerator, extractors, splits, size, max_images, num_workers)


def knn_results(
    scores: FrozenScores, config: PretrainConfig, splits: tuple[ImageSource, ImageSource]
) -> list[dict[str, Any]]:
    """Entries of eval.json at the end of pre-training."""
    train, test = splits
    return [
        result(
            "training.pretrain",
            config,
            test,
            scores.num_test_images,
            protocol=KNN_PROTOCOL,
            value=accuracy,
            seed=config.seed,
            features=name,
            train_split=train.split,
            train_fingerprint=train.fingerprint,
            num_train_images=scores.num_train_images,
        )
        for name, accuracy in scores.knn.items()
    ]


def knn_table(scores: FrozenScores) -> str:
    """A table of the final scores of pre-training."""
    if not scores.knn:
        return "no kNN accuracy: the images have no labels"
    title = f"kNN accuracy on {scores.num_test_images} test images (top-1, k = 20)"
    return table(title, {name: f"{accuracy:6.1%}" for name, accuracy in scores.knn.items()})
