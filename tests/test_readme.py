"""The README's commands are run as they are written."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import skimage.data


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def block(marker: str) -> str:
    match = re.search(rf"<!-- {marker} -->\n```\w+\n(.*?)```", README, re.DOTALL)
    assert match, f"README.md has no block marked {marker!r}"
    return match[1]


def run(command: str, folder: Path) -> str:
    """What a command of the README prints."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "HF_HOME": str(folder / "hf")}
    done = subprocess.run(
        f"set -e\n{command}", shell=True, cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader stands who has cloned the repository and has one picture."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("training", "modeling_micl", "model_cards"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "picture.jpg").symlink_to(Path(skimage.data.__file__).parent / "rocket.jpg")
    return folder


@pytest.mark.slow
def test_the_main_command_learns_and_its_model_is_used_as_the_readme_says(workplace: Path) -> None:
    install, command = block("main command").strip().split(" && ")
    assert install.startswith("pip install")
    printed = run(command, workplace)

    results = json.loads((workplace / "runs/photos/model/eval.json").read_text())["results"]
    accuracy = {entry["features"]: entry["value"] for entry in results}
    assert accuracy["encoder after training"] >= 0.85
    assert accuracy["encoder after training"] > accuracy["colour histogram"] > accuracy["raw pixels"]
    assert accuracy["encoder after training"] > accuracy["encoder before training"] + 0.05
    for name, value in accuracy.items():
        assert re.search(rf"{name} +{value:.1%}", printed), f"{name} is not in the printed table"

    snippet = block("use") + "assert features.shape == (1, 128) and features.isfinite().all()\n"
    subprocess.run([sys.executable, "-c", snippet], cwd=workplace, check=True)


@pytest.mark.slow
def test_the_model_is_fine_tuned_and_judged_as_the_readme_says(workplace: Path) -> None:
    """Goes on where the main command ended."""
    run(block("fine-tune"), workplace)
    snippet = block("classify") + "assert classify('picture.jpg')[0]['label'] == 'rocket'\n"
    subprocess.run([sys.executable, "-c", snippet], cwd=workplace, check=True)

    run(block("judge"), workplace)
    encoder, classifier = (
        json.loads((workplace / f"runs/{name}/model/eval.json").read_text())["results"]
        for name in ("photos", "finetune_photos")
    )
    knn = {entry["features"]: entry["value"] for entry in encoder if entry["protocol"].startswith("kNN")}
    assert any(entry["protocol"].startswith("linear probe") for entry in encoder)
    assert classifier[0]["metric"] == "top-1 accuracy"
    assert classifier[0]["value"] > knn["encoder before training"]
    assert {entry.get("hidden_share") for entry in classifier} >= {0.0, 0.5, 0.95}
    assert any(entry["protocol"].startswith("classifier on another dataset") for entry in classifier)


@pytest.mark.slow
def test_images_are_searched_for_as_the_readme_says(workplace: Path) -> None:
    """Goes on where the main command ended."""
    printed = run(block("search"), workplace)
    assert "2048 vectors of 128 numbers in runs/photos/vectors" in printed
    assert re.search(r"nearest by cosine to picture.jpg\n  1\. +0\.\d+  rocket, image \d+", printed)
    for name in ("search.png", "fragments.png"):
        assert (workplace / name).stat().st_size > 10_000
    results = json.loads((workplace / "runs/photos/model/eval.json").read_text())["results"]
    found = {
        e["visible_share"]: e["value"] for e in results if e.get("task") == "image-retrieval" and "5" in e["metric"]
    }
    assert 0.05 < found[0.05] < found[0.25] < found[1.0]


def test_every_recipe_and_file_that_the_readme_names_exists() -> None:
    for path in re.findall(r"(?:training/recipes|model_cards)/[\w/]+\.\w+", README):
        assert (ROOT / path).exists(), path
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", README):
        assert (ROOT / target).exists(), target
