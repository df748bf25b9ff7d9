"""What a run leaves behind: the portable model folder and its eval.json, and the tables that are printed."""

import json
import shlex
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, ViTImageProcessor
from transformers.image_utils import PILImageResampling

from modeling_micl import MiclConfig
from modeling_micl.configuration_micl import height_and_width
from modeling_micl.remote_code import add_remote_code
from training.config import DataSettings
from training.disk import ADVICE, is_disk_full, replace_file, replace_folder
from training.features import BASELINES, CENTRED_PIXELS, IMAGENET, Normalization
from training.monitor import provenance
from training.run import Run
from training.source import ImageSource


EVALUATION = "eval.json"
UNTRAINED, TRAINED = "encoder before training", "encoder after training"
RANDOM_WEIGHTS = "random weights"
METRICS = {"top1_accuracy": "top-1 accuracy", "top5_accuracy": "top-5 accuracy"}
# Parts of an entry of eval.json that may differ between two measurements of the same thing.
MEASURED = {"value", "command", "hardware", "versions", "details"}


def image_processor(config: MiclConfig, normalization: Normalization = IMAGENET) -> ViTImageProcessor:
    """The evaluation transform as an image processor, bicubic.

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
        image_mean=normalization.mean,
        image_std=normalization.std,
        do_convert_rgb=True,
    )


def save_model(
    model: PreTrainedModel,
    folder: Path,
    training: dict[str, Any] | None = None,
    normalization: Normalization = IMAGENET,
) -> None:
    """Write the portable folder in one move: config, weights, code, image processor, an eval.json without results.

    Args:
        model: what to write.
        folder: where to; what is there is replaced.
        training: how the model came about, see `training_facts`.
        normalization: of the pixels that it was trained on.

    Raises:
        RuntimeError: if the disk is full; what was there before is untouched.
    """
    unfinished = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        model.save_pretrained(unfinished)
        add_remote_code(unfinished)
        image_processor(model.config, normalization).save_pretrained(unfinished)
        _write_evaluation(unfinished, {"training": training, "results": []})
        replace_folder(unfinished, folder)
    except Exception as error:
        if not is_disk_full(error):
            raise
        shutil.rmtree(unfinished, ignore_errors=True)
        raise RuntimeError(
            f"The model could not be written to {folder} ({error}): {ADVICE}, and run the same command again."
        ) from error


def training_facts(run: Run, program: str, **more: Any) -> dict[str, Any]:
    """How the model of a run came about, for its eval.json.

    Args:
        run: finished, or on its way.
        program: entry point, for the command.
        **more: what the program alone knows.
    """
    return {
        "program": program,
        "command": shlex.join(["python", "-m", program, *sys.argv[1:]]),
        "settings": run.config.to_dict(),
        "plan": asdict(run.plan),
        "progress": asdict(run.progress),
        "processes": run.accelerator.num_processes,
        "data": {"images": run.source.num_images, "split": run.source.split, "fingerprint": run.source.fingerprint},
        **more,
        **provenance(),
    }


def read_evaluation(folder: Path) -> dict[str, Any]:
    """A folder's eval.json: how the model was trained, if that is known, and the results.

    Raises:
        ValueError: if it is broken.
    """
    file = folder / EVALUATION
    if not file.exists():
        return {"training": None, "results": []}
    try:
        evaluation: dict[str, Any] = {"training": None} | json.loads(file.read_text())
        if not all(isinstance(entry["value"], float | int) for entry in evaluation["results"]):
            raise TypeError("a value is no number")
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} is broken ({error!r}): take it from the run again.") from error
    return evaluation


def add_results(folder: Path, results: list[dict[str, Any]]) -> None:
    """Add entries to a folder's eval.json; one that measures the same thing as an older one takes its place."""
    evaluation, measured = read_evaluation(folder), [_what(entry) for entry in results]
    kept = [entry for entry in evaluation["results"] if _what(entry) not in measured]
    _write_evaluation(folder, evaluation | {"results": kept + results})


def _write_evaluation(folder: Path, evaluation: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    known = {key: value for key, value in evaluation.items() if value is not None}
    with replace_file(folder / EVALUATION) as unfinished:
        unfinished.write_text(json.dumps(known, indent=2) + "\n")


def is_comparison(entry: dict[str, Any]) -> bool:
    """Whether an entry of eval.json measures something else than the model beside it: a baseline or random weights."""
    features = str(entry.get("features", ""))
    return features in (UNTRAINED, CENTRED_PIXELS, *BASELINES) or features.endswith(RANDOM_WEIGHTS)


def _what(entry: dict[str, Any]) -> dict[str, Any]:
    """What an entry of eval.json measures, without the outcome."""
    return {key: value for key, value in entry.items() if key not in MEASURED}


def result(
    program: str,
    settings: DataSettings,
    test: ImageSource,
    num_test_images: int,
    *,
    protocol: str,
    value: float,
    metric: str = "top-1 accuracy",
    seed: int = 0,
    **more: Any,
) -> dict[str, Any]:
    """An entry of eval.json, with all that is needed to repeat and to judge it.

    Args:
        program: entry point, for the command.
        settings: that the dataset comes from.
        test: the images that were classified.
        num_test_images: how many of them.
        protocol: how, in words.
        value: of the metric; accuracies in [0, 1].
        metric: its name.
        seed: of everything random in it.
        **more: what else tells this measurement from others; `details` says how it came about.
    """
    return {
        "task": "image-classification",
        "protocol": protocol,
        "metric": metric,
        "value": value,
        "dataset": settings.dataset,
        "dataset_config": settings.dataset_config,
        "split": test.split,
        "fingerprint": test.fingerprint,
        "num_test_images": num_test_images,
        "max_images": settings.max_images,
        "seed": seed,
        **more,
        "command": shlex.join(["python", "-m", program, *sys.argv[1:]]),
        **provenance(),
    }


def table(title: str, rows: dict[str, str]) -> str:
    """A table for people: a title, then a name and its values in each line."""
    width = max(map(len, rows), default=0)
    return "\n".join([title, *(f"  {name:<{width}}  {values}" for name, values in rows.items())])
