"""The data of studies: a part of the train split is held out, so that no setting is ever chosen on test images."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np

from training.config import DataSettings
from training.disk import made_once
from training.handwritten import HANDWRITTEN, handwritten_digits
from training.named_dataset import DEMONSTRATION
from training.photos import held_out_crops
from training.source import ImageSource, Row, evaluation_split, open_split
from training.strokes import DRAWN, drawn_digits


def held_out_data(settings: DataSettings, every: int, folder: Path) -> Path:
    """A folder of Parquet files whose splits `train` and `validation` share out the dataset's train split.

    Image number n of it is in `validation` if n is a multiple of `every`, else in `train`; `test` is the split that
    the dataset is evaluated on, if it has one. Crops of the photos overlap, so there `validation` has parts of each
    photograph to itself.

    Args:
        settings: name the dataset; all its images must fit into memory.
        every: see above.
        folder: where to make it, on first use.

    Raises:
        ValueError: if the images have no labels to judge by.
    """
    if settings.dataset == DEMONSTRATION:
        return held_out_crops()
    if settings.dataset in DRAWN:
        return drawn_digits(settings.dataset)
    if settings.dataset == HANDWRITTEN:
        settings = replace(settings, dataset=str(handwritten_digits()))
    source, split = open_split(settings, settings.split), evaluation_split(settings)
    if source.label_column is None:
        raise ValueError(
            f"--dataset {settings.dataset!r} has no labels, and a study is judged by them: name a column."
        )

    def write(made: Path) -> None:
        rows = list(_rows(source))
        kept = [row for number, row in enumerate(rows) if number % every]
        _write(kept, source, made / "train-00000-of-00001.parquet")
        _write(rows[::every], source, made / "validation-00000-of-00001.parquet")
        if split:
            test = open_split(settings, split)
            _write(list(_rows(test)), test, made / "test-00000-of-00001.parquet")

    return made_once(folder / "data" / f"{Path(settings.dataset).name}-{every}-{source.version}", write)


def _rows(source: ImageSource) -> Iterator[Row]:
    """Images and labels in stored order."""
    for _, row in source.rows_at(np.arange(source.num_images)):
        yield {"image": source.image_of(row), "label": source.label_of(row)}


def _write(rows: list[Row], source: ImageSource, file: Path) -> None:
    names = source.class_names or [str(label) for label in range(max(row["label"] for row in rows) + 1)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    columns = {name: [row[name] for row in rows] for name in features}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(file)
