"""Pixels of the JPEGs that workers leave encoded, decoded and cropped by the GPU (`decode_on_gpu` of pre-training).

Crops differ a little from a worker's, as Pillow's filter reaches beyond the box into the rest of the image and its
result is rounded between the two directions. On the CPU, where both decode JPEGs alike, that is less than 0.2 of 255
levels in the mean and at most 20, for crops of 224 pixels of the photographs that come with scikit-image (see
tests/training/test_device_decoding.py). GPUs differ a little more, as they decode in another arithmetic.

An image whose data turn out to be broken only here is gray, and listed as broken: the rows that could stand in for it
are in the workers, and which one does must not depend on a device.
"""

import io

import torch
import torchvision.io
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from training.batch import Batch
from training.encoded import EncodedBatch
from training.images import decode_rgb, to_pixels
from training.skipped import skipped_image
from training.source import ImageSource


TOGETHER = 64  # images that are decoded at once, which bounds the memory for them
GRAY = 128.0


def check_decoder(device: torch.device) -> None:
    """Raise a ValueError that names the setting if a device does not decode JPEGs."""
    remedy = "leave it out, and workers decode (num_workers)."
    if device.type != "cuda":
        raise ValueError(f"decode_on_gpu=True needs a CUDA GPU, and the device is {device.type!r}: {remedy}")
    file = io.BytesIO()
    Image.new("RGB", (32, 32)).save(file, "JPEG")
    try:
        torchvision.io.decode_jpeg([torch.frombuffer(file.getbuffer(), dtype=torch.uint8)], "RGB", device)
    except (RuntimeError, AttributeError) as error:  # later versions of torchvision will have no decoders
        raise ValueError(f"decode_on_gpu=True, but torchvision decodes no JPEG here ({error}): {remedy}") from error


def decode_on_device(batch: Batch, size: tuple[int, int], device: torch.device, source: ImageSource) -> Batch:
    """A batch of `EncodedBatches` with the pixels of all its images, on the device.

    Args:
        batch: a process's part of a global batch.
        size: (height, width) of the crops.
        device: that decodes.
        source: of the images.
    """
    assert isinstance(batch, EncodedBatch)
    pixels = torch.empty(len(batch.sizes), *size, 3, dtype=torch.uint8, device=device)
    pixels[batch.sizes == 0] = batch.pixels.to(device, non_blocking=True)
    contents, broken = batch.content.split(batch.sizes.tolist()), list(batch.broken)
    left = batch.sizes.nonzero().flatten()
    for first in range(0, len(left), TOGETHER):
        places = left[first : first + TOGETHER]
        images = decode_jpegs([contents[place] for place in places.tolist()], device)
        for place, image in zip(places.tolist(), images, strict=True):
            if isinstance(image, Exception):
                index = int(batch.index[place])
                row = source.rows[index] if source.random_access else {source.image_column: None}
                broken.append(skipped_image(source, index, row, image))
        boxes = batch.boxes[places].tolist()
        crops = torch.stack([resized(image, box, size, device) for image, box in zip(images, boxes, strict=True)])
        crops = torch.where(batch.flips[places, None, None, None].to(device), crops.flip(3), crops)
        pixels[places] = crops.round().clamp(0, 255).byte().permute(0, 2, 3, 1)
    return Batch(pixels, batch.labels, batch.index, broken)


def decode_jpegs(contents: list[Tensor], device: torch.device) -> list[Tensor | Exception]:
    """(3, H, W) uint8 of each JPEG on the device, or why it cannot be decoded."""
    if device.type == "cuda":
        # torchvision decodes on a stream of its own, into memory that work queued on ours may still have to read
        # (github.com/pytorch/vision/pull/9606).
        torch.cuda.synchronize(device)
    try:
        decoded: list[Tensor | Exception] = torchvision.io.decode_jpeg(contents, "RGB", device)
        return decoded
    except RuntimeError:  # which does not tell which one it is
        if len(contents) > 1:
            return [decode_jpegs([content], device)[0] for content in contents]
    try:
        pixels = to_pixels(decode_rgb({"bytes": contents[0].numpy().tobytes()}))  # as a worker would
    except Exception as error:  # Pillow's plugins raise nearly anything
        return [error]
    return [torch.from_numpy(pixels).permute(2, 0, 1).to(device)]


def resized(image: Tensor | Exception, box: list[int], size: tuple[int, int], device: torch.device) -> Tensor:
    """(3, H, W) float32 of what is in the box (left, top, right, bottom), with what the bicubic filter overshoots."""
    if isinstance(image, Exception):
        return torch.full((3, *size), GRAY, device=device)
    left, top, right, bottom = box
    part = image[None, :, top:bottom, left:right].float()
    return interpolate(part, size, mode="bicubic", antialias=True)[0]
