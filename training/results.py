"""What a run leaves behind: the portable model folder, its eval.json, the figures and the table."""

import json
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.nn.functional import normalize
from transformers import PreTrainedModel, ViTImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling

from modeling_micl import MiclConfig, MiclForPreTraining
from modeling_micl.configuration_micl import height_and_width
from training.checkpoint import replace_folder
from training.data import Batch, EvaluationImages, batches
from training.features import (
    BASELINES,
    Extractor,
    encoder_features,
    extract_features,
    knn_accuracy,
    normalize_pixels,
    with_centred_pixels,
)
from training.figures import save_similarities, save_views
from training.images import central_crop
from training.monitor import provenance
from training.source import ImageSource


KNN_PROTOCOL = "kNN, k=20, cosine, votes weighted by exp(cosine / 0.07), [CLS] of the whole central crop"
TRAINED = "encoder after training"
FIGURE_ROWS = 6
SIMILARITY_IMAGES = 64


def image_processor(config: MiclConfig) -> ViTImageProcessor:
    """The evaluation transform as an image processor: bicubic, ImageNet's mean and standard deviation.

    For a square model images are resized by their shorter side and cropped, above 64 pixels at 7/8 of it (256 → 224);
    for others the whole image is resized.
    """
    height, width = height_and_width(config.image_size)
    crop = height == width
    shorter = round(height * 256 / 224) if height > 64 else height
    return ViTImageProcessor(
        size={"shortest_edge": shorter} if crop else {"height": height, "width": width},
        do_center_crop=crop,
        crop_size={"height": height, "width": width},
        resample=PILImageResampling.BICUBIC,
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
        do_convert_rgb=True,
    )


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Write the portable folder in one move: config, weights, image processor and an eval.json without results."""
    unfinished = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    image_processor(model.config).save_pretrained(unfinished)
    write_results(unfinished, [])
    replace_folder(unfinished, folder)


def write_results(folder: Path, results: list[dict[str, Any]]) -> None:
    """Write a portable folder's eval.json: the results, and the hardware and library versions they come from."""
    unfinished = folder / ".tmp-eval.json"
    unfinished.write_text(json.dumps({"results": results} | provenance(), indent=2) + "\n")
    unfinished.replace(folder / "eval.json")


@dataclass
class KnnScores:
    """Top-1 accuracies in [0, 1] by the features' name, and the labelled images they come from."""

    accuracies: dict[str, float]
    num_train_images: int
    num_test_images: int


def knn_scores(
    accelerator: Accelerator,
    extractors: dict[str, Extractor],
    splits: tuple[ImageSource, ImageSource],
    size: tuple[int, int],
    max_images: int,
    num_workers: int,
) -> KnnScores:
    """Judge each extractor's features: the first split votes, the second is classified.

    There are no accuracies if one of the splits has no labels.
    """
    train, test = (extract_features(accelerator, split, extractors, size, max_images, num_workers) for split in splits)
    train, test = with_centred_pixels(train, test)
    accuracies = {
        name: knn_accuracy(train.features[name], train.labels, test.features[name], test.labels)
        for name in train.features
        if len(train.labels) and len(test.labels)
    }
    return KnnScores(accuracies, len(train.labels), len(test.labels))


def final_scores(
    accelerator: Accelerator,
    untrained: MiclForPreTraining,
    trained: MiclForPreTraining,
    splits: tuple[ImageSource, ImageSource],
    max_images: int,
    num_workers: int,
) -> KnnScores:
    """Judge features that learn nothing, and those of the encoder before and after training."""
    extractors = BASELINES | {
        "encoder before training": encoder_features(untrained.vit.eval(), accelerator),
        TRAINED: encoder_features(trained.vit.eval(), accelerator),
    }
    size = height_and_width(trained.config.image_size)
    return knn_scores(accelerator, extractors, splits, size, max_images, num_workers)


def knn_results(
    scores: KnnScores, dataset: str, splits: tuple[ImageSource, ImageSource], seed: int
) -> list[dict[str, Any]]:
    """Entries of eval.json, each with all that is needed to repeat and to judge it."""
    train, test = splits
    return [
        {
            "task": "image-classification",
            "protocol": KNN_PROTOCOL,
            "features": name,
            "metric": "top-1 accuracy",
            "value": accuracy,
            "dataset": dataset,
            "num_train_images": scores.num_train_images,
            "num_test_images": scores.num_test_images,
            "train_fingerprint": train.fingerprint,
            "test_fingerprint": test.fingerprint,
            "seed": seed,
            "command": shlex.join(["python", "-m", "training.pretrain", *sys.argv[1:]]),
        }
        for name, accuracy in scores.accuracies.items()
    ]


def table(scores: KnnScores) -> str:
    """A table for people."""
    if not scores.accuracies:
        return "no kNN accuracy: the images have no labels"
    width = max(map(len, scores.accuracies))
    lines = [f"kNN accuracy on {scores.num_test_images} test images (top-1, k = 20)"]
    return "\n".join(lines + [f"  {name:<{width}}  {accuracy:6.1%}" for name, accuracy in scores.accuracies.items()])


@torch.no_grad()
def save_figures(
    folder: Path, untrained: MiclForPreTraining, trained: MiclForPreTraining, source: ImageSource
) -> None:
    """Write views.png and similarity.png of a few images to `folder/figures`."""
    config = trained.config
    images = EvaluationImages(source, central_crop(height_and_width(config.image_size)), SIMILARITY_IMAGES)
    batch: Batch = next(batches(images, num_workers=0))
    pixels = batch.pixels.to(trained.device)
    ids_visible = trained.sample_views(
        normalize_pixels(pixels), generator=torch.Generator(trained.device).manual_seed(0)
    )
    # The encoder alone: with global negatives the loss would wait for the other processes.
    cls = [m.vit.eval()(normalize_pixels(pixels), ids_visible).pooler_output for m in (untrained, trained)]
    embeds = [normalize(each.float(), dim=-1).unflatten(0, ids_visible.shape[:2]) for each in cls]
    patch_size = height_and_width(config.patch_size)
    figures = folder / "figures"
    save_views(figures / "views.png", batch.pixels[:FIGURE_ROWS], ids_visible[:FIGURE_ROWS].cpu(), patch_size)
    save_similarities(figures / "similarity.png", *(each.cpu() for each in embeds))
