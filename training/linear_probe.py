"""Judge frozen features by a linear classifier.

`python -m training.linear_probe --model runs/photos/model --dataset photos`

The fast protocol fits it to features that are extracted once; the published one trains it on random crops.
"""

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

from modeling_micl import MiclForImageClassification
from training.alone import alone_in
from training.augment import Augmentation
from training.classifier_config import ProbeConfig
from training.evaluation import FrozenSettings, FrozenSplits, accuracies, frozen_splits, is_classifier, read_config
from training.features import stored_normalization
from training.judge import FAST, LinearProbe, fit_probe
from training.log import Logger
from training.loop import train
from training.optim import lars_optimizer
from training.parser import parse_settings
from training.processes import start_accelerator
from training.results import METRICS, add_results, save_model, table
from training.run import Run, summary
from training.stop import STOPPED_STATUS, StopRequest
from training.supervised import Classify, build_classifier, open_classes, save_classifier


PUBLISHED = (
    "linear probe as published: BatchNorm without affine parameters, linear layer, LARS, random crops and flips"
)


def frozen_settings(config: ProbeConfig) -> FrozenSettings:
    """What of the settings the extraction of features needs."""
    return FrozenSettings(**{field.name: getattr(config, field.name) for field in fields(FrozenSettings)})


def fit_probes(
    splits: FrozenSplits, settings: FrozenSettings, seed: int
) -> tuple[list[LinearProbe], list[dict[str, Any]]]:
    """A probe for each share of the labels, all of them first, and the entries of eval.json."""
    probes, entries = [], []
    for share, features, labels in splits.selections(settings):
        probe = fit_probe(features, labels, len(splits.class_names), seed)
        scores = probe.scores(splits.test.features["features"])
        details = {
            "learning_rate": probe.learning_rate,
            "weight_decay": probe.weight_decay,
            "held_out_accuracy": probe.held_out_accuracy,
        }
        for name, value in accuracies(scores.cpu(), splits.test.labels.cpu()).items():
            facts = {"protocol": FAST, "metric": METRICS[name], "value": value, "details": details}
            entries.append(splits.result("training.linear_probe", settings, share, len(labels), **facts))
        probes.append(probe)
    return probes, entries


def as_classifier(config: ProbeConfig, splits: FrozenSplits, probe: LinearProbe) -> MiclForImageClassification:
    """The encoder with the probe as its head."""
    model = build_classifier(config, splits.class_names, classifier_pooling="cls")
    model.classifier.load_state_dict({"weight": probe.weight, "bias": probe.bias})
    return model


def run_fast(config: ProbeConfig, accelerator: Accelerator) -> None:
    """Extract, fit, write and print."""
    settings = frozen_settings(config)
    splits = frozen_splits(accelerator, settings)
    probes, entries = fit_probes(splits, settings, config.seed)
    if accelerator.is_main_process:
        given, folder = Path(str(config.model)), Path(config.output_dir) / "model"
        if config.features == "cls" and not is_classifier(read_config(str(config.model))):
            save_model(
                as_classifier(config, splits, probes[0]), folder, normalization=stored_normalization(str(config.model))
            )
            add_results(folder, [entry for entry in entries if entry["label_share"] == 1])
        add_results(given if given.is_dir() else folder, entries)
    rows = {f"{100 * e['label_share']:g} % of the labels, {e['metric']}": f"{e['value']:6.1%}" for e in entries}
    title = f"linear probe of {settings.whose()} on {len(splits.test.labels)} images of {splits.sources[1].split!r}"
    accelerator.print(table(title, rows))


def with_batch_norm(model: MiclForImageClassification) -> MiclForImageClassification:
    """Prepare a classifier for the published probe: BatchNorm before the head, and nothing trained but the head."""
    model.requires_grad_(False)
    model.fc_norm = torch.nn.BatchNorm1d(model.config.hidden_size, affine=False, eps=1e-6)
    model.classifier.requires_grad_(True)
    torch.nn.init.trunc_normal_(linear_head(model).weight, std=0.01)
    return model


def linear_head(model: MiclForImageClassification) -> torch.nn.Linear:
    """The classifier's last layer."""
    assert isinstance(model.classifier, torch.nn.Linear)
    return model.classifier


@torch.no_grad()
def fold_batch_norm(model: MiclForImageClassification) -> MiclForImageClassification:
    """Put the BatchNorm's statistics into the head, so that the stored classifier needs none."""
    norm, head = model.fc_norm, linear_head(model)
    assert isinstance(norm, torch.nn.BatchNorm1d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    broadcast([norm.running_mean, norm.running_var])  # each process has its own since the last step
    head.weight.div_((norm.running_var + norm.eps).sqrt())
    head.bias.sub_(head.weight @ norm.running_mean)
    model.fc_norm = torch.nn.Identity()
    return model


def run_published(config: ProbeConfig, accelerator: Accelerator) -> bool:
    """Train the head on random crops, as MAE's main_linprobe.py does; returns False if it was stopped before."""
    if accelerator.is_fsdp2:
        raise ValueError("The published probe does not work with FSDP: its one trained layer needs plain processes.")
    source, eval_source, names = open_classes(config, accelerator)
    model = with_batch_norm(build_classifier(config, names, classifier_pooling="cls", drop_path_rate=0.0))
    optimizer = lars_optimizer(model.classifier, config.weight_decay)
    run = Run.start(config, accelerator, source, model, optimizer)
    start = "random weights" if config.random_init else config.model
    accelerator.print(summary(run, {"model": f"frozen {start}, {len(names)} classes"}))
    stop = StopRequest()
    augmentation = Augmentation(crop_min_scale=config.crop_min_scale, horizontal_flip=config.horizontal_flip)
    task = Classify(run, config, augmentation, eval_source)
    with Logger(run, "linear probe") as log:
        completed = train(run, task, log, stop)
    if not completed:
        log.say_stopped()
        return False
    entries = save_classifier(task, fold_batch_norm(task.judged()), log, "training.linear_probe", PUBLISHED)
    if accelerator.is_main_process and Path(str(config.model)).is_dir():
        add_results(Path(str(config.model)), entries)
    return True


def main(config: ProbeConfig) -> bool:
    """One probe by the chosen protocol; returns False if it was stopped before its end."""
    accelerator = start_accelerator(config)
    completed = True
    if config.protocol == "fast":
        run_fast(config, accelerator)
    else:
        with alone_in(config, accelerator):
            completed = run_published(config, accelerator)
    accelerator.end_training()
    return completed


if __name__ == "__main__":
    try:
        completed = main(parse_settings(ProbeConfig, "training.linear_probe"))
    except (ValueError, RuntimeError) as error:
        sys.exit(f"training.linear_probe: {error}")
    if not completed:
        sys.exit(STOPPED_STATUS)
