"""Stored images to RGB pixels: decoding, the random crop of pre-training and the central one of evaluation."""

import io
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError


# Pillow needs four bytes for each pixel, so that the largest image takes half a gibibyte of a worker's memory.
MAX_PIXELS = 2**27
TOO_LARGE = f"the image has more than {MAX_PIXELS:,} pixels"

Pixels = NDArray[np.uint8]
Box = tuple[int, int, int, int]  # left, top, right, bottom
Transform = Callable[[Image.Image, np.random.Generator], Image.Image]


def decode_rgb(stored: dict[str, Any] | None) -> Image.Image:
    """Decode one undecoded `datasets.Image` value into upright 8-bit RGB.

    The first frame of an animation counts; transparency is dropped, as image processors do at inference; 16 bits are
    scaled to 8. Nothing is decoded of an image that has more than `MAX_PIXELS`. JPEGs are decoded in full: to do it at
    half size (Pillow's draft mode) changes pixels, and of the crops of ImageNet's files 3 % are large enough for it.

    Raises:
        Exception: whatever the file's defect makes Pillow raise; `ValueError` if there is nothing to decode.
    """
    content, path = (stored or {}).get("bytes"), (stored or {}).get("path")
    if not content and (content is not None or not path):
        raise ValueError("the row holds no image")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # EXIF oddities are no news
        try:
            with Image.open(io.BytesIO(content) if content else str(path)) as image:
                return _upright_rgb(image)
        except UnidentifiedImageError:
            raise ValueError("not in any known image format") from None
        except Image.DecompressionBombError:  # Pillow's own limit is higher
            raise ValueError(TOO_LARGE) from None


def _upright_rgb(image: Image.Image) -> Image.Image:
    """Pixels of an image of which only the header has been read."""
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(TOO_LARGE)
    if image.format == "EPS":
        raise ValueError("PostScript is a program, which is not run")
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):
        # Pillow would clip 16-bit gray at 255 and turn it white.
        values = np.asarray(image).astype(np.int32)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("gray values do not fit in 16 bits")
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))  # 65535 = 255 × 257
    elif image.mode == "F":
        raise ValueError("floating-point images have no defined range")
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy


@dataclass(frozen=True)
class CropAndFlip:
    """The pre-training transform of the released program: RandomResizedCrop, bicubic, then horizontal flip.

    Attributes:
        size: (height, width) of the result in pixels.
        min_scale: smallest share of the image's area that a crop covers; 1 takes the whole image.
        horizontal_flip: whether to mirror every other crop.
    """

    size: tuple[int, int]
    min_scale: float
    horizontal_flip: bool

    def draw(self, width: int, height: int, rng: np.random.Generator) -> tuple[Box, bool]:
        """The box to crop from an image of this size, and whether to mirror it then."""
        box = (0, 0, width, height) if self.min_scale == 1 else random_crop_box(width, height, self.min_scale, rng)
        return box, self.horizontal_flip and rng.random() < 0.5

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """The crop of an image."""
        box, flip = self.draw(*image.size, rng)
        crop = image.resize((self.size[1], self.size[0]), Image.Resampling.BICUBIC, box=box)
        return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else crop


def random_crop_box(width: int, height: int, min_scale: float, rng: np.random.Generator) -> Box:
    """Box (left, top, right, bottom) of an Inception crop.

    Its share of the area is uniform in [min_scale, 1], its aspect log-uniform in [3/4, 4/3]. After ten boxes that do
    not fit it falls back to the largest central one of allowed aspect, as torchvision does.
    """
    for _ in range(10):
        area = width * height * rng.uniform(min_scale, 1)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            left, top = int(rng.integers(width - box_width + 1)), int(rng.integers(height - box_height + 1))
            return left, top, left + box_width, top + box_height
    box_width, box_height = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - box_width) // 2, (height - box_height) // 2
    return left, top, left + box_width, top + box_height


def central_crop(size: tuple[int, int]) -> Transform:
    """The evaluation transform, as `training.results.image_processor`: the largest central square, resized bicubic.

    Above 64 pixels the square is 7/8 of that, which is the usual resize to 256 and crop of 224. A result that is not
    square gets the whole image.
    """
    height, width = size

    def transform(image: Image.Image, rng: np.random.Generator) -> Image.Image:
        if height != width:
            return image.resize((width, height), Image.Resampling.BICUBIC)
        share = 224 / 256 if height > 64 else 1.0
        scale = share * min(image.width / width, image.height / height)
        left, top = (image.width - scale * width) / 2, (image.height - scale * height) / 2
        box = (left, top, left + scale * width, top + scale * height)
        return image.resize((width, height), Image.Resampling.BICUBIC, box=box)

    return transform


def to_pixels(image: Image.Image) -> Pixels:
    """(H, W, 3) uint8 array of an RGB image."""
    return np.array(image, dtype=np.uint8)
