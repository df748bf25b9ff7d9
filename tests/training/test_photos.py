"""The demonstration data: made offline, the same everywhere, train and test apart."""

import io
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from training import photos
from training.images import decode_rgb
from training.photos import CROP_PIXELS, PHOTOS, photo_crops
from training.source import available_splits, open_source


@pytest.fixture(autouse=True)
def _few_crops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photos, "CROPS_PER_PHOTO", {"train": 4, "test": 2})


def test_the_crops_are_a_labelled_dataset_with_a_test_split() -> None:
    assert available_splits("photos") == ["train", "test"]
    for split, per_photo, shards in (("train", 4, 8), ("test", 2, 2)):
        source = open_source("photos", split)
        assert source.num_images == per_photo * len(PHOTOS)
        assert len(source.lengths) == shards
        assert source.class_names == list(PHOTOS)
        rows = [row for shard, length in enumerate(source.lengths) for row in source.read(shard, 0, length)]
        labels = [source.label_of(row) for row in rows]
        assert np.bincount(labels).tolist() == [per_photo] * len(PHOTOS)
        assert labels != sorted(labels)
        for row in rows:
            image = Image.open(io.BytesIO(source.image_of(row)["bytes"]))
            assert (image.size, image.mode) == ((CROP_PIXELS, CROP_PIXELS), "RGB")


def test_they_are_made_once_and_always_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = photo_crops()
    assert photo_crops() == first
    content = {path.name: path.read_bytes() for path in first.iterdir()}
    assert len(content) == 10
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "other")
    second = photo_crops()
    assert second != first
    assert {path.name: path.read_bytes() for path in second.iterdir()} == content
    assert [path.name for path in second.parent.iterdir()] == [second.name]


def test_no_pixel_is_in_both_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this photograph the gray value is the horizontal position, so a crop tells where it is from."""
    position = np.tile(np.linspace(0, 255, 600), (200, 1)).astype(np.uint8)
    Image.fromarray(position).save(tmp_path / "position.png")
    monkeypatch.setattr(photos, "PHOTOS", {"position": str(tmp_path / "position.png")})
    monkeypatch.setattr(photos, "CROPS_PER_PHOTO", {"train": 64, "test": 64})
    spans: dict[str, list[tuple[float, float]]] = {}
    for split in ("train", "test"):
        source = open_source("photos", split)
        rows = [row for shard, length in enumerate(source.lengths) for row in source.read(shard, 0, length)]
        columns = [np.median(decode_rgb(source.image_of(row)), axis=(0, 2)) for row in rows]
        spans[split] = [(float(column[0]), float(column[-1])) for column in columns]
    assert max(end for _, end in spans["train"] + spans["test"]) > 220
    assert len({round(begin) for begin, _ in spans["train"]}) > 10
    for begin, end in spans["train"]:
        assert all(min(end, other_end) - max(begin, other) < 3 for other, other_end in spans["test"])  # JPEG's noise


def test_a_process_that_comes_second_takes_what_the_first_made(monkeypatch: pytest.MonkeyPatch) -> None:
    write, made = photos._write_split, []

    def overtaken(split: str, folder: Path, parts: list[photos.Part]) -> None:
        write(split, folder, parts)
        if split == "test" and not made:
            made.append(folder)
            made.append(photo_crops())

    monkeypatch.setattr(photos, "_write_split", overtaken)
    folder = photo_crops()
    assert folder == made[1]
    assert len(list(folder.glob("*.parquet"))) == 10
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_crash_half_way_leaves_nothing_that_looks_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    write = photos._write_split

    def crashes(split: str, folder: Path, parts: list[photos.Part]) -> None:
        if split == "test":
            raise KeyboardInterrupt
        write(split, folder, parts)

    with monkeypatch.context() as patch:
        patch.setattr(photos, "_write_split", crashes)
        with pytest.raises(KeyboardInterrupt):
            photo_crops()
    assert open_source("photos", "test").num_images == 2 * len(PHOTOS)
