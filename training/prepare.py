"""A dataset made small once, for a faster input pipeline and less disk: images resized, in Parquet shards.

`python -m training.prepare --dataset ILSVRC/imagenet-1k --split train validation --output_dir data/imagenet-256`

The same command again goes on after an interruption with the shards that are missing. The folder is a dataset for
`--dataset`, for `datasets.load_dataset` and for `hf upload`.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from training.config import DataSettings, setting
from training.monitor import usable_cores
from training.parser import parse_settings
from training.parts import About
from training.prepared_card import SKIPPED, Record, describe, difference_in_words, read_record
from training.recoding import Recoding
from training.shards import about_split, edges_of_shards, missing_shards, prepare_split, usual_number_of_shards
from training.source import ImageSource, open_split


CORES = usable_cores()
SPLIT = re.compile(r"\w+(\.\w+)*")  # what the layout of the Hub can tell in a file's name


@dataclass
class PrepareConfig(DataSettings):
    """Which splits, how small, and in how many files."""

    split: list[str] = setting(["train"], "splits to prepare, one or several")  # type: ignore[assignment]
    eval_split: str | None = setting(None, "not for this program: name all splits with --split")
    output_dir: str | None = setting(None, "folder for the prepared dataset")
    short_side: int = setting(256, "pixels of the shorter side of an image that is larger; smaller ones stay")
    quality: int = setting(90, "of the JPEGs, from 1 to 100; with colours at full resolution (4:4:4)")
    num_shards: int | None = setting(
        None, "files of each split; unset, a multiple of 64 with about 4,096 images in each, or fewer with 512"
    )
    num_workers: int = setting(CORES, "processes that decode and encode; 0 does it in the program itself")

    def validate(self) -> None:
        """Raise a ValueError that names the first impossible setting, its value and the remedy."""
        super().validate()
        self._validate_at_least(1, "short_side", "quality", "num_shards")
        if self.quality > 100:
            raise ValueError(f"quality must be at most 100, got {self.quality}.")
        if self.eval_split is not None:
            raise ValueError(f"eval_split={self.eval_split!r} is not for this program: name it with --split, too.")
        for split in self.split:
            if not SPLIT.fullmatch(split):
                raise ValueError(f"split={split!r} is no name of a whole split: use --max_images for a part of one.")
        if not self.split or len(set(self.split)) < len(self.split):
            raise ValueError(f"split takes one name or several different ones, got {self.split}.")
        self._validate_output_dir()

    def _validate_output_dir(self) -> None:
        if self.output_dir is None:
            raise ValueError("output_dir is not set: name the folder for the prepared dataset with --output_dir.")
        folder, source = Path(self.output_dir).resolve(), Path(self.dataset).expanduser().resolve()
        if folder.is_file():
            raise ValueError(f"output_dir={self.output_dir!r} is a file: name a folder.")
        if source.exists() and folder.is_relative_to(source):
            raise ValueError(
                f"output_dir={self.output_dir!r} lies in dataset={self.dataset!r} and would become a part of it: "
                "choose another --output_dir."
            )

    def recoding(self) -> Recoding:
        """How images are made small."""
        return Recoding(self.short_side, self.quality)

    def about(self, source: ImageSource) -> About:
        """What tells the prepared split from others.

        Raises:
            ValueError: if it has fewer images than shards.
        """
        num_shards = self.num_shards or usual_number_of_shards(source.num_images)
        if num_shards > source.num_images:
            raise ValueError(
                f"num_shards={num_shards} is more than the {source.num_images} images of {source.split!r}: lower it."
            )
        name = Path(self.dataset).expanduser().resolve().name if Path(self.dataset).expanduser().exists() else None
        names = {"dataset": name or self.dataset, "dataset_config": self.dataset_config, "max_images": self.max_images}
        return names | about_split(source, self.recoding(), num_shards)


def rows_of(about: About, shards: list[int]) -> int:
    """Rows of the source that belong to these shards."""
    edges = edges_of_shards(about)
    return sum(edges[shard + 1] - edges[shard] for shard in shards)


def main(config: PrepareConfig) -> None:
    """Find out what is missing in all splits, write it, and say what is there."""
    folder, recoding = Path(str(config.output_dir)), config.recoding()
    sources = [open_split(config, split, config.max_images, all_columns=True) for split in config.split]
    splits = [(source, config.about(source)) for source in sources]
    missing = [missing_shards(folder, source.split, about) for source, about in splits]
    for (source, about), shards in zip(splits, missing, strict=True):
        if there := about["num_shards"] - len(shards):
            print(f"{source.split}: {there} of {about['num_shards']} shards are there already")  # noqa: T201
        title = f"preparing {source.split}"
        with tqdm(total=rows_of(about, shards), desc=title, unit="image", leave=False) as bar:
            prepare_split(source, folder, about, recoding, config.num_workers, bar.update)
    record = read_record(folder)
    if any(missing) or not set(config.split) <= record["splits"].keys():
        record = describe(folder)
    print(report(folder, record))  # noqa: T201


def report(folder: Path, record: Record) -> str:
    """What the folder holds, and what not."""
    lines = [f"{folder}: {record['note']}"]
    for split, entry in record["splits"].items():
        before, after = entry["bytes_before"], entry["bytes_after"]
        lines += [
            f"{split}: {entry['images_out']} of {entry['images_in']} images in {entry['num_shards']} shards, "
            f"{entry['kept']} kept byte for byte, {entry['resized']} resized",
            f"  {after / 1e6:,.1f} MB, {after / max(before, 1):.2f} of the {before / 1e6:,.1f} MB before; "
            f"{difference_in_words(entry)}",
        ]
        lines += [f"  {entry['skipped']} broken images have no row: {folder / SKIPPED}"] if entry["skipped"] else []
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        main(parse_settings(PrepareConfig, "training.prepare"))
    except (ValueError, RuntimeError) as error:
        sys.exit(f"training.prepare: {error}")
    except KeyboardInterrupt:
        sys.exit("training.prepare: stopped; the same command goes on with the shards that are missing")
