"""Features and kNN, against loops and numbers by hand."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from modeling_micl import MiclModel, MiclPreTrainedModel
from training.features import (
    LabelledFeatures,
    colour_histogram,
    encoder_features,
    extract_features,
    knn_accuracy,
    normalize_pixels,
    raw_pixels,
    with_centred_pixels,
)
from training.source import open_source


Write = Callable[..., Path]


def random_pixels(*shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))


def knn_in_loops(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, k: int, t: float) -> float:
    correct = 0
    for query, label in zip(test.double(), test_labels.tolist(), strict=True):
        cosines = [float(query @ row / (query.norm() * row.norm())) for row in train.double()]
        votes: dict[int, float] = defaultdict(float)
        for i in sorted(range(len(cosines)), key=lambda i: -cosines[i])[:k]:
            votes[int(train_labels[i])] += math.exp(cosines[i] / t)
        correct += max(votes, key=lambda c: votes[c]) == label
    return correct / len(test_labels)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 0.07), (20, 1.0), (60, 0.2)])
def test_knn_is_what_loops_give(k: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    train, test = (torch.randn(n, 6, generator=generator) for n in (60, 80))
    train_labels, test_labels = (torch.randint(0, 5, (n,), generator=generator) for n in (60, 80))
    train[:, 0] += train_labels
    test[:, 0] += test_labels
    expected = knn_in_loops(train, train_labels, test, test_labels, k, temperature)
    assert 0.05 < expected < 0.95
    assert knn_accuracy(train, train_labels, test, test_labels, k, temperature) == pytest.approx(expected)
    longer = 100 * torch.rand(60, 1, generator=generator) + 1  # length does not count
    assert knn_accuracy(train * longer, train_labels, test, test_labels, k, temperature) == pytest.approx(expected)


def test_knn_by_hand() -> None:
    """One voter at cosine 0.96 for class 0 against two at 0.8 for class 1: near wins when sharp, many when not."""
    train = torch.tensor([[0.96, 0.28], [0.8, 0.6], [0.8, -0.6], [-1.0, 0.0]])
    labels, query, truth = torch.tensor([0, 1, 1, 2]), torch.tensor([[2.0, 0.0]]), torch.tensor([0])
    assert knn_accuracy(train, labels, query, truth, k=3, temperature=0.07) == 1.0  # e^(0.16 / 0.07) = 9.8 > 2
    assert knn_accuracy(train, labels, query, truth, k=3, temperature=0.5) == 0.0  # e^(0.16 / 0.5) = 1.4 < 2
    assert knn_accuracy(train, labels, query, truth, k=1, temperature=0.5) == 1.0


def test_fewer_voters_than_asked_for_all_vote() -> None:
    train, labels = torch.eye(3), torch.tensor([0, 1, 2])
    assert knn_accuracy(train, labels, torch.eye(3), labels, k=20) == 1.0


def test_knn_goes_through_many_queries() -> None:
    test_labels = torch.arange(2500) % 3
    assert knn_accuracy(torch.eye(3), torch.arange(3), torch.eye(3)[test_labels], test_labels, k=1) == 1.0
    half_wrong = torch.where(torch.arange(2500) < 1250, test_labels, 7)  # a class that nobody votes for
    assert knn_accuracy(torch.eye(3), torch.arange(3), torch.eye(3)[test_labels], half_wrong, k=1) == 0.5


def test_pixels_are_normalised_as_imagenets() -> None:
    pixels = random_pixels(2, 4, 6)
    expected = (pixels.numpy().astype(np.float64) / 255 - IMAGENET_DEFAULT_MEAN) / IMAGENET_DEFAULT_STD
    found = normalize_pixels(pixels)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected.transpose(0, 3, 1, 2), atol=1e-6)


def test_raw_pixels_are_the_image_or_its_means() -> None:
    pixels = random_pixels(2, 4, 6)
    assert torch.equal(raw_pixels(pixels), pixels.permute(0, 3, 1, 2).flatten(1).float())
    large = random_pixels(1, 64, 96)
    expected = large.float().reshape(1, 32, 2, 32, 3, 3).mean(dim=(2, 4)).permute(0, 3, 1, 2).flatten(1)
    torch.testing.assert_close(raw_pixels(large), expected)


def test_centred_pixels_lose_the_mean_of_the_train_split_in_both_splits() -> None:
    train, test = (LabelledFeatures({"raw pixels": torch.rand(n, 12)}, torch.zeros(n)) for n in (5, 3))
    centred = with_centred_pixels(train, test)
    mean = train.features["raw pixels"].mean(dim=0)
    for before, after in zip((train, test), centred, strict=True):
        torch.testing.assert_close(after.features["mean-centred pixels"] + mean, before.features["raw pixels"])
        assert torch.equal(after.features["raw pixels"], before.features["raw pixels"])
    assert centred[0].features["mean-centred pixels"].mean(dim=0).abs().max() < 1e-6


def test_the_histogram_counts_colours() -> None:
    pixels = random_pixels(3, 5, 7)
    found = colour_histogram(pixels).square()
    assert found.shape == (3, 512)
    torch.testing.assert_close(found.sum(dim=1), torch.full((3,), 35.0))
    for image, counts in zip(pixels.tolist(), found, strict=True):
        colours = Counter(64 * (r // 32) + 8 * (g // 32) + b // 32 for row in image for r, g, b in row)
        torch.testing.assert_close(counts, torch.tensor([float(colours[bin_]) for bin_ in range(512)]))


def test_a_histogram_forgets_where_the_colours_were() -> None:
    pixels = random_pixels(1, 6, 6)
    assert torch.equal(colour_histogram(pixels), colour_histogram(pixels.flip(1)))


@pytest.fixture
def accelerator(no_accelerator: None) -> Accelerator:
    return Accelerator(mixed_precision="no")


def mean_colour(pixels: Tensor) -> Tensor:
    return pixels.float().mean(dim=(1, 2))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("streaming", [True, False])
def test_features_come_in_the_order_of_the_data(
    streaming: bool, workers: int, write_shards: Write, accelerator: Accelerator
) -> None:
    source = open_source(str(write_shards(150, 7, 13)), streaming=streaming)
    found = extract_features(accelerator, source, {"colour": mean_colour}, (16, 20), 1000, workers)
    assert found.labels.tolist() == [index % 4 for index in range(170)]
    means = [mean_colour_of(source, index) for index in range(170)]
    torch.testing.assert_close(found.features["colour"], torch.tensor(np.array(means)), atol=1e-3, rtol=0)


def mean_colour_of(source: object, index: int) -> np.ndarray:
    coarse = np.random.default_rng(index).integers(0, 256, (4, 5, 3), dtype=np.uint8)  # as in conftest
    picture = Image.fromarray(coarse).resize((20, 16), Image.Resampling.BICUBIC)
    return np.asarray(picture, np.float32).mean(axis=(0, 1))


def test_unlabelled_images_are_left_out(tmp_path: Path, accelerator: Accelerator) -> None:
    images = [{"bytes": None, "path": str(tmp_path / f"{n}.png")} for n in range(6)]
    for n, image in enumerate(images):
        Image.new("RGB", (8, 8), (40 * n, 0, 0)).save(image["path"])
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=3)})
    columns = {"image": images, "label": [0, None, 2, -1, 1, None]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "some.parquet")
    source = open_source(str(tmp_path / "some.parquet"))
    found = extract_features(accelerator, source, {"colour": mean_colour}, (8, 8), 100, 0)
    assert found.labels.tolist() == [0, 2, 1]
    assert found.features["colour"][:, 0].tolist() == [0, 80, 160]


def test_encoder_features_are_the_class_token_of_the_whole_image(
    tiny_model: Callable[..., MiclPreTrainedModel], accelerator: Accelerator
) -> None:
    model = tiny_model(MiclModel)
    pixels = random_pixels(3, 32, 32)
    with torch.no_grad():
        expected = model(normalize_pixels(pixels)).last_hidden_state[:, 0]
        assert torch.equal(encoder_features(model, accelerator)(pixels), expected)
