"""Features against loops and numbers by hand, and their cache."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from transformers import ViTImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from modeling_micl import MiclForImageClassification, MiclForPreTraining, MiclModel, MiclPreTrainedModel
from training.batch import Batch
from training.features import (
    IMAGENET,
    LabelledFeatures,
    cached_features,
    colour_histogram,
    encoder_features,
    extract_features,
    normalize_pixels,
    raw_pixels,
    stored_normalization,
    weights_digest,
    with_centred_pixels,
)
from training.source import open_source


Write = Callable[..., Path]
Model = Callable[..., MiclPreTrainedModel]


def random_pixels(*shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))


def test_pixels_are_normalised_as_imagenets() -> None:
    pixels = random_pixels(2, 4, 6)
    expected = (pixels.numpy().astype(np.float64) / 255 - IMAGENET_DEFAULT_MEAN) / IMAGENET_DEFAULT_STD
    found = normalize_pixels(pixels)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected.transpose(0, 3, 1, 2), atol=1e-6)


def stored_processor(folder: Path, **settings: Any) -> ViTImageProcessor:
    """A stored processor that neither resizes nor crops."""
    processor = ViTImageProcessor(do_resize=False, **settings)
    processor.save_pretrained(folder)
    return processor


@torch.no_grad()
@pytest.mark.parametrize(
    "settings",
    [
        {"image_mean": [0.5] * 3, "image_std": [0.5] * 3},
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]},
        {"do_normalize": False},
        {"do_rescale": False},
        {"rescale_factor": 1 / 127.5, "image_mean": 1.0, "image_std": 0.3},
    ],
    ids=str,
)
def test_frozen_features_are_of_images_as_the_models_own_processor_normalises_them(
    settings: dict[str, Any], tmp_path: Path, tiny_model: Model, accelerator: Accelerator, batch: Batch
) -> None:
    model, processor = tiny_model(MiclModel), stored_processor(tmp_path, **settings)
    pixel_values = processor([Image.fromarray(image.numpy()) for image in batch.pixels], return_tensors="pt")
    expected = model(**pixel_values).pooler_output
    found = encoder_features(model, accelerator, normalization=stored_normalization(str(tmp_path)))(batch)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (expected - encoder_features(model, accelerator)(batch)).abs().max() > 0.01


def test_a_folder_without_an_image_processor_is_taken_for_imagenets(tmp_path: Path) -> None:
    assert stored_normalization(str(tmp_path)) == IMAGENET
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match=f"The image processor of {str(tmp_path)!r} cannot be read"):
        stored_normalization(str(tmp_path))


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


def mean_colour(batch: Batch) -> Tensor:
    return batch.pixels.float().mean(dim=(1, 2))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("streaming", [True, False])
def test_features_come_in_the_order_of_the_data(
    streaming: bool, workers: int, write_shards: Write, accelerator: Accelerator
) -> None:
    source = open_source(str(write_shards(150, 7, 13)), streaming=streaming)
    found = extract_features(accelerator, source, {"colour": mean_colour}, (16, 20), 1000, workers)
    assert found.labels.tolist() == [index % 4 for index in range(170)]
    means = [mean_colour_of(index) for index in range(170)]
    torch.testing.assert_close(found.features["colour"], torch.tensor(np.array(means)), atol=1e-3, rtol=0)


def mean_colour_of(index: int) -> np.ndarray:
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


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_broken_images_gives_no_features(
    workers: int, write_shards: Write, accelerator: Accelerator
) -> None:
    source = open_source(str(write_shards(5, broken=range(5))))
    found = extract_features(accelerator, source, {"colour": mean_colour}, (8, 8), None, workers)
    assert len(found.labels) == len(found.features["colour"]) == 0


def test_broken_images_are_named_and_not_counted(
    write_shards: Write, accelerator: Accelerator, capsys: pytest.CaptureFixture[str]
) -> None:
    source = open_source(str(write_shards(9, broken=[2, 5])))
    found = extract_features(accelerator, source, {"colour": mean_colour}, (8, 8), None, 0)
    assert len(found.labels) == 7
    assert "2 broken images of 'train' are not counted, as image 2 (picture-2.png)" in capsys.readouterr().out


def test_extractors_see_labels_and_numbers_of_the_images(write_shards: Write, accelerator: Accelerator) -> None:
    extractors = {"index": lambda batch: batch.index[:, None], "label": lambda batch: batch.labels[:, None]}
    source = open_source(str(write_shards(150, 7)))
    found = extract_features(accelerator, source, extractors, (8, 8), None, 0)
    assert found.features["index"].flatten().tolist() == list(range(157))
    assert torch.equal(found.features["label"].flatten(), found.labels)


# What a model tells


def batch_of(pixels: Tensor) -> Batch:
    return Batch(pixels, torch.zeros(len(pixels), dtype=torch.int64), torch.arange(len(pixels)), [])


@pytest.fixture
def batch() -> Batch:
    """Three images that fit the small models."""
    return batch_of(random_pixels(3, 32, 32))


@torch.no_grad()
def test_encoder_features_are_the_class_token_of_the_whole_image_or_its_patches_mean(
    tiny_model: Model, accelerator: Accelerator, batch: Batch
) -> None:
    model = tiny_model(MiclModel)
    tokens = model(normalize_pixels(batch.pixels)).last_hidden_state
    torch.testing.assert_close(encoder_features(model, accelerator)(batch), tokens[:, 0])
    torch.testing.assert_close(encoder_features(model, accelerator, "cls")(batch), tokens[:, 0])
    torch.testing.assert_close(encoder_features(model, accelerator, "mean")(batch), tokens[:, 1:].mean(dim=1))


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_classifier_pools_as_it_was_built(
    pooling: str, tiny_model: Model, accelerator: Accelerator, batch: Batch
) -> None:
    model = tiny_model(MiclForImageClassification, num_labels=5, classifier_pooling=pooling)
    logits = model(normalize_pixels(batch.pixels)).logits
    for asked in ("cls", "mean"):
        assert torch.equal(encoder_features(model, accelerator, asked)(batch), logits)


def some_patches(batch: Batch) -> Tensor:
    """Another row or column of patches for each image of a batch."""
    return torch.tensor([[[0, 1, 2, 3]], [[15, 11, 7, 3]], [[4, 5, 6, 7]]])[batch.index % 3]


@torch.no_grad()
def test_an_encoder_can_be_shown_a_part_of_the_patches(
    tiny_model: Model, accelerator: Accelerator, batch: Batch
) -> None:
    model, ids_visible = tiny_model(MiclModel), some_patches(batch)
    tokens = model(normalize_pixels(batch.pixels), ids_visible).last_hidden_state
    for pooling, expected in (("cls", tokens[:, 0]), ("mean", tokens[:, 1:].mean(dim=1))):
        found = encoder_features(model, accelerator, pooling, views=some_patches)(batch)
        assert found.shape == (3, 32)
        torch.testing.assert_close(found, expected)
    classifier = tiny_model(MiclForImageClassification, num_labels=5)
    logits = classifier(normalize_pixels(batch.pixels), ids_visible=ids_visible).logits
    torch.testing.assert_close(encoder_features(classifier, accelerator, views=some_patches)(batch), logits)


@torch.no_grad()
@pytest.mark.parametrize("kind", [MiclModel, MiclForImageClassification])
def test_features_are_in_full_precision_also_under_autocast(
    kind: type[MiclPreTrainedModel], tiny_model: Model, no_accelerator: Callable[[], None], batch: Batch
) -> None:
    model = tiny_model(kind)
    exact = encoder_features(model, Accelerator(mixed_precision="no"))(batch)
    no_accelerator()
    found = encoder_features(model, Accelerator(mixed_precision="bf16"))(batch)
    assert found.dtype == torch.float32
    assert not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, rtol=0, atol=0.1)


def test_extracting_needs_no_gradients(tiny_model: Model, accelerator: Accelerator, write_shards: Write) -> None:
    extractors = {"encoder": encoder_features(tiny_model(MiclModel), accelerator)}
    found = extract_features(accelerator, open_source(str(write_shards(3))), extractors, (32, 32), None, 0)
    assert not found.features["encoder"].requires_grad


# The cache


class Extraction:
    """Counts how often it is asked, and never gives the same twice."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> LabelledFeatures:
        self.times += 1
        return LabelledFeatures({"cls": torch.rand(5, 3), "mean": torch.rand(3, 5).T}, torch.arange(5) % 2)


def assert_same(some: LabelledFeatures, others: LabelledFeatures) -> None:
    assert some.features.keys() == others.features.keys()
    assert all(torch.equal(some.features[name], others.features[name]) for name in some.features)
    assert torch.equal(some.labels, others.labels)


def test_features_are_extracted_once_for_each_key(tmp_path: Path, accelerator: Accelerator) -> None:
    extract, folder = Extraction(), tmp_path / "deep" / "cache"
    first = cached_features(accelerator, folder, ["weights", "train", None, 3], extract)
    again = cached_features(accelerator, folder, ["weights", "train", None, 3], extract)
    assert extract.times == 1
    assert_same(first, again)
    for times, key in enumerate((["weights", "test", None, 3], ["others", "train", None, 3], ["weights"]), start=2):
        other = cached_features(accelerator, folder, key, extract)
        assert extract.times == times
        assert not torch.equal(other.features["cls"], first.features["cls"])
        assert_same(cached_features(accelerator, folder, key, extract), other)
    assert_same(cached_features(accelerator, folder, ["weights", "train", None, 3], extract), first)
    assert extract.times == 4


def test_an_extraction_that_fails_leaves_no_cache(tmp_path: Path, accelerator: Accelerator) -> None:
    def fail() -> LabelledFeatures:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        cached_features(accelerator, tmp_path, ["key"], fail)
    extract = Extraction()
    cached_features(accelerator, tmp_path, ["key"], extract)
    assert extract.times == 1
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_the_digest_tells_other_weights_and_other_models(tiny_model: Model) -> None:
    digest = weights_digest(tiny_model(MiclModel))
    assert weights_digest(tiny_model(MiclModel)) == digest
    changed = tiny_model(MiclModel)
    with torch.no_grad():
        changed.layers[1].mlp.fc2.bias[-1].add_(1e-6)
    others = [weights_digest(changed), weights_digest(tiny_model(MiclModel, layer_norm_eps=1e-5))]
    others += [weights_digest(tiny_model(MiclForPreTraining)), weights_digest(tiny_model(MiclModel).half())]
    assert len({digest, *others}) == 5
