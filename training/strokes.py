"""Drawn digits, on which MiCL fails, and variants of them that each remove one possible reason."""

from pathlib import Path
from typing import Any

import datasets
import matplotlib
import numpy as np
import skimage.data
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from training.disk import made_once
from training.images import Pixels, to_pixels
from training.photos import PHOTOS


# What a digit is drawn on: nothing, as in MNIST; one colour for each image; a piece of a photograph. Of "blank" images
# even the digit is missing: all are the same, so that nothing but the places of the patches tells two of them apart.
DRAWN = ("strokes", "strokes-on-colours", "strokes-on-photos", "blank")
SPLITS = {"train": 20_000, "validation": 2_500, "test": 2_500}
PIXELS = 32
FONTS = {  # the test split has fonts of its own
    "train": ["DejaVuSans", "DejaVuSans-Oblique", "DejaVuSerif", "DejaVuSansMono", "cmr10", "cmss10", "STIXGeneral"],
    "test": ["DejaVuSerif-Italic", "cmtt10", "cmti10", "STIXGeneralItalic"],
}
SEED = 0


def drawn_digits(kind: str) -> Path:
    """Folder with digits in the fonts of matplotlib, turned, scaled and shifted, as Parquet; made on first use.

    Args:
        kind: one of `DRAWN`.
    """

    def write(folder: Path) -> None:
        for split, length in SPLITS.items():
            _write_split(kind, split, length, folder)

    return made_once(Path(datasets.config.HF_DATASETS_CACHE) / f"micl-{kind}-v1", write)


def _write_split(kind: str, split: str, length: int, folder: Path) -> None:
    rng = np.random.default_rng((SEED, list(SPLITS).index(split)))
    fonts = [_font(name) for name in FONTS["test" if split == "test" else "train"]]
    files = [Path(skimage.data.__file__).parent / file for file in PHOTOS.values()]
    photos = [to_pixels(Image.open(file).convert("RGB")) for file in files] if kind == "strokes-on-photos" else []
    labels = rng.permutation(np.arange(length) % 10)
    images = [Image.fromarray(_draw(kind, int(label), fonts, photos, rng)) for label in labels]
    names = [str(digit) for digit in range(10)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    rows = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
    rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")


def _font(name: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"), size=2 * PIXELS)


def _draw(
    kind: str, label: int, fonts: list[ImageFont.FreeTypeFont], photos: list[Pixels], rng: np.random.Generator
) -> Pixels:
    """A digit, (32, 32, 3)."""
    if kind == "blank":
        return np.full((PIXELS, PIXELS, 3), 128, dtype=np.uint8)
    canvas = Image.new("L", (4 * PIXELS, 4 * PIXELS))
    font, centre = fonts[rng.integers(len(fonts))], (2 * PIXELS, 2 * PIXELS)
    ImageDraw.Draw(canvas).text(centre, str(label), fill=255, font=font, anchor="mm")
    side = 2.4 * PIXELS * rng.uniform(0.8, 1.2)
    left, top = (2 * PIXELS - side / 2 + rng.uniform(-0.15, 0.15, 2) * PIXELS).tolist()
    turned = canvas.rotate(rng.uniform(-20, 20), Image.Resampling.BICUBIC)
    ink = turned.resize((PIXELS, PIXELS), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    share = np.asarray(ink, dtype=np.float32)[..., None] / 255
    drawn: Pixels = np.rint((1 - share) * _ground(kind, photos, rng) + share * 255).astype(np.uint8)
    return drawn


def _ground(kind: str, photos: list[Pixels], rng: np.random.Generator) -> NDArray[Any]:
    """What is behind a digit, dark enough for it to be seen."""
    if kind == "strokes":
        return np.zeros(3, dtype=np.float32)
    if kind == "strokes-on-colours":
        return rng.uniform(0, 160, 3)
    photo = photos[rng.integers(len(photos))]
    top, left = (int(rng.integers(length - 2 * PIXELS + 1)) for length in photo.shape[:2])
    piece: NDArray[Any] = 0.6 * photo[top : top + 2 * PIXELS : 2, left : left + 2 * PIXELS : 2]
    return piece
