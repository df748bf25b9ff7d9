"""What the evaluation programs share: their settings, loading what is judged, and predictions over processes."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from httpx2 import HTTPError
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import cached_file

from modeling_micl import MiclConfig, MiclForImageClassification, MiclModel
from modeling_micl.configuration_micl import height_and_width
from modeling_micl.hub_access import read_config_dict, reason
from training.accuracy import TopKAccuracy
from training.config import DataSettings, setting
from training.features import (
    IMAGENET,
    Frozen,
    LabelledFeatures,
    Normalization,
    cached_features,
    encoder_features,
    extract_features,
    stored_normalization,
    weights_digest,
)
from training.labels import class_names, few_shot
from training.processes import use_all_cores
from training.results import EVALUATION, RANDOM_WEIGHTS, read_evaluation, result
from training.source import ImageSource, evaluation_split, open_split


@dataclass
class EvaluationSettings(DataSettings):
    """Shared by the programs that judge a model and write eval.json."""

    model: str | None = setting(None, "what is judged: a portable folder or Hub id")
    output_dir: str | None = setting(None, "folder whose eval.json gets the results; unset, that of --model")
    max_images: int | None = setting(None, "use only so many images of each split, from all over it, for a quick look")
    seed: int = setting(0, "of everything random")
    mixed_precision: Literal["no", "bf16", "fp16"] = setting("no", "autocast of the forward pass")

    def validate(self) -> None:
        """Raise a ValueError that names the first impossible setting, its value and the remedy."""
        super().validate()
        self._validate_at_least(0, "seed")
        if self.model is None:
            raise ValueError("model is not set: name a portable folder or a Hub id with --model.")
        if self.output_dir is None and not Path(self.model).is_dir():
            raise ValueError(f"model={self.model!r} is no local folder: say with --output_dir where results go.")

    def results_folder(self) -> Path:
        """Where eval.json is."""
        return Path(self.output_dir or str(self.model))


@dataclass
class FrozenSettings(EvaluationSettings):
    """Shared by the programs that judge frozen features."""

    features: Literal["cls", "mean"] = setting("cls", "[CLS], or the patches' mean; a classifier pools as it does")
    random_init: bool = setting(False, "keep only the architecture of --model, with random weights: the comparison")
    few_shot: list[float] = setting(
        [0.01, 0.1], "also with these shares of each class's labels, in (0, 1]; 1 turns it off"
    )
    features_cache: str | None = setting(None, "folder for extracted features; unset, beside the datasets")

    def validate(self) -> None:
        """Raise a ValueError that names the first impossible setting, its value and the remedy."""
        super().validate()
        self._validate_few_shot(self.few_shot)

    def whose(self) -> str:
        """Whose features these are, for tables and eval.json."""
        classifier = is_classifier(read_config(str(self.model)))
        what = "what the head sees" if classifier else self.features
        return f"{what} of {RANDOM_WEIGHTS if self.random_init else 'the classifier' if classifier else 'the encoder'}"


@dataclass
class FrozenSplits:
    """Frozen features of the two splits, named "features", on the device."""

    train: LabelledFeatures
    test: LabelledFeatures
    sources: tuple[ImageSource, ImageSource]
    class_names: list[str]

    def selections(self, settings: FrozenSettings) -> Iterator[tuple[float, Tensor, Tensor]]:
        """Share of the labels, features and labels to learn from: all, then the few of each few-shot share."""
        features, labels = self.train.features["features"], self.train.labels
        yield 1.0, features, labels
        for share in settings.few_shot:
            if share == 1:
                continue
            chosen = few_shot(labels, share, settings.seed)
            yield share, features[chosen], labels[chosen]

    def result(self, program: str, settings: FrozenSettings, share: float, used: int, **more: Any) -> dict[str, Any]:
        """An entry of eval.json; see `training.results.result`."""
        train, test = self.sources
        return result(
            program,
            settings,
            test,
            len(self.test.labels),
            seed=settings.seed,
            model=str(Path(str(settings.model))),
            mixed_precision=settings.mixed_precision,
            features=settings.whose(),
            label_share=share,
            num_train_images=used,
            train_split=train.split,
            train_fingerprint=train.fingerprint,
            **more,
        )


def frozen_splits(accelerator: Accelerator, settings: FrozenSettings) -> FrozenSplits:
    """Extract the features of both splits, or take them from the cache.

    Raises:
        ValueError: if there is no split to evaluate on, one lacks labels, or they have different classes.
    """
    with accelerator.main_process_first():  # the others find what the first has prepared
        sources = open_labelled(settings)
        names = class_names(*sources)
    model = load_frozen(str(settings.model), settings.random_init, settings.seed).to(accelerator.device)
    normalization = stored_normalization(str(settings.model))
    extractor = encoder_features(model, accelerator, settings.features, normalization=normalization)
    size = height_and_width(model.config.image_size)
    cache = Path(settings.features_cache or Path(datasets.config.HF_DATASETS_CACHE) / "micl_features")

    digest = weights_digest(model)

    def features_of(source: ImageSource) -> LabelledFeatures:
        columns = [source.image_column, source.label_column]
        how = [settings.features, settings.max_images, source.random_access, settings.mixed_precision]
        key = [digest, asdict(normalization), source.version, source.split, *columns, *how]
        extract = partial(extract_features, accelerator, source, {"features": extractor}, size)
        compute = partial(extract, settings.max_images, settings.num_workers)
        found = cached_features(accelerator, cache, key, compute).to(accelerator.device)
        if not len(found.labels):
            raise ValueError(f"No image of the split {source.split!r} could be decoded and has a label.")
        return found

    return FrozenSplits(features_of(sources[0]), features_of(sources[1]), sources, names)


def open_labelled(settings: DataSettings) -> tuple[ImageSource, ImageSource]:
    """The split to learn from and the one to evaluate on.

    Raises:
        ValueError: if there is none to evaluate on.
    """
    name = evaluation_split(settings)
    if name is None:
        raise ValueError(
            f"--dataset {settings.dataset!r} has no validation or test split: name one with --eval_split."
        )
    return open_split(settings, settings.split), open_split(settings, name)


def start_evaluation(settings: EvaluationSettings) -> Accelerator:
    """Processes and precision."""
    accelerator = Accelerator(mixed_precision=settings.mixed_precision)
    use_all_cores(accelerator)
    return accelerator


def read_config(model: str, option: str = "--model") -> MiclConfig:
    """The configuration of a portable folder or Hub id that the user gave with this option.

    Raises:
        ValueError: if it cannot be read, or is that of another kind of model.
    """
    model_type = read_config_dict(model, option).get("model_type")
    if model_type != MiclConfig.model_type:
        raise ValueError(f"{option} {model!r} is a {model_type!r} model, not a 'micl' one.")
    try:
        config: MiclConfig = MiclConfig.from_pretrained(model)
    except (ValueError, StrictDataclassError) as error:
        raise ValueError(f"{option} {model!r} has an impossible config.json: {reason(error)}") from error
    return config


def stored_training(model: str) -> dict[str, Any] | None:
    """How a portable folder or Hub id came about, by its eval.json; None if it does not tell."""
    file = cached_file(model, EVALUATION, _raise_exceptions_for_missing_entries=False)
    return read_evaluation(Path(file).parent)["training"] if file else None


def is_classifier(config: MiclConfig) -> bool:
    """Whether a stored model has a classification head."""
    return MiclForImageClassification.__name__ in (config.architectures or [])


def load_classifier(model: str) -> MiclForImageClassification:
    """A stored classifier in evaluation mode.

    Raises:
        ValueError: if the stored model has no head, or some of its weights are missing, as they would be random.
    """
    if not is_classifier(read_config(model)):
        raise ValueError(f"--model {model!r} has no classification head: train one with training.finetune.")
    loaded = _load(MiclForImageClassification, model, optional=())
    assert isinstance(loaded, MiclForImageClassification)
    loaded.eval()
    return loaded


def load_encoder(model: str, add_final_norm: bool = True, option: str = "--model") -> MiclModel:
    """The encoder of a stored model.

    Args:
        model: portable folder or Hub id.
        add_final_norm: False leaves out the final LayerNorm, for heads that normalise after pooling.
        option: how the user gave it, for errors.

    Raises:
        ValueError: if some of its weights are missing, as they would be random.
    """
    optional = "layernorm." if is_classifier(read_config(model, option)) or not add_final_norm else ()
    loaded = _load(MiclModel, model, optional, option, add_final_norm=add_final_norm)
    assert isinstance(loaded, MiclModel)
    return loaded


def _load(
    kind: type[PreTrainedModel], model: str, optional: str | tuple[()], option: str = "--model", **options: Any
) -> PreTrainedModel:
    """A stored model with all its weights but those whose names begin with `optional`."""
    try:
        loaded, info = kind.from_pretrained(model, output_loading_info=True, **options)
    except (OSError, SafetensorError, HTTPError) as error:
        raise ValueError(f"{option} {model!r}: its weights cannot be read: {reason(error)}") from error
    missing = sorted(name for name in info["missing_keys"] if not name.startswith(optional))
    if missing:
        raise ValueError(f"{option} {model!r} lacks weights, as {missing[0]!r} ({len(missing)} in all).")
    assert isinstance(loaded, PreTrainedModel)
    return loaded


def load_frozen(model: str, random_init: bool = False, seed: int = 0) -> Frozen:
    """What gives a stored model's features: the encoder, or a classifier without its last layer.

    Args:
        model: portable folder or Hub id.
        random_init: keep only the architecture, with random weights.
        seed: of the random weights.
    """
    config = read_config(model)
    set_seed(seed)
    if not is_classifier(config):
        encoder = MiclModel(config) if random_init else load_encoder(model)
        encoder.eval()
        return encoder
    classifier = MiclForImageClassification(config) if random_init else load_classifier(model)
    classifier.classifier = torch.nn.Identity()
    classifier.eval()
    return classifier


def check_same_classes(config: MiclConfig, names: list[str], model: str | None) -> None:
    """Raise a ValueError unless a classifier's classes are the dataset's, in the same order."""
    own = [config.id2label[label] for label in range(config.num_labels)]
    if len(own) != len(names):
        raise ValueError(
            f"The head of --model {model!r} has {len(own)} classes, but the dataset has {len(names)}: use the dataset "
            "it was trained for, or train a fresh head with training.finetune --new_head."
        )
    differing = [f"{label}: {a!r}, {b!r}" for label, (a, b) in enumerate(zip(own, names, strict=True)) if a != b]
    if differing:
        raise ValueError(
            f"The classes of --model {model!r} and of the dataset differ (label: head, dataset): "
            f"{'; '.join(differing[:3])}. Use the dataset it was trained for, or a fresh head."
        )


def predict(
    accelerator: Accelerator,
    model: MiclForImageClassification,
    source: ImageSource,
    max_images: int | None,
    num_workers: int,
    normalization: Normalization = IMAGENET,
) -> tuple[Tensor, Tensor]:
    """Scores (n, C) and labels (n,) of a split's labelled images, each once, the same on every process."""
    size = height_and_width(model.config.image_size)
    extractors = {"scores": encoder_features(model.eval(), accelerator, normalization=normalization)}
    predicted = extract_features(accelerator, source, extractors, size, max_images, num_workers)
    return predicted.features["scores"], predicted.labels


def accuracies(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """`top1_accuracy` and, for more than five classes, `top5_accuracy`, in [0, 1].

    Raises:
        ValueError: if there are no labelled images.
    """
    if not len(labels):
        raise ValueError("None of the images could be decoded and has a label: check --eval_split and the data.")
    metric = TopKAccuracy(keep_in_memory=True)
    ranked = scores.argsort(dim=1, descending=True, stable=True)[:, :6]  # the metric stores what it is given in Arrow
    found: dict[str, float] = metric.compute(predictions=ranked.numpy(), references=labels.numpy(), ranked=True)
    return found
