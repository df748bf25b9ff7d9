"""One image made small for good: resized and stored anew as JPEG, or kept; and what that does to its pixels."""

import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, features
from PIL import __version__ as pillow

from training.images import central_crop, decode_rgb, to_pixels


# Colours at full resolution: on 250 images of ImageNet at quality 90, 35.2 dB at 0.34 of the bytes, where halved ones
# (4:2:0) give 33.5 dB at 0.27. The latter is dominated by full resolution at quality 85 (34.0 dB at 0.27).
CHROMA = "4:4:4"
# Decoded by everything, and free of loss or made with it once already
KEPT_FORMATS = ("JPEG", "PNG")
COMPARED_PIXELS = 224


@dataclass(frozen=True)
class Recoded:
    """What became of an image.

    Attributes:
        content: the file to store.
        bytes_before: of the file that was stored.
        image: upright RGB, as the file that was stored shows it.
        kept: whether the file is the same, byte for byte.
        resized: whether it has fewer pixels.
    """

    content: bytes
    bytes_before: int
    image: Image.Image
    kept: bool
    resized: bool


@dataclass(frozen=True)
class Recoding:
    """How images are made small.

    An image whose shorter side is not larger than `short_side` keeps its pixels, and if it is an upright RGB file of
    JPEG or PNG, its bytes. Every other one becomes a JPEG; EXIF and colour profile are left out, as training does not
    look at them.

    Args:
        short_side: pixels of the shorter side of a larger image, bicubic.
        quality: of the JPEG, in [1, 100].
    """

    short_side: int = 256
    quality: int = 90

    def about(self) -> dict[str, Any]:
        """Everything that the bytes depend on but the image."""
        encoder = f"Pillow {pillow}, libjpeg-turbo {features.version_feature('libjpeg_turbo')}"
        return {"short_side": self.short_side, "quality": self.quality, "chroma": CHROMA, "encoder": encoder}

    def recode(self, stored: dict[str, Any] | None) -> Recoded:
        """Make one undecoded `datasets.Image` value small; raises what `decode_rgb` does."""
        image = decode_rgb(stored)
        assert stored is not None
        content = stored["bytes"] or Path(stored["path"]).read_bytes()
        short = min(image.size)
        larger = short > self.short_side
        if not larger and _needs_no_change(content):
            return Recoded(content, len(content), image, kept=True, resized=False)
        size = [round(side * self.short_side / short) if larger else side for side in image.size]
        buffer = io.BytesIO()
        small = image.resize((size[0], size[1]), Image.Resampling.BICUBIC) if larger else image
        small.save(buffer, "JPEG", quality=self.quality, subsampling=CHROMA)
        return Recoded(buffer.getvalue(), len(content), image, kept=False, resized=larger)


def _needs_no_change(content: bytes) -> bool:
    """Whether any decoder gives the pixels that `decode_rgb` gives."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # EXIF oddities are no news
        with Image.open(io.BytesIO(content)) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
            moving = getattr(image, "is_animated", False)
            return image.format in KEPT_FORMATS and image.mode == "RGB" and not turned and not moving


def pixel_difference(recoded: Recoded) -> tuple[float, float]:
    """Mean absolute and mean squared difference of what evaluation sees of an image before and after, of 255."""
    transform, rng = central_crop((COMPARED_PIXELS, COMPARED_PIXELS)), np.random.default_rng(0)
    after = decode_rgb({"bytes": recoded.content})
    crops = [to_pixels(transform(image, rng)).astype(np.float64) for image in (recoded.image, after)]
    difference = crops[0] - crops[1]
    return float(np.abs(difference).mean()), float((difference**2).mean())
