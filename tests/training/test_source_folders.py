"""Folders of images: none of them may be lost because of its name."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import encode, picture

from training.source import open_source


def write(root: Path, names: Sequence[str]) -> str:
    """Write one picture to each of these paths."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encode(picture(number)))
    return str(root)


@pytest.mark.parametrize(
    "names",
    [
        ["bus/1.png", "car/2.png", "train/3.png"],  # a class
        ["bus/1.png", "bus/bullet train.png", "car/2.png"],  # a file
        ["bus/1.png", "car/2-test.png", "car/3.png"],
        ["1.png", "2_val.png"],  # without classes
    ],
)
def test_names_that_look_like_splits_are_refused_rather_than_images_lost(names: list[str], tmp_path: Path) -> None:
    folder = write(tmp_path / "pictures", names)
    for streaming in (False, True):
        with pytest.raises(ValueError, match=rf"of the {len(names)} images .*would be left out.*/train"):
            open_source(folder, "train", streaming=streaming)


def test_the_remedy_works(tmp_path: Path) -> None:
    folder = write(tmp_path / "pictures", [f"train/{name}" for name in ("bus/1.png", "train/test.png", "val/3.png")])
    source = open_source(folder, "train")
    assert (source.num_images, source.class_names) == (3, ["bus", "train", "val"])


@pytest.mark.parametrize(
    "names",
    [
        ["bus/1.png", "car/2.png"],
        ["train/bus/1.png", "train/car/2.png", "test/bus/3.png", "poster.png"],
        ["trained/1.png", "latest/2.png"],  # words within words
    ],
)
def test_other_folders_are_opened(names: list[str], tmp_path: Path) -> None:
    assert open_source(write(tmp_path / "pictures", names), "train").num_images == 2
