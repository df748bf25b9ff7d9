"""The vectors of all images of a split, as a folder of Parquet parts.

`python -m training.embed --model runs/photos/model --dataset photos --split test --output_dir runs/photos/vectors`

The same command again goes on after an interruption with the parts that are missing.
"""

import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from training.collection import Encoder
from training.config import setting
from training.data import run_in_workers
from training.evaluation import EvaluationSettings, start_evaluation
from training.images import central_crop
from training.parser import parse_settings
from training.parts import Part, PartImages, finished_parts, part_name, read_facts, schema_of, share_of, write_part
from training.source import ImageSource, evaluation_numbers, open_split


NAMED = 20  # broken images that are named at the end


@dataclass
class EmbedConfig(EvaluationSettings):
    """Whole images in, vectors out; a part of them is the unit of work."""

    model: str | None = setting(None, "what makes the vectors: a portable folder or Hub id")
    split: str = setting("train", "split to embed")
    eval_split: str | None = setting(None, "not for this program: name the split with --split")
    output_dir: str | None = setting(None, "folder for the Parquet parts")
    features: Literal["cls", "mean"] = setting("cls", "[CLS], or the patches' mean; a classifier pools as it does")
    vector_type: Literal["float32", "float16"] = setting("float32", "numbers of the stored vectors")
    per_device_batch_size: int = setting(128, "images of each process in one forward pass")
    images_per_part: int = setting(1024, "images in a part: at most what each decoding process repeats if killed")

    def validate(self) -> None:
        """Raise a ValueError that names the first impossible setting, its value and the remedy."""
        if self.output_dir is None:
            raise ValueError("output_dir is not set: name the folder for the vectors with --output_dir.")
        if self.eval_split is not None:
            raise ValueError(f"eval_split={self.eval_split!r} is not for this program: name the split with --split.")
        super().validate()
        self._validate_at_least(1, "per_device_batch_size", "images_per_part")

    def about_data(self, source: ImageSource) -> dict[str, Any]:
        """What tells the collection's images from others."""
        return {
            "dataset": self.dataset,
            "dataset_config": self.dataset_config,
            "split": source.split,
            "fingerprint": source.fingerprint,
            "version": source.version,
            "streaming": not source.random_access,
            "image_column": source.image_column,
            "label_column": source.label_column,
            "max_images": self.max_images,
            "images_per_part": self.images_per_part,
            "vector_type": self.vector_type,
        }


def parts_of(source: ImageSource, config: EmbedConfig) -> list[NDArray[np.int64]]:
    """Numbers of the images of every part."""
    numbers = evaluation_numbers(source, min(config.max_images or source.num_images, source.num_images))
    return np.split(numbers, range(config.images_per_part, len(numbers), config.images_per_part))


def embedded_parts(
    encoder: Encoder, images: PartImages, num_workers: int, bar: "tqdm[Any]"
) -> Iterator[tuple[int, Part]]:
    """Every part with its number as soon as it is complete."""
    parts: dict[int, Part] = defaultdict(Part)
    for some in run_in_workers(images, num_workers):
        parts[some.part].add(some, encoder.encode(some.batch))
        bar.update(some.rows * encoder.accelerator.num_processes)
        if parts[some.part].rows == len(images.parts[some.part]):
            yield some.part, parts.pop(some.part)


def main(config: EmbedConfig) -> None:
    """Find out what is missing, embed it, and say what is there."""
    accelerator = start_evaluation(config)
    with accelerator.main_process_first():  # the others find what the first has prepared
        source = open_split(config, config.split)
    encoder = Encoder.load(accelerator, str(config.model), config.features)
    about = encoder.about() | config.about_data(source)
    folder, parts = Path(str(config.output_dir)), parts_of(source, config)
    finished = {file.name for file in finished_parts(folder, about)}
    missing = [part for part in range(len(parts)) if part_name(part, len(parts)) not in finished]
    accelerator.wait_for_everyone()  # all have looked before any writes
    if finished:
        accelerator.print(f"{len(finished)} of {len(parts)} parts are there already")
    folder.mkdir(parents=True, exist_ok=True)
    mine = share_of(missing, accelerator.process_index, accelerator.num_processes)
    transform = central_crop(encoder.size)
    images = PartImages(source, transform, {part: parts[part] for part in mine}, config.per_device_batch_size)
    dimension = int(encoder.model.config.hidden_size)
    schema = schema_of(source, dimension, config.vector_type)
    total = sum(len(parts[part]) for part in missing)
    quiet = not accelerator.is_main_process
    with tqdm(total=total, desc="embedding", unit="image", leave=False, disable=quiet) as bar:
        for number, part in embedded_parts(encoder, images, config.num_workers, bar):
            write_part(folder / part_name(number, len(parts)), part, schema, about)
    accelerator.wait_for_everyone()
    accelerator.print(report(folder, sum(map(len, parts)), dimension))
    accelerator.end_training()


def report(folder: Path, num_images: int, dimension: int) -> str:
    """What the folder holds, and what not."""
    broken = [reason for file in sorted(folder.glob("part-*.parquet")) for reason in read_facts(file)[1]]
    lines = [f"{num_images - len(broken)} vectors of {dimension} numbers in {folder}"]
    if broken:
        lines += [f"{len(broken)} broken images have no row:", *(f"  {reason}" for reason in broken[:NAMED])]
        lines += [f"  and {len(broken) - NAMED} more"] if len(broken) > NAMED else []
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        main(parse_settings(EmbedConfig, "training.embed"))
    except (ValueError, RuntimeError) as error:
        sys.exit(f"training.embed: {error}")
