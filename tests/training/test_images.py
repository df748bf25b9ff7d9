"""Stored bytes to pixels, and the crops of training and evaluation."""

import io
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from modeling_micl import MiclConfig
from training.images import CropAndFlip, central_crop, decode_rgb, random_crop_box, to_pixels
from training.results import image_processor


def decoded(image: Image.Image, kind: str = "PNG", **options: object) -> NDArray[np.uint8]:
    """What becomes of an image that is stored in this format."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    rgb = decode_rgb({"bytes": buffer.getvalue(), "path": None})
    assert rgb.mode == "RGB"
    return to_pixels(rgb)


def ramp(mode: str = "L") -> Image.Image:
    """Gray 0 to 255 in 16 × 16 pixels."""
    return Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert(mode)


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """As smooth as a photograph."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


GRAY_16 = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)


def test_an_rgb_png_keeps_its_pixels() -> None:
    np.testing.assert_array_equal(decoded(photo(9, 5)), np.asarray(photo(9, 5)))


@pytest.mark.parametrize("mode", ["L", "LA", "P"])
def test_gray_becomes_three_equal_channels(mode: str) -> None:
    pixels = decoded(ramp(mode))
    np.testing.assert_array_equal(pixels, np.asarray(ramp())[..., None].repeat(3, axis=2))


def test_one_bit_becomes_black_and_white() -> None:
    pixels = decoded(ramp().point(lambda value: 255 * (value > 99), mode="1"))
    np.testing.assert_array_equal(pixels[..., 1], 255 * (np.asarray(ramp()) > 99))


def test_a_palette_is_looked_up_and_its_transparency_dropped() -> None:
    image = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 250, 0, 0, 0, 0, 250])
    for options in ({}, {"transparency": 1}, {"transparency": bytes([255, 0, 128])}):
        np.testing.assert_array_equal(decoded(image, **options), [[[10, 20, 30], [250, 0, 0], [0, 0, 250]]])


def test_alpha_is_dropped() -> None:
    rgba = photo(8, 8).convert("RGBA")
    rgba.putalpha(ramp().resize((8, 8)))
    np.testing.assert_array_equal(decoded(rgba), np.asarray(photo(8, 8)))


def test_cmyk_jpeg_has_its_colours() -> None:
    pixels = decoded(photo(64, 64).convert("CMYK"), "JPEG", quality=95)
    assert np.abs(pixels.astype(int) - np.asarray(photo(64, 64))).mean() < 4


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_gray_keeps_its_range(kind: str) -> None:
    np.testing.assert_array_equal(decoded(Image.fromarray(GRAY_16), kind), [[[0] * 3, [1] * 3, [128] * 3, [255] * 3]])


def test_big_endian_16_bit_gray_keeps_its_range() -> None:
    image = Image.frombytes("I;16B", (4, 1), GRAY_16.astype(">u2").tobytes())
    np.testing.assert_array_equal(decoded(image, "TIFF")[..., 0], [[0, 1, 128, 255]])


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° clockwise to see it upright
    pixels = decoded(photo(128, 64), "JPEG", quality=95, exif=exif)
    assert pixels.shape == (128, 64, 3)
    assert np.abs(pixels.astype(int) - np.rot90(np.asarray(photo(128, 64)), -1)).mean() < 4


@pytest.mark.parametrize(("kind", "options"), [("JPEG", {"quality": 95}), ("PNG", {}), ("WEBP", {"lossless": True})])
def test_an_upright_rgb_image_is_not_copied(
    kind: str, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of every image would take a tenth of the time of decoding it."""
    buffer = io.BytesIO()
    photo(40, 30).save(buffer, kind, **options)
    expected = np.asarray(Image.open(buffer).convert("RGB"))
    monkeypatch.delattr(Image.Image, "copy")
    np.testing.assert_array_equal(to_pixels(decode_rgb({"bytes": buffer.getvalue()})), expected)


def test_the_first_frame_of_an_animation_counts() -> None:
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    pixels = decoded(first, "GIF", save_all=True, append_images=[second])
    assert (pixels == [255, 0, 0]).all()


def test_a_path_serves_as_well_as_bytes(tmp_path: Path) -> None:
    photo(9, 5).save(tmp_path / "photo.png")
    for stored in ({"path": str(tmp_path / "photo.png"), "bytes": None}, {"path": str(tmp_path / "photo.png")}):
        np.testing.assert_array_equal(to_pixels(decode_rgb(stored)), np.asarray(photo(9, 5)))


@pytest.mark.parametrize("stored", [None, {}, {"bytes": None, "path": None}, {"bytes": b"", "path": None}])
def test_a_row_without_an_image_is_an_error(stored: dict[str, None] | None) -> None:
    with pytest.raises(ValueError, match="holds no image"):
        decode_rgb(stored)


def test_bytes_that_are_no_image_are_an_error() -> None:
    with pytest.raises(ValueError, match="not in any known image format"):
        decode_rgb({"bytes": b"this is no image", "path": "text.txt"})
    with pytest.raises(FileNotFoundError):
        decode_rgb({"bytes": None, "path": "nowhere.png"})


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_truncated_file_is_an_error_rather_than_half_gray(kind: str) -> None:
    buffer = io.BytesIO()
    photo(128, 128).save(buffer, kind)
    with pytest.raises(OSError, match=r"truncated|incomplete|Truncated"):
        decode_rgb({"bytes": buffer.getvalue()[: len(buffer.getvalue()) // 2], "path": None})


def test_values_without_a_defined_range_are_an_error() -> None:
    with pytest.raises(ValueError, match="floating-point"):
        decoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF")
    for value in (-1, 65536):
        with pytest.raises(ValueError, match="16 bits"):
            decoded(Image.fromarray(np.full((4, 4), value, np.int32)), "TIFF")


def test_random_boxes_lie_inside_and_cover_what_they_should() -> None:
    for width, height in ((40, 30), (30, 40), (300, 300), (64, 80)):
        rng = np.random.default_rng(0)
        for _ in range(500):
            left, top, right, bottom = random_crop_box(width, height, 0.2, rng)
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height
            rounding = 1 / min(right - left, bottom - top)
            assert 0.2 - rounding <= (right - left) * (bottom - top) / (width * height) <= 1
            assert 3 / 4 * (1 - 2 * rounding) <= (right - left) / (bottom - top) <= 4 / 3 * (1 + 2 * rounding)


@pytest.mark.parametrize("size", [(300, 200), (224, 224), (120, 400)])
@pytest.mark.parametrize("min_scale", [0.2, 0.6])
def test_random_boxes_are_distributed_as_torchvisions(size: tuple[int, int], min_scale: float) -> None:
    width, height = size
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    image = Image.new("L", size)

    def reference() -> tuple[int, int, int, int]:
        top, left, box_height, box_width = RandomResizedCrop.get_params(image, [min_scale, 1.0], [3 / 4, 4 / 3])
        return left, top, left + box_width, top + box_height

    def facts(boxes: list[tuple[int, int, int, int]]) -> NDArray[np.float64]:
        left, top, right, bottom = np.array(boxes, dtype=np.float64).T
        area, aspect = (right - left) * (bottom - top) / (width * height), np.log((right - left) / (bottom - top))
        centre = (left + right) / 2 / width, (top + bottom) / 2 / height
        # Deciles as well as means and spreads, so that the shapes agree too.
        return np.array([[*np.quantile(x, np.arange(1, 10) / 10), x.mean(), x.std()] for x in (area, aspect, *centre)])

    ours = facts([random_crop_box(width, height, min_scale, rng) for _ in range(4000)])
    assert np.abs(ours - facts([reference() for _ in range(4000)])).max() < 0.035


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((1000, 10), (493, 0, 506, 10)),  # aspect 4/3
        ((10, 1000), (0, 493, 10, 506)),  # aspect 3/4
        ((1, 1), (0, 0, 1, 1)),
        ((1, 50), (0, 24, 1, 25)),
    ],
)
def test_where_no_box_fits_the_central_one_is_taken(size: tuple[int, int], box: tuple[int, int, int, int]) -> None:
    assert {random_crop_box(*size, 0.9, np.random.default_rng(seed)) for seed in range(20)} == {box}


def test_without_cropping_the_whole_image_is_resized() -> None:
    transform = CropAndFlip((24, 32), min_scale=1, horizontal_flip=False)
    result = transform(photo(90, 50), np.random.default_rng(0))
    np.testing.assert_array_equal(result, photo(90, 50).resize((32, 24), Image.Resampling.BICUBIC))


def test_a_crop_is_the_box_of_the_image_resized_bicubic() -> None:
    transform = CropAndFlip((24, 32), min_scale=0.2, horizontal_flip=False)
    result = transform(photo(90, 50), np.random.default_rng(5))
    box = random_crop_box(90, 50, 0.2, np.random.default_rng(5))
    expected = photo(90, 50).crop(box).resize((32, 24), Image.Resampling.BICUBIC)
    np.testing.assert_allclose(np.asarray(result, float), np.asarray(expected, float), rtol=0, atol=1)  # rounding
    assert np.asarray(result).shape == (24, 32, 3)


@pytest.mark.parametrize("flip", [True, False])
def test_every_other_crop_is_mirrored(flip: bool) -> None:
    transform = CropAndFlip((16, 16), min_scale=1, horizontal_flip=flip)
    plain = np.asarray(photo(16, 16))
    seen = Counter()
    for seed in range(400):
        result = np.asarray(transform(photo(16, 16), np.random.default_rng(seed)))
        assert (result == plain).all() or (result == plain[:, ::-1]).all()
        seen[bool((result == plain).all())] += 1
    assert seen[True] == 400 if not flip else 160 < seen[True] < 240


def test_a_crop_depends_on_its_generator_only() -> None:
    transform = CropAndFlip((16, 16), min_scale=0.2, horizontal_flip=True)
    results = [np.asarray(transform(photo(60, 50), np.random.default_rng(seed))) for seed in (1, 2, 1)]
    np.testing.assert_array_equal(results[0], results[2])
    assert (results[0] != results[1]).any()


@pytest.mark.parametrize(
    ("model_size", "image_size"),
    [
        *((32, size) for size in ((32, 32), (64, 64), (500, 500), (20, 20))),
        *((224, size) for size in ((256, 256), (300, 200), (200, 300), (500, 333), (100, 100))),
        *((96, size) for size in ((300, 200), (200, 300))),
        (224, (224, 224)),
        *((32, size) for size in ((300, 200), (200, 300))),
        *(((96, 128), size) for size in ((400, 200), (200, 400))),
    ],
)
def test_the_saved_image_processor_sees_what_was_evaluated(
    model_size: int | tuple[int, int], image_size: tuple[int, int]
) -> None:
    height, width = (model_size, model_size) if isinstance(model_size, int) else model_size
    ours = central_crop((height, width))(photo(*image_size), np.random.default_rng(0))
    processor = image_processor(MiclConfig(image_size=(height, width), patch_size=8, mask_ratio=0.5))
    theirs = processor(photo(*image_size), do_normalize=False, do_rescale=False, return_tensors="np")["pixel_values"]
    assert theirs.shape == (1, 3, height, width)
    assert np.abs(theirs[0].transpose(1, 2, 0).astype(float) - np.asarray(ours)).mean() < 2


@pytest.mark.parametrize("size", [(32, 32), (96, 96)])
def test_the_central_crop_keeps_the_aspect_and_the_centre(size: tuple[int, int]) -> None:
    """Horizontal and vertical positions are the colours of the image, so the crop tells what it shows."""
    across, down = np.meshgrid(np.linspace(0, 255, 200), np.linspace(0, 255, 120))
    position = Image.fromarray(np.stack([across, down, 0 * down], axis=2).astype(np.uint8))
    pixels = to_pixels(central_crop(size)(position, np.random.default_rng(0))).astype(float)
    height, width = size
    assert pixels.shape == (height, width, 3)
    assert np.abs(pixels[..., :2].mean(axis=(0, 1)) - 127.5).max() < 2
    shown = np.array([200, 120]) * [np.ptp(pixels[..., channel]) / 255 for channel in (0, 1)]  # pixels, (across, down)
    assert math.isclose(shown[0] / shown[1], width / height, rel_tol=0.06)
    share = 7 / 8 if min(size) > 64 else 1
    assert math.isclose(max(shown / [200, 120]), share, rel_tol=0.06)
