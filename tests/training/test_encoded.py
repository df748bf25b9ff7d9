"""What workers leave encoded, and with which crops."""

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import encode, picture
from jpegs import SIDES, jpeg, mixed, turned_jpeg, write

from training import encoded
from training.data import TrainingBatches, TrainingOrder, batches
from training.encoded import EncodedBatch, EncodedBatches, EncodedCrop, plain_jpeg
from training.images import CropAndFlip, random_crop_box


CROP = CropAndFlip((16, 24), min_scale=0.2, horizontal_flip=True)


def unmarked_cmyk(number: int) -> bytes:
    """Without the segment in which Adobe's programs, and Pillow, say what the four colours are."""
    file = jpeg(number, "CMYK")
    start = file.index(b"\xff\xee")
    return file[:start] + file[start + 2 + int.from_bytes(file[start + 2 : start + 4], "big") :]


PLAIN = {
    "RGB": jpeg(0),
    "gray": jpeg(0, "L"),
    "upright": turned_jpeg(0, orientation=1),
    "zeros behind": jpeg(0) + bytes(7),
    "colours at full resolution": jpeg(0, subsampling=0),
}
OTHER = {
    "PNG": encode(picture(0, SIDES)),
    "WebP": encode(picture(0, SIDES), "WEBP"),
    "CMYK": jpeg(0, "CMYK"),
    "CMYK, not marked": unmarked_cmyk(0),
    "stored as RGB": jpeg(0, keep_rgb=True),
    "progressive": jpeg(0, progressive=True),
    "turned": turned_jpeg(0),
    "several in one file": encode(picture(0, SIDES), "MPO", save_all=True, append_images=[picture(1, SIDES)]),
    "truncated": jpeg(0)[:-40],
    "truncated, zeros behind": jpeg(0)[:-40] + bytes(40),
    "more behind": jpeg(0) + b"garbage",
    "header only": jpeg(0)[:20],
    "nothing": b"",
    "garbage": b"this is no image",
}


@pytest.mark.parametrize("file", PLAIN.values(), ids=PLAIN)
def test_a_plain_jpeg_is_left_encoded(file: bytes, tmp_path: Path) -> None:
    (tmp_path / "photo").write_bytes(file)
    for stored in ({"bytes": file, "path": "elsewhere"}, {"bytes": None, "path": str(tmp_path / "photo")}):
        assert plain_jpeg(stored) == (file, SIDES)


@pytest.mark.parametrize("file", OTHER.values(), ids=OTHER)
def test_anything_else_is_not(file: bytes, tmp_path: Path) -> None:
    (tmp_path / "photo").write_bytes(file)
    for stored in ({"bytes": file, "path": None}, {"bytes": None, "path": str(tmp_path / "photo")}):
        assert plain_jpeg(stored) is None


@pytest.mark.parametrize("stored", [None, {}, {"bytes": None, "path": None}, {"bytes": None, "path": "nowhere.jpg"}])
def test_no_file_is_none(stored: dict[str, Any] | None) -> None:
    assert plain_jpeg(stored) is None


def read(size: tuple[int, int], folder: Path) -> Any:
    """What a worker makes of a JPEG of this width and height."""
    file = encode(picture(0, size), "JPEG")
    order = TrainingOrder(write(folder, [file] * 4), 2, seed=0, window=4)
    return EncodedBatches(order, CROP, 0, 2).read({"bytes": file})(np.random.default_rng(0))


def test_large_images_are_decoded_by_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(read((16 * 32, 20), tmp_path), EncodedCrop)
    assert read((16 * 32 + 1, 20), tmp_path).size == (24, 16)
    monkeypatch.setattr(encoded, "MOST_PIXELS", 60 * 44)
    assert isinstance(read((60, 44), tmp_path), EncodedCrop)
    assert read((60, 45), tmp_path).size == (24, 16)


def test_jpegs_and_other_images_keep_their_places(tmp_path: Path) -> None:
    files = mixed(36)
    order = TrainingOrder(write(tmp_path, files), 12, seed=3, window=36)
    some, others = (batches(kind(order, CROP, 0, 12), 0) for kind in (EncodedBatches, TrainingBatches))
    left = 0
    for batch, other in islice(zip(some, others, strict=True), 3):
        assert isinstance(batch, EncodedBatch)
        assert batch.index.tolist() == other.index.tolist()
        assert batch.labels.tolist() == other.labels.tolist()
        assert batch.broken == other.broken
        assert torch.equal(batch.pixels, other.pixels[batch.sizes == 0])
        contents = [content.numpy().tobytes() for content in batch.content.split(batch.sizes.tolist())]
        for index, content in zip(batch.index.tolist(), contents, strict=True):
            assert content == (files[index] if plain_jpeg({"bytes": files[index]}) else b"")
        left += int((batch.sizes > 0).sum())
    assert 9 < left < 27


def test_crops_follow_from_seed_epoch_and_image_as_ever(tmp_path: Path) -> None:
    order = TrainingOrder(write(tmp_path, [jpeg(number) for number in range(24)]), 12, seed=3, window=24)
    flipped = 0
    for number, batch in enumerate(islice(batches(EncodedBatches(order, CROP, 0, 12), 0), 6)):
        assert isinstance(batch, EncodedBatch)
        assert batch.pixels.shape == (0, 16, 24, 3)
        for index, box, flip in zip(batch.index.tolist(), batch.boxes.tolist(), batch.flips.tolist(), strict=True):
            rng = np.random.default_rng((3, number // 2, index, 0))
            assert box == [*random_crop_box(*SIDES, 0.2, rng)]
            assert flip == (rng.random() < 0.5)
            flipped += flip
    assert 18 < flipped < 54
