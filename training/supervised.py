"""Training a classifier on a pre-trained encoder: what fine-tuning and the published linear probe share."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers.modeling_outputs import ImageClassifierOutput

from modeling_micl import MiclConfig, MiclForImageClassification
from training.augment import Augmentation
from training.batch import Batch
from training.card import write_card
from training.classifier_config import ClassifierSettings
from training.evaluation import (
    accuracies,
    check_same_classes,
    is_classifier,
    load_classifier,
    load_encoder,
    predict,
    read_config,
    stored_training,
)
from training.images import Transform
from training.labels import check_labels, class_names
from training.log import Logger
from training.loop import Task
from training.results import METRICS, add_results, result, save_model, table, training_facts
from training.run import Run
from training.source import ImageSource, evaluation_split, open_split


def open_classes(
    config: ClassifierSettings, accelerator: Accelerator
) -> tuple[ImageSource, ImageSource | None, list[str]]:
    """The labelled images to train on, those to evaluate on if there are any, and the names of the classes.

    Raises:
        ValueError: if labels are missing, out of range, or differ between the splits.
    """
    with accelerator.main_process_first():  # the others find what the first has prepared
        source, split = open_split(config, config.split, config.max_images), evaluation_split(config)
        eval_source = open_split(config, split) if split else None
        names = class_names(source, eval_source) if eval_source else class_names(source)
    return source, eval_source, names


def build_classifier(
    config: ClassifierSettings, names: list[str], new_head: bool = True, **changes: Any
) -> MiclForImageClassification:
    """The encoder of `config.model` with a fresh head, or a classifier as it is.

    Args:
        config: names the model, and whether to give it random weights instead of its own.
        names: of the classes.
        new_head: False keeps the head of a model that has one.
        **changes: fields of `MiclConfig` to change.

    Raises:
        ValueError: if the model cannot be loaded, or has a head for other classes.
    """
    stored, labels = read_config(str(config.model)), dict(enumerate(names))
    if is_classifier(stored) and not new_head:
        check_same_classes(stored, names, config.model)
        changes = changes | {"classifier_pooling": stored.classifier_pooling}
    label2id = {name: label for label, name in labels.items()}
    built = MiclConfig.from_pretrained(config.model, id2label=labels, label2id=label2id, **changes)
    set_seed(config.seed)
    model = MiclForImageClassification(built)
    if config.random_init:
        return model
    if is_classifier(stored) and not new_head:
        model.load_state_dict(load_classifier(str(config.model)).state_dict())
    else:
        encoder = load_encoder(str(config.model), add_final_norm=built.classifier_pooling == "cls")
        model.vit.load_state_dict(encoder.state_dict())
    return model


class Classify(Task):
    """Training with labels.

    Args:
        run: the run.
        config: its settings.
        augmentation: of the images and labels.
        eval_source: what to classify now and then, None for nothing.
    """

    def __init__(
        self, run: Run, config: ClassifierSettings, augmentation: Augmentation, eval_source: ImageSource | None
    ) -> None:
        super().__init__(run, config.eval_epochs if eval_source else 0)
        self.config, self.augmentation, self.eval_source = config, augmentation, eval_source

    def transform(self, size: tuple[int, int]) -> Transform:
        """What the workers do with an image."""
        return self.augmentation.transform(size)

    def forward(self, batch: Batch) -> ImageClassifierOutput:
        """Classify augmented images; everything random in it follows from seed, forward pass and process alone."""
        run, num_classes = self.run, self.run.unwrapped().config.num_labels
        check_labels(batch.labels, num_classes, run.source.split)  # on the CPU, where it does not wait for a device
        self._seed(run.progress.forwards)
        pixels, targets = self.augmentation.loss_inputs(batch.to(run.accelerator.device), num_classes)
        logits = run.model(pixels).logits
        return ImageClassifierOutput(loss=self.augmentation.loss(logits, targets), logits=logits)

    def _seed(self, forward: int) -> None:
        key = (self.config.seed, forward, self.run.accelerator.process_index)
        seed = int(np.random.SeedSequence(key).generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)

    def judged(self) -> MiclForImageClassification:
        """The model that counts, whole: the averaged one where there is one; all processes call it."""
        model = self.run.averaged.module if self.run.averaged is not None else self.run.whole_model()
        assert isinstance(model, MiclForImageClassification)
        return model

    def evaluate(self) -> dict[str, float]:
        """Accuracies on the evaluation split."""
        assert self.eval_source
        return accuracies(
            *predict(
                self.run.accelerator, self.judged(), self.eval_source, self.config.max_images, self.config.num_workers
            )
        )


def write_classifier(task: Classify, model: MiclForImageClassification, program: str, protocol: str) -> Path:
    """Write the portable folder, with how the classifier and its encoder were trained; see `save_classifier`."""
    config, folder = task.config, task.run.folder / "model"
    encoder = None if config.random_init else stored_training(str(config.model))
    save_model(model, folder, training_facts(task.run, program, protocol=protocol, encoder=encoder))
    return folder


def save_classifier(
    task: Classify, model: MiclForImageClassification, log: Logger, program: str, protocol: str
) -> list[dict[str, Any]]:
    """Write the portable classifier, evaluate it, write its eval.json and card, and print the table.

    Args:
        task: that trained it.
        model: what to write, on the device.
        log: of the run, for the last accuracies.
        program: entry point, for the command.
        protocol: how it was trained, in words.

    Returns:
        The entries of eval.json.
    """
    run, config, source = task.run, task.config, task.eval_source
    accelerator, folder = run.accelerator, run.folder / "model"
    if accelerator.is_main_process:
        write_classifier(task, model, program, protocol)
    entries: list[dict[str, Any]] = []
    if source:
        scores, labels = predict(accelerator, model, source, config.max_images, config.num_workers)
        found = accuracies(scores, labels)
        log.write_evaluation(lambda: found)
        entries = [
            result(
                program,
                config,
                source,
                len(labels),
                protocol=protocol,
                metric=METRICS[name],
                value=value,
                seed=config.seed,
                model=config.model,
                random_init=config.random_init,
                mixed_precision=config.mixed_precision,
                train_split=run.source.split,
                train_fingerprint=run.source.fingerprint,
                num_train_images=run.source.num_images,
            )
            for name, value in found.items()
        ]
        if accelerator.is_main_process:
            add_results(folder, entries)
        rows = {METRICS[name]: f"{value:6.1%}" for name, value in found.items()}
        accelerator.print(table(f"{protocol}, {len(labels)} images of {source.split!r}", rows))
    if accelerator.is_main_process:
        write_card(folder, run.folder.name, config.push_to_hub)
    accelerator.print(f"model: {folder}")
    return entries
