"""A small dataset with images and columns of several kinds, and what becomes of it when it is prepared."""

from pathlib import Path
from typing import Any

import datasets
from conftest import GARBAGE, encode, picture

from training import prepare
from training.prepare import PrepareConfig


BROKEN = {3, 17}
SOUND = [number for number in range(33) if number not in BROKEN]
LARGE, SMALL = (60, 40), (30, 20)  # around the short side of the tests, 24 pixels
MASK = encode(picture(99))


def stored(number: int) -> bytes:
    """A large JPEG, a large PNG, a small JPEG and a small PNG in turns."""
    kind, size = ("JPEG", "PNG")[number % 2], (LARGE, SMALL)[number // 2 % 2]
    return GARBAGE if number in BROKEN else encode(picture(number, size), kind)


def write_split(folder: Path, split: str = "train", lengths: tuple[int, ...] = (20, 13), first: int = 0) -> None:
    features = {
        "caption": datasets.Value("string"),
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=["cat", "dog", "cow"]),
        "boxes": datasets.List(datasets.List(datasets.Value("float32"), length=4)),
        "views": datasets.List(datasets.Image()),
    }
    for shard, length in enumerate(lengths):
        numbers = range(first, first + length)
        columns = {
            "caption": [f"picture {number}" if number % 5 else None for number in numbers],
            "image": [{"bytes": stored(number), "path": f"picture-{number}.img"} for number in numbers],
            "label": [number % 3 if number != 5 else None for number in numbers],
            "boxes": [[[number, 0.5, 1, 2]] * (number % 3) for number in numbers],
            "views": [[{"bytes": MASK, "path": None}]] * length,
        }
        file = folder / "data" / f"{split}-{shard:05d}-of-{len(lengths):05d}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(file)
        first += length


def settings(folder: Path, **overrides: Any) -> PrepareConfig:
    where = {"dataset": str(folder / "source"), "output_dir": str(folder / "out")}
    config = PrepareConfig(**(where | {"short_side": 24, "num_shards": 4, "num_workers": 0} | overrides))
    config.validate()
    return config


def run(folder: Path, **overrides: Any) -> Path:
    """Run the program in this process; keywords replace single settings. Returns the prepared dataset."""
    config = settings(folder, **overrides)
    prepare.main(config)
    return Path(str(config.output_dir))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def shard_names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "data").iterdir())


def undecoded(folder: Path, split: str = "train") -> datasets.Dataset:
    """The prepared rows as anybody gets them, with the images' files."""
    return datasets.load_dataset(str(folder), split=split).cast_column("image", datasets.Image(decode=False))
