"""The README.md of a portable model folder, which tells what config.json and eval.json hold and nothing else."""

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from modeling_micl import MiclConfig, __version__
from training.config import REPOSITORY
from training.evaluation import is_classifier, read_config
from training.results import EVALUATION, is_comparison, read_evaluation


TEMPLATES = Path(__file__).resolve().parents[1] / "model_cards"
NOTES = re.compile(r"(?<=<!-- notes -->\n).*?(?=<!-- end of notes -->)", re.DOTALL)
ABSOLUTE_PATH = re.compile(r"""(?<![^\s='"])~?/(?:[^\s'"/]+/)*([^\s'"/]+)/?""")
Entry = dict[str, Any]
# What the card tells of each entry of eval.json
TOLD = ("dataset", "dataset_config", "metric", "num_test_images", "protocol", "seed", "split", "task", "value")


def write_card(folder: Path, name: str, repo: str | None = None, license_name: str = "apache-2.0") -> None:
    """Write a model folder's `README.md`; what its reader has written between the two notes marks stays.

    Args:
        folder: with config.json and eval.json.
        name: of the model.
        repo: where it is on the Hub, None if it is not there.
        license_name: of the weights, as the Hub names licences.
    """
    card = folder / "README.md"
    notes = NOTES.search(card.read_text(encoding="utf-8")) if card.exists() else None
    text = render_card(
        read_config(str(folder)), read_evaluation(folder), name, repo, license_name, notes[0] if notes else ""
    )
    card.write_text(text, encoding="utf-8")


def render_card(
    config: MiclConfig,
    evaluation: dict[str, Any],
    name: str,
    repo: str | None = None,
    license_name: str = "apache-2.0",
    notes: str = "",
) -> str:
    """The card as text.

    Args:
        config: of the model.
        evaluation: content of eval.json: how it was trained, and what was measured.
        name: of the model.
        repo: where it is on the Hub, None if it is not there.
        license_name: of the weights.
        notes: what the owner wrote, as Markdown.

    Raises:
        ValueError: if eval.json lacks something that the card must tell.
    """
    evaluation = without_local_paths(evaluation)
    training, results = evaluation.get("training"), evaluation["results"]
    for entry in results:
        if missing := [name for name in TOLD if name not in entry]:
            raise ValueError(f"An entry of {EVALUATION} lacks {missing[0]!r}: measure it again with training.*")
    own = [entry for entry in results if not is_comparison(entry)]
    classifier = is_classifier(config)
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("template.md").render(
        metadata=metadata(name, license_name, classifier, training, own).to_yaml(),
        name=name,
        place=repo or "path/to/this/folder",
        model=config,
        classifier=classifier,
        training=training,
        results=[(entry, measured(entry)) for entry in own],
        comparisons=[(entry, measured(entry)) for entry in results if is_comparison(entry)],
        version=((training or {}).get("versions") or {}).get("modeling-micl", __version__),
        evaluation_file=EVALUATION,
        license_name=license_name,
        notes=notes,
    )


def metadata(
    name: str, license_name: str, classifier: bool, training: dict[str, Any] | None, results: list[Entry]
) -> ModelCardData:
    """The card's front matter, with the model's own results as a model-index."""
    settings = training["settings"] if training else {}
    base = settings.get("model") or settings.get("init_from")
    return ModelCardData(
        library_name="transformers",
        license=license_name,
        pipeline_tag="image-classification" if classifier else "image-feature-extraction",
        tags=["micl", "vision-transformer", "masked-image-contrastive-learning"]
        + ([] if classifier else ["self-supervised-learning"]),
        datasets=[settings["dataset"]] if is_hub_id(settings.get("dataset")) else None,
        base_model=base if is_hub_id(base) else None,
        metrics=["accuracy"] if results else None,
        model_name=name,
        eval_results=[model_index_entry(entry) for entry in results] or None,
    )


def model_index_entry(entry: Entry) -> EvalResult:
    """One entry of eval.json in the Hub's words; the protocol and all that tells it from others are arguments."""
    return EvalResult(
        task_type=entry["task"],
        dataset_type=entry["dataset"],
        dataset_name=entry["dataset"],
        dataset_config=entry["dataset_config"],
        dataset_split=entry["split"],
        metric_type="accuracy",
        metric_name=entry["metric"],
        metric_value=entry["value"],
        metric_args={"protocol": measured(entry), "num_test_images": entry["num_test_images"], "seed": entry["seed"]},
    )


def measured(entry: Entry) -> str:
    """How an entry of eval.json was measured, in words."""
    parts = [entry["protocol"]]
    if "features" in entry:
        parts.append(f"features: {entry['features']}")
    if entry.get("label_share", 1) != 1:
        parts.append(f"{100 * entry['label_share']:g} % of the labels")
    if "hidden_share" in entry:
        parts.append(f"{100 * entry['hidden_share']:g} % of the patches hidden")
    if "num_train_images" in entry:
        parts.append(f"{entry['num_train_images']:,} labelled images")
    return "; ".join(parts)


def is_hub_id(name: str | None) -> bool:
    """Whether a dataset or model that settings name is (most likely) on the Hub: USER/NAME, and no such path here."""
    return bool(name and REPOSITORY.fullmatch(name)) and not Path(str(name)).exists()


def without_local_paths(evaluation: dict[str, Any]) -> dict[str, Any]:
    """The same, but of absolute paths only the last part, since the others tell of their owner's disk."""
    shortened: dict[str, Any] = json.loads(json.dumps(evaluation), object_pairs_hook=_shortened)
    return shortened


def _shortened(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: ABSOLUTE_PATH.sub(r"…/\1", value) if isinstance(value, str) else value for key, value in pairs}
