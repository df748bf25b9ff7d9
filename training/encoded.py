"""JPEGs that workers only read (`decode_on_gpu` of pre-training); `device_decoding` makes pixels of them.

A worker parses a JPEG's header and draws its crop from the same random numbers as ever. Bytes and boxes go to the main
process. Whatever decoders on GPUs lack, leave to the CPU or take in another way than Pillow, and what looks truncated,
the worker decodes as ever, with stand-ins as ever; both kinds mix in a batch.
"""

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from training.batch import Batch, stack
from training.data import TrainingBatches
from training.images import Box, CropAndFlip, to_pixels
from training.skipped import SkippedImage


MOST_PIXELS = 2**24  # of an image that the device decodes, which bounds its memory
MOST_REDUCTION = 32  # of a side on the device: CUDA holds the filter in shared memory, enough for 47


@dataclass(frozen=True)
class EncodedCrop:
    """A JPEG, what to crop from it, and whether to mirror that."""

    content: bytes
    box: Box
    flip: bool


@dataclass
class EncodedBatch(Batch):
    """A batch of n images, some of them JPEGs; `pixels` are those of the others, in their order.

    Attributes:
        content: uint8, the JPEGs, one behind the other.
        sizes: (n,) int64, bytes of each image's JPEG; 0 where it is in `pixels`.
        boxes: (n, 4) int64, left, top, right, bottom of its crop in pixels.
        flips: (n,) bool, whether the crop is mirrored.
    """

    content: Tensor
    sizes: Tensor
    boxes: Tensor
    flips: Tensor


class EncodedBatches(TrainingBatches):
    """`TrainingBatches` that leave JPEGs undecoded."""

    transform: CropAndFlip

    def read(self, stored: dict[str, Any] | None) -> Callable[[np.random.Generator], Any]:
        """Read a JPEG's bytes and header, or decode anything else."""
        if (found := plain_jpeg(stored)) is None:
            return super().read(stored)
        content, (width, height) = found
        if width * height > MOST_PIXELS or max(width, height) > MOST_REDUCTION * min(self.transform.size):
            return super().read(stored)
        return lambda rng: EncodedCrop(content, *self.transform.draw(width, height, rng))

    def stack(self, images: list[tuple[Any, int, int]], broken: list[SkippedImage]) -> EncodedBatch:
        """One batch of both kinds."""
        decoded = [
            (to_pixels(crop), label, index) for crop, label, index in images if not isinstance(crop, EncodedCrop)
        ]
        nothing = EncodedCrop(b"", (0, 0, 0, 0), flip=False)
        crops = [image if isinstance(image, EncodedCrop) else nothing for image, _, _ in images]
        content = self.memory.take(sum(len(crop.content) for crop in crops))
        np.concatenate([np.frombuffer(crop.content, np.uint8) for crop in crops], out=content.numpy())
        return EncodedBatch(
            pixels=stack(decoded, []).pixels if decoded else torch.empty(0, *self.transform.size, 3).byte(),
            labels=torch.tensor([label for _, label, _ in images]),
            index=torch.tensor([index for _, _, index in images]),
            broken=broken,
            content=content,
            sizes=torch.tensor([len(crop.content) for crop in crops]),
            boxes=torch.tensor([crop.box for crop in crops]),
            flips=torch.tensor([crop.flip for crop in crops]),
        )


def plain_jpeg(stored: dict[str, Any] | None) -> tuple[bytes, tuple[int, int]] | None:
    """Bytes and (width, height) of a `datasets.Image` value that all decoders take alike, None for any other.

    That is a whole baseline JPEG in RGB or gray that needs not be turned.
    """
    content, path = (stored or {}).get("bytes"), (stored or {}).get("path")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # EXIF oddities are no news
        try:
            content = Path(str(path)).read_bytes() if content is None else content
            with Image.open(io.BytesIO(content), formats=["JPEG"]) as image:
                plain = image.format == "JPEG" and image.mode in ("RGB", "L")
                plain &= "progressive" not in image.info  # left to the CPU by decoders on GPUs
                plain &= image.info.get("adobe_transform", 1) == 1  # 0: not stored as YCbCr, which not all of them see
                plain &= image.getexif().get(ExifTags.Base.Orientation, 1) == 1
                plain &= content.rstrip(b"\0").endswith(b"\xff\xd9")  # the end-of-image marker
                return (content, image.size) if plain else None
        except Exception:  # Pillow's plugins raise nearly anything; decoding it in the worker tells what is wrong
            return None
