"""Hide most of every test image: what accuracy is left, and what time is saved.

`python -m training.occlusion --model runs/NAME/model --dataset photos` adds to eval.json and draws
figures/occlusion.png beside it.
"""

import sys
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from modeling_micl.configuration_micl import height_and_width
from training.config import setting
from training.data import EvaluationImages, batches
from training.evaluation import (
    FrozenSettings,
    FrozenSplits,
    accuracies,
    check_same_classes,
    frozen_splits,
    is_classifier,
    load_classifier,
    load_frozen,
    open_labelled,
    read_config,
    start_evaluation,
)
from training.features import Frozen, encoder_features, extract_features, stored_normalization
from training.figures import only_patches, save_occlusion
from training.images import central_crop
from training.judge import knn_accuracy
from training.labels import class_names
from training.parser import parse_settings
from training.results import add_results, result, table
from training.source import ImageSource
from training.visible import num_visible, patch_order, visible_patches


PROGRAM = "training.occlusion"
KNN_PROTOCOL = (
    "kNN, k=20, cosine, votes weighted by exp(cosine / 0.07), whole central crops vote on random visible patches"
)
CLASSIFIER_PROTOCOL = "classifier, random visible patches of the central crop"
TIMED_PASSES = 9


@dataclass
class OcclusionConfig(FrozenSettings):
    """Random patches of the test images are hidden; only the visible ones are computed."""

    hidden_shares: list[float] = setting(
        [0.0, 0.25, 0.5, 0.75, 0.8, 0.85, 0.9, 0.95], "shares of the patches to hide, in [0, 1)"
    )
    few_shot: list[float] = setting([], "also let only these shares of the labels of each class vote, in (0, 1]")
    timing_batch_size: int | None = setting(
        None,
        "images in a timed forward pass; unset, 64 on the CPU and 512 elsewhere, where few tokens need many images",
    )

    def validate(self) -> None:
        """Raise a ValueError that names the first impossible setting, its value and the remedy."""
        super().validate()
        for share in self.hidden_shares:
            if not 0 <= share < 1:
                raise ValueError(f"hidden_shares takes shares in [0, 1), as one patch must be left, got {share}.")
        self._validate_at_least(1, "timing_batch_size")

    def shares(self) -> list[float]:
        """The shares to hide, each once, in rising order."""
        return sorted(set(self.hidden_shares))


def features_by_share(
    accelerator: Accelerator, config: OcclusionConfig, model: Frozen, splits: FrozenSplits
) -> dict[float, Tensor]:
    """Features (n, d) of the test images for every hidden share; one pass over the images makes them all.

    Those of whole images are there already.
    """
    num_patches, size = model.config.num_patches, height_and_width(model.config.image_size)
    hiding = {str(share): visible_patches(share, num_patches, config.seed) for share in config.shares() if share}
    normalization = stored_normalization(str(config.model))
    extractors = {
        name: encoder_features(model, accelerator, config.features, views, normalization)
        for name, views in hiding.items()
    }
    how = (size, config.max_images, config.num_workers)
    found = extract_features(accelerator, splits.sources[1], extractors, *how).to(accelerator.device).features
    return {share: found[str(share)] if share else splits.test.features["features"] for share in config.shares()}


@torch.no_grad()
def timings(accelerator: Accelerator, config: OcclusionConfig, model: Frozen) -> dict[float, dict[str, float]]:
    """What a hidden share saves, measured side by side: the median of interleaved passes after one to warm up.

    It is the time of the model alone: normalised pixels and the choice of patches are on the device.

    Returns:
        for every share: `token_share`, [CLS] included, and `relative_time`, both of the whole image's;
        `images_per_second`; `timing_batch_size`.
    """
    num_images = config.timing_batch_size or (64 if accelerator.device.type == "cpu" else 512)
    num_patches, shares = model.config.num_patches, sorted({0.0, *config.shares()})
    size = height_and_width(model.config.image_size)
    pixels = torch.randn(num_images, model.config.num_channels, *size, device=accelerator.device)
    order = patch_order(torch.arange(num_images), num_patches, config.seed).to(accelerator.device)
    ids = {share: order[:, None, : num_visible(num_patches, share)] if share else None for share in shares}
    seconds: dict[float, list[float]] = {share: [] for share in shares}
    for number in range(1 + TIMED_PASSES):
        for share in shares:
            start = perf_counter()
            with accelerator.autocast():
                output = model(pixels, ids_visible=ids[share])
            output[0].flatten()[0].item()  # waits for the device
            if number:
                seconds[share].append(perf_counter() - start)
    return {
        share: {
            "token_share": (1 + num_visible(num_patches, share)) / (1 + num_patches),
            "relative_time": median(seconds[share]) / median(seconds[0.0]),
            "images_per_second": num_images / median(seconds[share]),
            "timing_batch_size": num_images,
        }
        for share in config.shares()
    }


def checked_head(accelerator: Accelerator, config: OcclusionConfig) -> nn.Module | None:
    """The last layer of a classifier, None of an encoder or of random weights.

    Raises:
        ValueError: if its classes are not those of the images to classify.
    """
    stored = read_config(str(config.model))
    if config.random_init or not is_classifier(stored):
        return None
    with accelerator.main_process_first():  # the others find what the first has prepared
        _, test = open_labelled(config)
    check_same_classes(stored, class_names(test), config.model)
    return load_classifier(str(config.model)).classifier.to(accelerator.device)


@torch.no_grad()
def judge(
    accelerator: Accelerator,
    config: OcclusionConfig,
    splits: FrozenSplits,
    features: dict[float, Tensor],
    head: nn.Module | None,
    known: dict[float, dict[str, Any]],
) -> dict[str, list[dict[str, Any]]]:
    """Entries of eval.json for every curve, by its name; `known` is what else they say about each share."""
    curves, answers = {}, splits.test.labels
    if head is not None:
        test, entries = splits.sources[1], []
        for share, queries in features.items():
            with accelerator.autocast():
                scores = head(queries)
            value = accuracies(scores.float().cpu(), answers.cpu())["top1_accuracy"]
            how: dict[str, Any] = {"protocol": CLASSIFIER_PROTOCOL, "seed": config.seed, "model": config.model}
            entries.append(result(PROGRAM, config, test, len(answers), value=value, **how, **known[share]))
        curves["classifier"] = entries
    for label_share, votes, labels in splits.selections(config):
        name = "kNN" if label_share == 1 else f"kNN, {100 * label_share:g}% of the labels"
        curves[name] = [
            splits.result(
                PROGRAM,
                config,
                label_share,
                len(votes),
                protocol=KNN_PROTOCOL,
                value=knn_accuracy(votes, labels, queries, answers),
                **known[share],
            )
            for share, queries in features.items()
        ]
    return curves


def example(config: OcclusionConfig, source: ImageSource, model: Frozen) -> list[Tensor]:
    """A test image as the model sees it at every share."""
    size, patch_size = height_and_width(model.config.image_size), height_and_width(model.config.patch_size)
    few = EvaluationImages(source, central_crop(size), max_images=16)  # the first may be broken
    batch = next(batches(few, num_workers=0))
    num_patches = model.config.num_patches
    views = [visible_patches(share, num_patches, config.seed)(batch)[0, 0] for share in config.shares()]
    return [only_patches(batch.pixels[0] / 255, view, patch_size) for view in views]


def report(curves: dict[str, list[dict[str, Any]]], config: OcclusionConfig) -> str:
    """The table of accuracies and times."""
    first, *_ = curves.values()
    rows = {"hidden": "  ".join(["patches", "  time", "images/s", *(f"{name:>6}" for name in curves)])}
    for number, entry in enumerate(first):
        speed = entry["details"]
        cells = [f"{entry['num_visible_patches']:7}", f"{speed['relative_time']:6.1%}"]
        cells += [f"{speed['images_per_second']:8.0f}"]
        cells += [f"{entries[number]['value']:{max(6, len(name))}.1%}" for name, entries in curves.items()]
        rows[f"{100 * entry['hidden_share']:5g}%"] = "  ".join(cells)
    whose = f"{config.model}{', random weights' if config.random_init else ''}"
    timed = f"time of the model alone in batches of {first[0]['details']['timing_batch_size']}"
    return table(f"accuracy of {whose} on {first[0]['num_test_images']} images; {timed}", rows)


def main(config: OcclusionConfig) -> None:
    """Extract, measure, judge, write and print."""
    accelerator = start_evaluation(config)
    head = checked_head(accelerator, config)
    splits = frozen_splits(accelerator, config)
    model = load_frozen(str(config.model), config.random_init, config.seed).to(accelerator.device)
    features = features_by_share(accelerator, config, model, splits)
    if accelerator.is_main_process:  # alone, as others would disturb the measurement
        known: dict[float, dict[str, Any]] = {
            share: {
                "hidden_share": share,
                "num_visible_patches": num_visible(model.config.num_patches, share),
                "details": speed,
            }
            for share, speed in timings(accelerator, config, model).items()
        }
        curves = judge(accelerator, config, splits, features, head, known)
        add_results(config.results_folder(), [entry for entries in curves.values() for entry in entries])
        save_occlusion(
            config.results_folder() / "figures" / "occlusion.png",
            config.shares(),
            {name: [entry["value"] for entry in entries] for name, entries in curves.items()},
            [known[share]["details"]["relative_time"] for share in config.shares()],
            1 / len(splits.class_names),
            example(config, splits.sources[1], model),
        )
        accelerator.print(report(curves, config))
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    try:
        main(parse_settings(OcclusionConfig, PROGRAM))
    except (ValueError, RuntimeError) as error:
        sys.exit(f"{PROGRAM}: {error}")
