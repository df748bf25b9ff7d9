"""Augmentation of classifiers against timm's own pipeline, and against what mixed pictures show."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.mixup import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from training.augment import Augmentation
from training.batch import Batch
from training.features import normalize_pixels


POLICY = "rand-m9-mstd0.5-inc1"


def timm_stages(size: tuple[int, int], policy: str = POLICY) -> tuple[Any, Any, Any]:
    """The crop, RandAugment, and normalisation with erasing of timm's transform, as MAE's fine-tuning makes it."""
    stages: tuple[Any, Any, Any] = create_transform(
        size,
        is_training=True,
        color_jitter=None,
        auto_augment=policy,
        interpolation="bicubic",
        re_prob=0.25,
        re_mode="pixel",
        re_count=1,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        separate=True,
    )
    return stages


def noise(number: int, size: tuple[int, int]) -> Image.Image:
    """A picture of (height, width) with all kinds of colours."""
    coarse = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC)


def batch_of(pixels: Any, labels: list[int]) -> Batch:
    return Batch(torch.as_tensor(pixels, dtype=torch.uint8), torch.tensor(labels), torch.arange(len(labels)), [])


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


# RandAugment


@pytest.mark.parametrize("policy", [POLICY, "rand-m7-n4-p0.9", "rand-m5-mstd1-tweights"])
def test_images_are_augmented_as_by_timm(policy: str) -> None:
    size = (24, 40)
    ours = Augmentation(crop_min_scale=1, horizontal_flip=False, rand_augment=policy).transform(size)
    (theirs,) = timm_stages(size, policy)[1].transforms
    changed = 0
    for number in range(250):
        image = noise(number, size)
        seed_all(int(np.random.default_rng(number).integers(2**32)) % 2**32)
        expected = theirs(image)
        seed_all(0)
        found = ours(image, np.random.default_rng(number))
        assert found.tobytes() == expected.tobytes(), number
        changed += found.tobytes() != image.tobytes()
    assert changed > 100


def test_an_augmented_image_depends_on_its_own_generator_alone() -> None:
    transform = Augmentation(rand_augment=POLICY).transform((16, 16))
    images = []
    for number in (3, 3, 4):
        seed_all(len(images))
        images.append(transform(noise(0, (20, 30)), np.random.default_rng(number)).tobytes())
    assert images[0] == images[1] != images[2]


def test_crop_and_flip_come_before_randaugment() -> None:
    """The crop of a generator's state is the same whether RandAugment follows or not."""
    with_policy = Augmentation(rand_augment="rand-m9-p0-inc1").transform((16, 16))
    without = Augmentation().transform((16, 16))
    for number in range(10):
        pair = [f(noise(0, (20, 30)), np.random.default_rng(number)).tobytes() for f in (with_policy, without)]
        assert pair[0] == pair[1]


def test_posterising_to_no_bits_gives_black() -> None:
    """At full strength; Pillow refuses it from version 13 on."""
    transform = Augmentation(crop_min_scale=1, horizontal_flip=False, rand_augment="rand-m10-n1-p1-inc1")
    bright = Image.fromarray(np.random.default_rng(0).integers(100, 256, (8, 8, 3), dtype=np.uint8))
    found = [transform.transform((8, 8))(bright, np.random.default_rng(number)) for number in range(100)]
    black = [image for image in found if not np.asarray(image).any()]
    assert {image.size for image in black} == {(8, 8)}
    assert {image.mode for image in black} == {"RGB"}


@pytest.mark.parametrize(
    "policy",
    ["rand-m9-x3", "augmix-m3", "v0", "", "rand-mstd", "rand-m9.5", "randm9", "rand-m9-inc", "rand-m9-tnone", "None"],
)
def test_a_wrong_policy_is_refused(policy: str) -> None:
    with pytest.raises(ValueError, match=r"rand_augment=.* is no policy of timm's, as 'rand-m9") as refused:
        Augmentation(rand_augment=policy)
    assert repr(policy) in str(refused.value)


# Erasing


def test_pixels_are_normalised_and_erased_as_by_timm() -> None:
    images = [noise(number, (32, 32)) for number in range(64)]
    final = timm_stages((32, 32))[2]
    seed_all(1)
    expected = torch.stack([final(image) for image in images])
    batch = batch_of(np.stack([np.asarray(image) for image in images]), [0] * 64)
    seed_all(1)
    pixels, targets = Augmentation(erasing_probability=0.25).loss_inputs(batch, 3)
    torch.testing.assert_close(pixels, expected)
    erased = (pixels != normalize_pixels(batch.pixels)).flatten(1).any(dim=1)
    assert 8 <= erased.sum() <= 24
    assert targets is batch.labels
    assert batch.pixels.equal(torch.from_numpy(np.stack([np.asarray(image) for image in images])))


# Mixing


def mixed(labels: list[int], classes: int, seed: int, **settings: float) -> tuple[Tensor, Tensor]:
    """Mix images that show nothing but their own number; returns that and the targets."""
    pixels = torch.arange(len(labels))[:, None, None, None].expand(-1, 16, 16, 3) * 10
    batch = batch_of(pixels, labels)
    seed_all(seed)
    found, targets = Augmentation(**settings).loss_inputs(batch, classes)  # type: ignore[arg-type]
    black, step = normalize_pixels(batch.pixels[:1]), normalize_pixels(batch.pixels[1:2])
    return ((found - black) / (step - black))[:, 0], targets


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_targets_tell_how_much_of_each_image_there_is(mixup: float, cutmix: float, smoothing: float) -> None:
    """Recovered from the pixels: the mean of an image mixed of numbers a and b is share·a + (1 - share)·b."""
    labels, classes = [4, 0, 2, 1, 3, 3], 5
    shares, cut = [], []
    for seed in range(30):
        numbers, targets = mixed(
            labels, classes, seed, mixup_alpha=mixup, cutmix_alpha=cutmix, label_smoothing=smoothing
        )
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(6))
        for own in range(6):
            other = 5 - own
            share = (float(numbers[own].mean()) - other) / (own - other)
            expected = torch.full((classes,), smoothing / classes)
            expected[labels[own]] += (1 - smoothing) * share
            expected[labels[other]] += (1 - smoothing) * (1 - share)
            torch.testing.assert_close(targets[own], expected, rtol=0, atol=1e-4)
        shares.append(share)
        cut.append(len(numbers[0].round(decimals=3).unique()) > 1)
    assert min(shares) < 0.3
    assert max(shares) > 0.7
    assert (sum(cut) > 5) == (cutmix > 0)
    assert (sum(cut) < 25) == (mixup > 0)


def test_images_are_mixed_as_by_timm() -> None:
    batch = batch_of(np.stack([np.asarray(noise(number, (16, 16))) for number in range(6)]), [0, 1, 2, 3, 3, 1])
    settings = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "label_smoothing": 0.1}
    for seed in range(20):
        seed_all(seed)
        expected = Mixup(**settings, num_classes=4)(normalize_pixels(batch.pixels).contiguous(), batch.labels)
        seed_all(seed)
        found = Augmentation(**settings).loss_inputs(batch, 4)
        assert found[0].equal(expected[0])
        assert found[1].equal(expected[1])


# Loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_timms(smoothing: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(8, 5, generator=generator), torch.randint(0, 5, (8,), generator=generator)
    shares = torch.randn(8, 5, generator=generator).softmax(dim=1)
    augmentation = Augmentation(label_smoothing=smoothing, mixup_alpha=0.8)
    hard, soft = LabelSmoothingCrossEntropy(smoothing)(logits, labels), SoftTargetCrossEntropy()(logits, shares)
    torch.testing.assert_close(augmentation.loss(logits, labels), hard)
    torch.testing.assert_close(augmentation.loss(logits, shares), soft)


def test_the_loss_is_worked_out_in_full_precision() -> None:
    logits = torch.tensor([[3.0, 1.0, 0.5]])
    loss = Augmentation().loss(logits.bfloat16(), torch.tensor([1]))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, Augmentation().loss(logits, torch.tensor([1])))
