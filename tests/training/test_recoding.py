"""Images made small: what is kept, what is changed, and how little of the pixels is lost."""

import io
from pathlib import Path

import numpy as np
import pytest
from conftest import encode, picture
from nasty_images import NASTY, Nasty
from PIL import Image

from training.images import decode_rgb
from training.recoding import Recoding, pixel_difference


# Of the images in all forms, those that anybody decodes to the same pixels
KEPT = {
    *("rgb-16.png", "progressive.jpg", "interlaced.png", "one-pixel.png"),
    *("a-png-named.jpg", "a-jpeg-named.png", "twin-1.png", "twin-2.png", "more-behind.jpg", "no-end.png"),
    *("checksum-of-pixels.png", "profile.jpg", "exif.jpg"),
    *("orientation-0.jpg", "orientation-1.jpg", "orientation-9.jpg", "orientation-65535.jpg"),
}


@pytest.mark.parametrize("nasty", NASTY, ids=str)
def test_an_image_of_any_form_becomes_what_training_would_see_or_is_refused_as_there(nasty: Nasty) -> None:
    stored = {"bytes": nasty.stored, "path": nasty.name}
    recoding = Recoding()
    if nasty.pixels is None:
        if not nasty.stored:
            stored["path"] = None
        with pytest.raises(Exception) as refused:  # noqa: PT011 (Pillow raises nearly anything)
            recoding.recode(stored)
        assert f"{refused.type.__name__}: {refused.value}".startswith(nasty.reason)
        return
    recoded = recoding.recode(stored)
    assert recoded.kept == (nasty.name in KEPT)
    assert recoded.kept == (recoded.content == nasty.stored)
    assert recoded.bytes_before == len(nasty.stored)
    assert not recoded.resized
    with Image.open(io.BytesIO(recoded.content)) as image:
        assert image.format in ("JPEG", "PNG")
        assert image.mode == "RGB"
        by_anybody = np.asarray(image).astype(int)
    assert by_anybody.shape == nasty.pixels.shape
    assert np.abs(by_anybody - nasty.pixels).mean() <= (nasty.tolerance if recoded.kept else 5)


@pytest.mark.parametrize(
    ("size", "expected"), [((60, 40), (36, 24)), ((40, 60), (24, 36)), ((25, 25), (24, 24)), ((1000, 26), (923, 24))]
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_larger_image_is_resized_to_the_short_side(
    size: tuple[int, int], expected: tuple[int, int], kind: str
) -> None:
    stored = {"bytes": encode(picture(1, size), kind), "path": None}
    recoded = Recoding(short_side=24, quality=95).recode(stored)
    assert (recoded.kept, recoded.resized) == (False, True)
    after = Image.open(io.BytesIO(recoded.content))
    assert (after.format, after.size) == ("JPEG", expected)
    exact = decode_rgb(stored).resize(expected, Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(after).astype(int) - np.asarray(exact)).mean() < 3


@pytest.mark.parametrize("size", [(60, 24), (24, 24), (9, 100)])
def test_a_smaller_image_is_neither_enlarged_nor_changed(size: tuple[int, int]) -> None:
    content = encode(picture(1, size), "JPEG")
    recoded = Recoding(short_side=24).recode({"bytes": content, "path": None})
    assert (recoded.content, recoded.kept, recoded.resized) == (content, True, False)
    changed = Recoding(short_side=24).recode({"bytes": encode(picture(1, size), "WEBP"), "path": None})
    assert (changed.kept, changed.resized, Image.open(io.BytesIO(changed.content)).size) == (False, False, size)


def test_colours_keep_their_resolution() -> None:
    """Red beside blue, one pixel each: with halved colours both would be violet."""
    stripes = np.zeros((32, 32, 3), dtype=np.uint8)
    stripes[:, ::2, 0], stripes[:, 1::2, 2] = 255, 255
    recoded = Recoding().recode({"bytes": encode(Image.fromarray(stripes), "BMP"), "path": None})
    after = np.asarray(Image.open(io.BytesIO(recoded.content))).astype(int)
    assert np.abs(after - stripes).mean() < 10


def test_quality_is_that_of_the_jpeg() -> None:
    stored = {"bytes": encode(picture(1, (64, 64)), "BMP"), "path": None}
    low, high = (Recoding(quality=quality).recode(stored) for quality in (30, 95))
    assert len(low.content) < len(high.content)
    assert pixel_difference(low) > pixel_difference(high)


def test_the_pixel_difference_is_that_of_what_evaluation_sees() -> None:
    def gray(value: int) -> bytes:
        return encode(Image.new("RGB", (300, 300), (value, value, value)))

    recoded = Recoding(short_side=400).recode({"bytes": gray(100), "path": None})
    assert pixel_difference(recoded) == (0, 0)
    other = type(recoded)(gray(103), 0, recoded.image, kept=False, resized=False)
    assert pixel_difference(other) == (3, 9)


def test_an_image_of_a_folder_is_read_from_there(tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    file.write_bytes(encode(picture(1)))
    recoded = Recoding().recode({"bytes": None, "path": str(file)})
    assert recoded.content == file.read_bytes()
