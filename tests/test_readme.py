"""The README's commands are run as they are written."""

import json
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


@pytest.mark.slow
def test_the_main_command_learns_and_its_model_is_used_as_the_readme_says(tmp_path: Path) -> None:
    for name in ("training", "modeling_micl"):
        (tmp_path / name).symlink_to(ROOT / name)
    install, command = block("main command").strip().split(" && ")
    assert install.startswith("pip install")
    binaries = Path(sys.executable).parent
    done = subprocess.run(f"{binaries}/{command}", shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

    results = json.loads((tmp_path / "runs/photos/model/eval.json").read_text())["results"]
    accuracy = {entry["features"]: entry["value"] for entry in results}
    assert accuracy["encoder after training"] >= 0.85
    assert accuracy["encoder after training"] > accuracy["colour histogram"] > accuracy["raw pixels"]
    assert accuracy["encoder after training"] > accuracy["encoder before training"] + 0.05
    for name, value in accuracy.items():
        assert re.search(rf"{name} +{value:.1%}", done.stdout), f"{name} is not in the printed table"

    (tmp_path / "picture.jpg").symlink_to(Path(skimage.data.__file__).parent / "rocket.jpg")
    snippet = block("use") + "assert features.shape == (1, 128) and features.isfinite().all()\n"
    subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, check=True)


def test_every_recipe_and_file_that_the_readme_names_exists() -> None:
    for path in re.findall(r"(?:training/recipes|model_cards)/[\w/]+\.\w+", README):
        assert (ROOT / path).exists(), path
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", README):
        assert (ROOT / target).exists(), target
