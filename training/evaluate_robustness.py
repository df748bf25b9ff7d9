"""Judge a classifier on other datasets of the same classes: ImageNet-A, -C, -R, -Sketch, -V2 and their like.

`accelerate launch -m training.evaluate_robustness --model runs/finetune/model --datasets DATASET [DATASET ...]`

The datasets' classes are matched with the model's; see `training.class_mapping`. Where a dataset declares only some of
them, as the 200 of ImageNet-A (arXiv 1907.07174) and of ImageNet-R (arXiv 2006.16241), only these compete: the others'
logits are left out, as in the official evaluations of both. `--all_classes` lets all compete.

A local folder CORRUPTION/SEVERITY/CLASS, ImageNet-C's layout (arXiv 1903.12261), gives an accuracy for each corruption
and severity, the mean over the severities for each corruption, and the mean of these. They are plain means of
accuracies, not the mCE, whose errors are divided by AlexNet's. Published means are over 15 corruptions: keep the four
extra ones in a folder of their own.
"""

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator

from modeling_micl import MiclForImageClassification
from training.class_mapping import ClassMapping, map_classes
from training.config import setting
from training.evaluation import EvaluationSettings, accuracies, load_classifier, predict, start_evaluation
from training.features import stored_normalization
from training.labels import check_labels, class_names, stored_labels
from training.parser import parse_settings
from training.results import METRICS, add_results, result, table
from training.source import ImageSource, evaluation_split, open_split


SEVERITIES = {"1", "2", "3", "4", "5"}
Entry = dict[str, Any]


@dataclass
class RobustnessConfig(EvaluationSettings):
    """Which datasets, and which classes compete."""

    datasets: list[str] = setting([], "Hub ids, local folders or files; a folder may hold corruptions as ImageNet-C")
    dataset: str = setting("", "not for this program: name all datasets with --datasets")
    split: str = setting("train", "split to evaluate on where there is neither 'validation' nor 'test'")
    eval_split: str | None = setting(None, "split to evaluate on; unset, 'validation', 'test' or --split")
    all_classes: bool = setting(False, "all of the model's classes compete, even if the dataset has only some of them")

    def validate(self) -> None:
        """Raise a ValueError that names the first impossible setting, its value and the remedy."""
        super().validate()
        if self.dataset:
            raise ValueError(f"dataset={self.dataset!r} is not for this program: name it with --datasets.")
        if not self.datasets:
            raise ValueError("datasets is not set: name Hub ids, local folders or files with --datasets.")
        twice = [name for name in self.datasets if self.datasets.count(name) > 1]
        if twice:
            raise ValueError(f"datasets names {twice[0]!r} twice: name it once.")


@dataclass
class Opened:
    """A dataset to evaluate on, or one severity of a corruption; `settings.dataset` tells which."""

    settings: RobustnessConfig
    source: ImageSource
    mapping: ClassMapping


def corruption_folders(dataset: str) -> dict[str, list[str]]:
    """The severities' folders of each corruption's folder in ImageNet-C's layout; empty for any other dataset."""
    found: dict[str, list[str]] = {}
    for corruption in subfolders(dataset):
        severities = subfolders(corruption)
        # Without folders in them, numbers would be classes, in a folder that is named as a split.
        if not severities or not all(Path(s).name in SEVERITIES and subfolders(s) for s in severities):
            return {}
        found[corruption] = severities
    return found


def subfolders(folder: str) -> list[str]:
    """Paths of a local folder's sub-folders, in order, but the hidden ones."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        return []
    with os.scandir(path) as entries:
        return sorted(entry.path for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def open_test(config: RobustnessConfig, dataset: str, own: list[str]) -> Opened:
    """Open a dataset and match its classes with the model's.

    Args:
        config: settings.
        dataset: Hub id, local folder or file.
        own: names of the model's classes.

    Raises:
        ValueError: if that cannot be done, saying with which dataset.
    """
    settings = replace(config, dataset=dataset)
    try:
        source = open_split(settings, evaluation_split(settings) or settings.split)
        without_names = source.label_column is not None and source.class_names is None
        mapping = map_classes(None if without_names else class_names(source), own)
        if without_names:
            check_labels(stored_labels(source), len(own), source.split)
    except ValueError as error:
        raise ValueError(f"--datasets {dataset!r}: {error}") from error
    return Opened(settings, source, mapping)


def open_tests(config: RobustnessConfig, own: list[str]) -> list[Opened]:
    """Open everything there is to evaluate on, in the order of the settings.

    Raises:
        ValueError: if one dataset cannot be opened or matched, or the severities of one differ in their classes.
    """
    tests = []
    for dataset in config.datasets:
        folders = [path for severities in corruption_folders(dataset).values() for path in severities]
        opened = [open_test(config, path, own) for path in folders or [dataset]]
        for test in opened[1:]:
            if test.source.class_names != opened[0].source.class_names:
                raise ValueError(
                    f"--datasets {dataset!r}: the sub-folders of {test.settings.dataset!r} and "
                    f"{opened[0].settings.dataset!r} differ, so their accuracies have no mean: are all files unpacked?"
                )
        tests += opened
    return tests


def evaluate(accelerator: Accelerator, model: MiclForImageClassification, test: Opened) -> list[Entry]:
    """Entries of eval.json, one for each metric; the same on every process."""
    config, source, targets = test.settings, test.source, torch.tensor(test.mapping.targets)
    normalization = stored_normalization(str(config.model))
    scores, labels = predict(accelerator, model, source, config.max_images, config.num_workers, normalization)
    check_labels(labels, len(targets), source.split)  # until now only the first labels of a stream were seen
    num_model_classes = scores.shape[1]
    if config.all_classes:
        labels = targets[labels]
    else:
        scores = scores[:, targets]
    competing = "all classes" if scores.shape[1] == num_model_classes else "only the dataset's classes"
    return [
        result(
            "training.evaluate_robustness",
            config,
            source,
            len(labels),
            protocol=f"classifier on another dataset, {competing} compete",
            metric=METRICS[name],
            value=value,
            model=config.model,
            num_classes=scores.shape[1],
            num_model_classes=num_model_classes,
            classes_matched_by=test.mapping.rule,
        )
        for name, value in accuracies(scores, labels).items()
    ]


def mean_of(parts: dict[str, list[Entry]], dataset: str) -> list[Entry]:
    """Entries for the plain mean of the parts, by their folders; the parts have the same metrics and classes."""
    return [
        entries[0]
        | {
            "dataset": dataset,
            "fingerprint": None,
            "value": fmean(entry["value"] for entry in entries),
            "num_test_images": sum(entry["num_test_images"] for entry in entries),
            "mean_of": [Path(part).name for part in parts],
        }
        for entries in zip(*parts.values(), strict=True)
    ]


def means(dataset: str, results: dict[str, list[Entry]]) -> dict[str, list[Entry]]:
    """The mean over the severities of each corruption, and that of these; empty for datasets without corruptions.

    Args:
        dataset: as in the settings.
        results: entries of each severity, by its folder.
    """
    found = {
        corruption: mean_of({path: results[path] for path in severities}, corruption)
        for corruption, severities in corruption_folders(dataset).items()
    }
    return found | {dataset: mean_of(found, dataset)} if found else {}


def row(entries: list[Entry]) -> str:
    """A dataset's line of the table."""
    first = entries[0]
    values = "  ".join(f"{entry['metric'].split()[0]} {entry['value']:6.1%}" for entry in entries)
    mean = f", mean of {len(first['mean_of'])}" if "mean_of" in first else ""
    classes = f"{first['num_classes']} of {first['num_model_classes']} classes, by {first['classes_matched_by']}"
    return f"{values}  {first['num_test_images']} images, {classes}{mean}"


def main(config: RobustnessConfig) -> None:
    """Open, evaluate, write and print."""
    accelerator = start_evaluation(config)
    model = load_classifier(str(config.model)).to(accelerator.device)
    with accelerator.main_process_first():  # the others find what the first has prepared
        tests = open_tests(config, [model.config.id2label[label] for label in range(model.config.num_labels)])
    results: dict[str, list[Entry]] = {}
    for test in tests:
        results[test.settings.dataset] = evaluate(accelerator, model, test)
        if accelerator.is_main_process:  # at once: the next may take long
            add_results(config.results_folder(), results[test.settings.dataset])
    rows: dict[str, str] = {}
    for dataset in config.datasets:
        averaged = means(dataset, results)
        if accelerator.is_main_process:
            add_results(config.results_folder(), [entry for entries in averaged.values() for entry in entries])
        rows |= {name: row(entries) for name, entries in (averaged or {dataset: results[dataset]}).items()}
    accelerator.print(table(f"accuracy of {config.model}", rows))
    accelerator.end_training()


if __name__ == "__main__":
    try:
        main(parse_settings(RobustnessConfig, "training.evaluate_robustness"))
    except (ValueError, RuntimeError) as error:
        sys.exit(f"training.evaluate_robustness: {error}")
