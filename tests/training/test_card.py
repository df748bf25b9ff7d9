"""The card tells what eval.json and config.json hold, and its code runs."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import skimage.data
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from modeling_micl import MiclForImageClassification, MiclForPreTraining, MiclPreTrainedModel
from training.card import TEMPLATES, without_local_paths, write_card
from training.recipe_cards import pretraining_recipes, recipe_card
from training.results import RANDOM_WEIGHTS, add_results, save_model


Build = Callable[..., MiclPreTrainedModel]
PHOTO = Path(skimage.data.__file__).parent / "rocket.jpg"
KIND = {"encoder": MiclForPreTraining, "classifier": MiclForImageClassification}


def entry(value: float, **facts: Any) -> dict[str, Any]:
    known = {"task": "image-classification", "protocol": "kNN", "metric": "top-1 accuracy", "seed": 3}
    where = {"dataset": "me/pictures", "dataset_config": None, "split": "test", "num_test_images": 1234}
    return {**known, **where, "value": value, **facts}


@pytest.fixture
def store(tiny_model: Build, tmp_path: Path) -> Callable[..., Path]:
    """Write a model folder with these results, and its card."""

    def store(*results: dict[str, Any], kind: str = "encoder", **options: Any) -> Path:
        folder = tmp_path / kind
        save_model(tiny_model(KIND[kind], **options), folder)
        add_results(folder, list(results))
        write_card(folder, "tiny", **({"repo": "me/tiny"} if results else {}))
        return folder

    return store


def card(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


# In one process, as that is slow to start, but without the names of one another; the package is hidden from the first.
RUN_EACH = """
import json, sys
without_package, with_package = map(json.loads, sys.argv[1:])
sys.modules["modeling_micl"] = None
for program in without_package:
    exec(program, {"__name__": "__main__"})
del sys.modules["modeling_micl"]
for program in with_package:
    exec(program, {"__name__": "__main__"})
"""


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "snippets"), [("encoder", 3), ("classifier", 3)])
def test_the_code_in_the_card_runs(kind: str, snippets: int, store: Callable[..., Path], tmp_path: Path) -> None:
    code = re.findall(r"```python\n(.*?)```", card(store(kind=kind)), re.DOTALL)
    assert len(code) == snippets
    ends = {
        "features": "assert features.shape == (1, 32)",
        "views": "assert views.shape == (1, 2, 32)",
        "classify": "assert classify('picture.jpg')[0]['score'] > 0",
        "label": "assert label in model.config.id2label",
    }
    (tmp_path / "picture.jpg").symlink_to(PHOTO)
    with_package, without_package = [], []
    for snippet in code:
        assigned = re.findall(r"^(\w+) = ", snippet, re.MULTILINE)
        check = next(ends[name] for name in reversed(assigned) if name in ends)
        programs = with_package if "modeling_micl" in snippet else without_package
        programs.append(snippet.replace("path/to/this/folder", kind) + check)
    assert with_package
    assert without_package
    done = subprocess.run(
        [sys.executable, "-c", RUN_EACH, *map(json.dumps, (without_package, with_package))],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_number_in_the_results_is_in_eval_json(store: Callable[..., Path]) -> None:
    folder = store(
        entry(0.8125, features="cls of the encoder", label_share=0.01, num_train_images=500),
        entry(0.25, features=f"cls of {RANDOM_WEIGHTS}"),
        entry(0.125, features="raw pixels"),
    )
    section = card(folder).split("## Results")[1].split("\n## ")[0]
    own, comparisons = section.split("For comparison")
    assert re.findall(r"\d+\.\d%", own) == ["81.2%"]
    assert re.findall(r"\d+\.\d%", comparisons) == ["25.0%", "12.5%"]
    assert "1 % of the labels; 500 labelled images | 1,234 images of `me/pictures`, split `test` |" in own

    (folder / "eval.json").write_text('{"results": []}')
    write_card(folder, "tiny")
    assert "Not evaluated yet." in card(folder)
    assert not re.findall(r"\d\.\d%", card(folder))


def test_the_hub_reads_the_models_own_results(store: Callable[..., Path]) -> None:
    folder = store(entry(0.8125), entry(0.5, protocol="linear probe"), entry(0.125, features="raw pixels"))
    metadata = ModelCard.load(folder / "README.md").data
    assert (metadata.library_name, metadata.pipeline_tag) == ("transformers", "image-feature-extraction")
    name, results = model_index_to_eval_results(metadata.to_dict()["model-index"])
    assert name == "tiny"
    found = [(each.metric_value, each.metric_args["protocol"], each.dataset_type) for each in results]
    assert found == [(0.8125, "kNN", "me/pictures"), (0.5, "linear probe", "me/pictures")]


def test_what_the_owner_wrote_stays(store: Callable[..., Path]) -> None:
    folder = store()
    marked = card(folder).replace("<!-- notes -->\n", "<!-- notes -->\nMade for the 3 museums.\n")
    (folder / "README.md").write_text(marked)
    write_card(folder, "renamed")
    assert card(folder) == marked.replace("tiny", "renamed")


def test_of_absolute_paths_only_the_last_part_is_told() -> None:
    told = {
        "/data/me/cifar10": "…/cifar10",
        "~/cifar10/": "…/cifar10",
        "knn --model /a/b/model --dataset=/c/d --seed 1": "knn --model …/model --dataset=…/d --seed 1",
        "linear_probe --model '/a/my runs/model'": "linear_probe --model '…/my runs/model'",
        "me/pictures": "me/pictures",
        "runs/photos/model": "runs/photos/model",
        "https://huggingface.co/me": "https://huggingface.co/me",
        "1/64 of it": "1/64 of it",
    }
    assert without_local_paths({"results": [{"a": path} for path in told]}) == {
        "results": [{"a": shown} for shown in told.values()]
    }


@pytest.mark.parametrize("recipe", pretraining_recipes(), ids=lambda recipe: recipe.stem)
def test_every_recipe_has_its_card(recipe: Path) -> None:
    """If this fails, run `python -m training.recipe_cards`."""
    stored = TEMPLATES / recipe.stem
    assert card(stored) == recipe_card(recipe)
    if not (stored / "eval.json").exists():
        assert "Not trained yet: there are no weights and no results." in card(stored)
        assert not re.findall(r"\d\.\d ?%", card(stored))
    else:
        training = json.loads((stored / "eval.json").read_text())["training"]
        assert training["progress"]["step"] == training["plan"]["total_steps"]
        assert f"recipes/{recipe.name}" in training["command"]
