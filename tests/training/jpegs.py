"""JPEGs and other files that the tests of `decode_on_gpu` mix in one split."""

from pathlib import Path

import datasets
from conftest import encode, picture
from PIL import Image

from training.source import ImageSource, open_source


SIDES = (60, 44)


def jpeg(number: int, mode: str = "RGB", **options: object) -> bytes:
    return encode(picture(number, SIDES).convert(mode), "JPEG", quality=95, **options)


def turned_jpeg(number: int, orientation: int = 6) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return jpeg(number, exif=exif)


def with_bad_tables(file: bytes) -> bytes:
    """A JPEG with a sound header and end that no decoder can read, as a Huffman table makes no sense."""
    counts = file.index(b"\xff\xc4") + 5
    return file[:counts] + b"\xff" * 16 + file[counts + 16 :]


def with_bad_data(file: bytes) -> bytes:
    """A JPEG with a sound header and end, and a wrong bit in the midst of its data, which decoders read over."""
    middle = (file.index(b"\xff\xda") + len(file)) // 2
    return file[:middle] + bytes([file[middle] ^ 1]) + file[middle + 1 :]


def mixed(length: int) -> list[bytes]:
    """Files of all kinds; two of nine cannot be decoded at all."""
    kinds = (
        *(jpeg, lambda number: encode(picture(number, SIDES)), jpeg, lambda number: jpeg(number, "L")),
        *(turned_jpeg, lambda number: jpeg(number)[:-40], lambda number: jpeg(number, progressive=True)),
        *(lambda number: b"this is no image", lambda number: jpeg(number, "CMYK")),
    )
    return [kinds[number % len(kinds)](number) for number in range(length)]


def write(folder: Path, files: list[bytes], streaming: bool = True) -> ImageSource:
    """One Parquet file with these images."""
    images = [{"bytes": file, "path": f"picture-{number}"} for number, file in enumerate(files)]
    labels = [number % 4 for number in range(len(files))]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    folder.mkdir(parents=True, exist_ok=True)
    rows = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
    rows.to_parquet(folder / "train-00000-of-00001.parquet")
    return open_source(str(folder), label_column="label", streaming=streaming)
