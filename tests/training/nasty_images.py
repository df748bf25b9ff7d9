"""Images as data sets in the wild have them: each with the pixels that it must give, or why it must be left out."""

import struct
import zlib
from dataclasses import dataclass

import numpy as np
from conftest import encode, picture
from numpy.typing import NDArray
from PIL import Image

from training.images import MAX_PIXELS, TOO_LARGE


SIDE = 48
UNKNOWN = "ValueError: not in any known image format"


@dataclass(frozen=True)
class Nasty:
    """An image, or what should be one.

    Attributes:
        name: of its file.
        stored: the file's bytes, None where there is nothing.
        pixels: (H, W, 3) as they must be, None if it cannot be decoded.
        reason: how the reason why it cannot be decoded begins.
        tolerance: largest mean difference of the pixels; 0 where nothing is lost.
    """

    name: str
    stored: bytes | None
    pixels: NDArray[np.uint8] | None = None
    reason: str = ""
    tolerance: float = 0.0

    def __str__(self) -> str:
        return self.name


def photo(number: int = 0) -> Image.Image:
    return picture(number, (SIDE, SIDE - 16))


def array(image: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(image.convert("RGB"))


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(
    size: tuple[int, int], depth: int, colour: int, lines: bytes, *extra: tuple[bytes, bytes], interlaced: int = 0
) -> bytes:
    """A PNG file by hand: of any kind, and with any chunks between the header and the pixels."""
    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, interlaced)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks)


def interlaced_png(pixels: NDArray[np.uint8]) -> bytes:
    """Adam7, which Pillow reads but does not write."""
    lines = b""
    for top, left, down, across in (
        *((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4)),
        *((2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)),
    ):
        lines += b"".join(b"\0" + line.tobytes() for line in pixels[top::down, left::across])
    return png((pixels.shape[1], pixels.shape[0]), 8, 2, lines, interlaced=1)


def ycck_jpeg(image: Image.Image) -> bytes:
    """As Adobe's programs write CMYK: inverted, with the colours as brightness and two differences."""
    inverted = Image.fromarray(255 - array(image)).convert("YCbCr")
    planes = [Image.fromarray(255 - np.asarray(plane)) for plane in inverted.split()]
    file = bytearray(encode(Image.merge("CMYK", (*planes, Image.new("L", image.size))), "JPEG", quality=95))
    transform = file.index(b"Adobe") + 11
    assert file[transform] == 0
    file[transform] = 2
    return bytes(file)


def turned_jpegs() -> list[Nasty]:
    """All that the EXIF orientation can be, and more."""
    upright = array(photo())
    seen = {
        **{1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1]},
        **{5: upright.transpose(1, 0, 2), 6: np.rot90(upright, -1)},
        **{7: upright[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(upright)},
        **{0: upright, 9: upright, 65535: upright},
    }
    found = []
    for orientation, pixels in seen.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = encode(photo(), "JPEG", quality=95, exif=exif)
        found.append(Nasty(f"orientation-{orientation}.jpg", stored, pixels, tolerance=4))
    return found


def gray(*values: int) -> NDArray[np.uint8]:
    """One line of gray pixels."""
    return np.array([[[value] * 3 for value in values]], dtype=np.uint8)


def unusual() -> list[Nasty]:
    """Modes, depths and shapes beside 8-bit RGB."""
    rgba = photo()
    rgba.putalpha(picture(5, rgba.size).convert("L"))
    palette = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8)).convert("P")
    palette.putpalette([10, 20, 30, 250, 0, 0, 0, 0, 250])
    colours = np.array([[[10, 20, 30], [250, 0, 0], [0, 0, 250]]], dtype=np.uint8)
    gray_16 = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    gray_16_big = Image.frombytes("I;16B", (4, 1), gray_16.astype(">u2").tobytes())
    rgb_16 = b"\0" + struct.pack(">6H", 257, 0, 65535, 32896, 514, 771)
    gray_8 = photo().convert("L")
    tall, wide = (Image.fromarray(np.arange(20000).reshape(shape).astype(np.uint8)) for shape in ((-1, 1), (1, -1)))
    return [
        Nasty("gray.png", encode(gray_8), array(gray_8)),
        Nasty("gray-alpha.png", encode(gray_8.convert("LA")), array(gray_8)),
        Nasty("one-bit.png", encode(photo().convert("1")), array(photo().convert("1"))),
        Nasty("two-bit.png", png((4, 1), 2, 0, b"\0\x1b"), gray(0, 85, 170, 255)),
        Nasty("palette.gif", encode(palette, "GIF"), colours),
        Nasty("palette-transparent.png", encode(palette, transparency=bytes([255, 0, 128])), colours),
        Nasty("rgba.png", encode(rgba), array(photo())),
        Nasty("gray-16.png", encode(Image.fromarray(gray_16)), gray(0, 1, 128, 255)),
        Nasty("gray-16.tif", encode(Image.fromarray(gray_16), "TIFF"), gray(0, 1, 128, 255)),
        Nasty("gray-16-big-endian.tif", encode(gray_16_big, "TIFF"), gray(0, 1, 128, 255)),
        Nasty("gray-16.pgm", b"P5 4 1 65535\n" + gray_16.astype(">u2").tobytes(), gray(0, 1, 128, 255)),
        Nasty("gray-16-alpha.png", png((2, 1), 16, 4, b"\0" + struct.pack(">4H", 257, 9, 65535, 9)), gray(1, 255)),
        Nasty("rgb-16.png", png((2, 1), 16, 2, rgb_16), np.array([[[1, 0, 255], [128, 2, 3]]], dtype=np.uint8)),
        Nasty("cmyk.jpg", encode(photo().convert("CMYK"), "JPEG", quality=95), array(photo()), tolerance=4),
        Nasty("ycck.jpg", ycck_jpeg(photo()), array(photo()), tolerance=4),
        Nasty("progressive.jpg", encode(photo(), "JPEG", quality=95, progressive=True), array(photo()), tolerance=4),
        Nasty("interlaced.png", interlaced_png(array(photo())), array(photo())),
        Nasty("one-pixel.png", encode(picture(9, (1, 1))), array(picture(9, (1, 1)))),
        Nasty("tall.png", encode(tall), array(tall)),
        Nasty("wide.png", encode(wide), array(wide)),
    ]


def animated() -> list[Nasty]:
    """The first frame counts."""
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    kinds = {"gif": ("GIF", {}), "webp": ("WEBP", {"lossless": True}), "png": ("PNG", {}), "tif": ("TIFF", {})}
    return [
        Nasty(f"animated.{end}", encode(red, kind, save_all=True, append_images=[blue], **options), array(red))
        for end, (kind, options) in kinds.items()
    ]


def harmless() -> list[Nasty]:
    """Defects that leave the pixels whole."""
    jpeg, file = encode(photo(), "JPEG", quality=95), encode(photo())
    checksum = file.index(b"IEND") - 8
    wrong = file[:checksum] + bytes([file[checksum] ^ 255]) + file[checksum + 1 :]
    exif = b"Exif\0\0garbage"
    return [
        Nasty("a-png-named.jpg", file, array(photo())),
        Nasty("a-jpeg-named.png", jpeg, array(photo()), tolerance=4),
        Nasty("twin-1.png", encode(photo(3)), array(photo(3))),
        Nasty("twin-2.png", encode(photo(3)), array(photo(3))),
        Nasty("more-behind.jpg", jpeg + b"garbage" * 1000, array(photo()), tolerance=4),
        Nasty("no-end.png", file[:-12], array(photo())),
        Nasty("checksum-of-pixels.png", wrong, array(photo())),
        Nasty("profile.jpg", encode(photo(), "JPEG", quality=95, icc_profile=b"x"), array(photo()), tolerance=4),
        Nasty("exif.jpg", encode(photo(), "JPEG", quality=95, exif=exif), array(photo()), tolerance=4),
    ]


def header_of(width: int, height: int) -> bytes:
    """A PNG that says to be so large, without the pixels."""
    return png((width, height), 8, 2, b"\0")


def broken() -> list[Nasty]:
    """What gives no pixels, and why."""
    jpeg, file, webp = encode(photo(), "JPEG"), encode(photo()), encode(photo(), "WEBP")
    progressive = encode(photo(), "JPEG", progressive=True)
    middle = file.index(b"IDAT") + 40
    bomb = (b"zTXt", b"key\0\0" + zlib.compress(bytes(2**24)))
    small = ((1, 1), 8, 2, b"\0abc")
    floats = encode(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF")
    negative = encode(Image.fromarray(np.full((4, 4), -1, np.int32)), "TIFF")
    large = MAX_PIXELS // 8192 + 1
    return [
        Nasty("null.png", None, reason="ValueError: the row holds no image"),
        Nasty("nothing.jpg", b"", reason="ValueError: the row holds no image"),
        Nasty("cut.jpg", jpeg[:-50], reason="OSError: image file is truncated"),
        Nasty("cut-progressive.jpg", progressive[:-50], reason="OSError: image file is truncated"),
        Nasty("cut.png", file[: len(file) // 2], reason="OSError: image file is truncated"),
        Nasty("cut.webp", webp[: len(webp) // 2], reason="OSError: could not create decoder object"),
        Nasty("cut-header.jpg", jpeg[:3], reason=UNKNOWN),
        Nasty("few-lines.png", png((4, 4), 8, 2, b"\0abc"), reason="OSError: image file is truncated"),
        Nasty("garbage.jpg", np.random.default_rng(0).bytes(5000), reason=UNKNOWN),
        Nasty("zeros.png", bytes(5000), reason=UNKNOWN),
        Nasty("text.jpg", b"404: there is no such picture", reason=UNKNOWN),
        Nasty("page.jpg", b"<!DOCTYPE html><html><body>Forbidden</body></html>", reason=UNKNOWN),
        Nasty("drawing.png", b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', reason=UNKNOWN),
        Nasty("paper.jpg", encode(photo(), "PDF"), reason=UNKNOWN),
        Nasty("postscript.jpg", encode(photo(), "EPS"), reason="ValueError: PostScript is a program"),
        Nasty("no-width.png", header_of(0, 5), reason=UNKNOWN),
        Nasty("no-height.png", header_of(5, 0), reason=UNKNOWN),
        Nasty("checksum-of-header.png", file[:29] + bytes([file[29] ^ 255]) + file[30:], reason=UNKNOWN),
        Nasty("damaged.png", file[:middle] + bytes(40) + file[middle + 40 :], reason="OSError: "),
        Nasty("exif.png", png(*small, (b"eXIf", b"garbage!")), reason="SyntaxError: not a TIFF file"),
        Nasty("bomb.png", header_of(60000, 60000), reason=f"ValueError: {TOO_LARGE}"),
        Nasty("small-bomb.png", header_of(8192, large), reason=f"ValueError: {TOO_LARGE}"),
        Nasty("text-bomb.png", png(*small, bomb), reason="ValueError: Decompressed data too large"),
        Nasty("floats.tif", floats, reason="ValueError: floating-point images have no defined range"),
        Nasty("negative.tif", negative, reason="ValueError: gray values do not fit in 16 bits"),
    ]


NASTY = [*unusual(), *animated(), *harmless(), *turned_jpegs(), *broken()]
