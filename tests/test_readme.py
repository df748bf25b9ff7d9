"""The commands of README and guide are run as they are written, but with flags behind them that leave less to do.

What they come to without these is in `model_cards/`.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import skimage.data
import torch
import yaml

from modeling_micl import MiclForPreTraining, MiclPreTrainedModel


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "training").rglob("*.md"))]
READ = "".join((ROOT / page).read_text() for page in ("README.md", "training/GUIDE.md"))


def block(marker: str) -> str:
    match = re.search(rf"<!-- {marker} -->\n```\w+\n(.*?)```", READ, re.DOTALL)
    assert match, f"no block is marked {marker!r}"
    return match[1]


def run(command: str, folder: Path, flags: str = "") -> str:
    """What commands of the README print, each a line, with these flags behind it."""
    command = "".join(f"{line} {flags}\n" for line in command.splitlines())
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
    printed = run(command, workplace, "--epochs 12")

    results = json.loads((workplace / "runs/photos/model/eval.json").read_text())["results"]
    accuracy = {entry["features"]: entry["value"] for entry in results}
    assert accuracy["encoder after training"] >= 0.85
    assert accuracy["encoder after training"] > accuracy["colour histogram"] > accuracy["raw pixels"]
    assert accuracy["encoder after training"] > accuracy["encoder before training"] + 0.05
    for name, value in accuracy.items():
        assert re.search(rf"{name} +{value:.1%}", printed), f"{name} is not in the printed table"

    snippet = block("use") + "assert features.shape == (1, 128) and features.isfinite().all()\n"
    subprocess.run([sys.executable, "-c", snippet], cwd=workplace, check=True)
    snippet = "import sys; sys.modules['modeling_micl'] = None\n" + block("use without the package")
    run(shlex.join([sys.executable, "-c", snippet]), workplace)


@pytest.mark.slow
def test_the_model_is_fine_tuned_and_judged_as_the_readme_says(workplace: Path) -> None:
    """Goes on where the main command ended."""
    run(block("fine-tune"), workplace, "--epochs 1")
    snippet = block("classify") + "assert classify('picture.jpg')[0]['label'] == 'rocket'\n"
    subprocess.run([sys.executable, "-c", snippet], cwd=workplace, check=True)

    run(block("judge"), workplace, "--max_images 1024")
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


def test_a_segmentation_model_starts_from_the_pretrained_backbone_as_the_readme_says(
    tiny_model: Callable[..., MiclPreTrainedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a model as deep as the main command's, so that the stages named are there."""
    recipe = yaml.safe_load((ROOT / "training/recipes/photos.yaml").read_text())
    pretrained = tiny_model(MiclForPreTraining, num_hidden_layers=recipe["num_hidden_layers"])
    pretrained.save_pretrained(tmp_path / "runs/photos/model")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(block("segment"), names)
    torch.testing.assert_close(names["model"].backbone.state_dict(), pretrained.vit.state_dict(), rtol=0, atol=0)
    assert names["model"](torch.randn(2, 3, 48, 64)).logits.shape == (2, 21, 48, 64)


@pytest.mark.slow
def test_the_model_is_ready_to_be_published_as_the_readme_says(workplace: Path) -> None:
    """Goes on where the main command ended; all but the sending."""
    login, command = block("publish").splitlines()
    assert login == "hf auth login"
    printed = run(command, workplace, "--dry_run")
    assert "YOUR_NAME/micl-photos at main: 12 files" in printed  # three of them figures, four the code
    card = (workplace / "runs/photos/model/README.md").read_text()
    assert 'MiclModel.from_pretrained("YOUR_NAME/micl-photos")' in card
    assert str(workplace) not in card


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_everything_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text().replace("training.NAME", "").replace("training/benchmarks/NAME.json", "")  # stand for any
    for path in re.findall(r"(?<![\w/])(?:training/recipes|training/benchmarks|model_cards|tests)/[\w/]+\.\w+", text):
        assert (ROOT / path).exists(), path
    for target in re.findall(r'\]\((?!https?:)([^)]+)\)|src="(?!https?:)([^"]+)"', text):
        file, _, heading = "".join(target).partition("#")
        assert (page.parent / file).exists(), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", (page.parent / file if file else page).read_text(), re.MULTILINE)
            assert heading in {name.lower().replace(" ", "-").replace(",", "") for name in headings}, target
    for module in re.findall(r"python -m ((?:training|modeling_micl|tests)[\w.]+)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module
