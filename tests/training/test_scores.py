"""The scores of frozen features."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from training import scores as scores_module
from training.batch import Batch
from training.features import BASELINES
from training.scores import frozen_scores, knn_table
from training.source import ImageSource, open_source


Write = Callable[..., Path]


@pytest.fixture
def splits(write_shards: Write) -> tuple[ImageSource, ImageSource]:
    """48 and 20 labelled images."""
    write_shards(20, split="test")
    folder = str(write_shards(30, 18))
    return open_source(folder), open_source(folder, "test")


def told(batch: Batch) -> Tensor:
    """Labels, and noise."""
    return torch.cat([torch.eye(4)[batch.labels], 0.1 * untold(batch)], dim=1)


def untold(batch: Batch) -> Tensor:
    return torch.randn(len(batch.labels), 5)


@pytest.mark.usefixtures("no_accelerator")
def test_features_that_tell_the_labels_score_best(splits: tuple[ImageSource, ImageSource]) -> None:
    torch.manual_seed(0)
    extractors = {"told": told, "untold": untold}
    scores = frozen_scores(Accelerator(), extractors, splits, (16, 16), 1000, 0, with_probe=True)
    assert (scores.num_train_images, scores.num_test_images) == (48, 20)
    for found in (scores.knn, scores.probe):
        assert found.keys() == {"told", "untold"}
        assert found["told"] > 0.8
        assert found["untold"] < 0.6
    assert frozen_scores(Accelerator(), extractors, splits, (16, 16), 1000, 0).probe == {}
    assert "told" in knn_table(scores)
    assert "100.0%" in knn_table(scores)


@pytest.mark.usefixtures("no_accelerator")
def test_a_probe_is_fitted_to_images_of_the_first_split_only(
    splits: tuple[ImageSource, ImageSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted: list[tuple[Tensor, Tensor]] = []
    fit = scores_module.fit_probe

    def spy(features: Tensor, labels: Tensor, *rest: Any) -> Any:
        fitted.append((features, labels))
        return fit(features, labels, *rest)

    monkeypatch.setattr(scores_module, "fit_probe", spy)
    extractors = {"number": lambda batch: torch.cat([batch.index[:, None], batch.pixels[:, 0, 0]], dim=1).float()}
    frozen_scores(Accelerator(), extractors, splits, (16, 16), 1000, 0, with_probe=True)
    ((features, labels),) = fitted
    assert features[:, 0].tolist() == list(range(48))
    assert labels.tolist() == [number % 4 for number in range(48)]


@pytest.mark.usefixtures("no_accelerator")
def test_baselines_come_with_mean_centred_pixels(splits: tuple[ImageSource, ImageSource]) -> None:
    scores = frozen_scores(Accelerator(), BASELINES, splits, (16, 16), 30, 0)
    assert scores.knn.keys() == {"mean-centred pixels", "raw pixels", "colour histogram"}
    assert (scores.num_train_images, scores.num_test_images) == (30, 20)


@pytest.mark.usefixtures("no_accelerator")
@pytest.mark.parametrize("broken", ["train", "test"])
def test_a_split_without_any_image_gives_no_scores(broken: str, write_shards: Write) -> None:
    write_shards(12, split="test", broken=range(12) if broken == "test" else ())
    folder = str(write_shards(12, broken=range(12) if broken == "train" else ()))
    splits = (open_source(folder), open_source(folder, "test"))
    scores = frozen_scores(Accelerator(), BASELINES, splits, (16, 16), 30, 0, with_probe=True)
    assert scores.knn == scores.probe == {}
    assert knn_table(scores) == "no kNN accuracy: the images have no labels"
