"""Labels: what they must be before anything is trained or judged, and the few that few-shot protocols use."""

from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import datasets
import fsspec
import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.source import ImageSource


CHECKED_ROWS = 1000


def class_names(*sources: ImageSource) -> list[str]:
    """Names of the classes of labelled splits, the same in all of them.

    Raises:
        ValueError: if there is no label column, it is no ClassLabel, its labels are missing or out of range, or the
            splits have different classes.
    """
    names = [_checked_names(source) for source in sources]
    # `datasets` reads the Parquet files of all splits with the names of the first; only the files tell of others.
    stored = [_names_in_file(source) or own for source, own in zip(sources, names, strict=True)]
    for source, others in zip(sources, stored, strict=True):
        if others != stored[0]:
            raise ValueError(
                f"The splits {sources[0].split!r} and {source.split!r} have different classes, or in another order: "
                f"{stored[0][:3]} and {others[:3]} are the first of {len(stored[0])} and {len(others)}. Use splits of "
                "one dataset, or write both with the same ClassLabel."
            )
    return names[0]


def _checked_names(source: ImageSource) -> list[str]:
    if source.label_column is None:
        raise ValueError(
            f"The split {source.split!r} has no label column of its own among {source.columns}: name one of type "
            "ClassLabel with --label_column, or put the images into one sub-folder per class."
        )
    if source.class_names is None:
        raise ValueError(
            f"--label_column {source.label_column!r} of the split {source.split!r} is "
            f"{source.rows.features[source.label_column]}, which has no class names: cast it with "
            f"`dataset.cast_column({source.label_column!r}, datasets.ClassLabel(names=[...]))`."
        )
    check_labels(stored_labels(source), len(source.class_names), source.split)
    return source.class_names


def _names_in_file(source: ImageSource) -> list[str] | None:
    """The class names that a split's first Parquet file holds itself, if it does."""
    if not source.files:
        return None
    with fsspec.open(source.files[0], "rb") as opened:
        features = datasets.Features.from_arrow_schema(pq.read_schema(opened))
    return getattr(features[str(source.label_column)], "names", None)


def check_labels(labels: NDArray[np.int64] | Tensor, num_classes: int, split: str) -> None:
    """Raise a ValueError unless all labels lie in 0 ≤ label < num_classes; -1 stands for none."""
    if len(labels) and (labels == -1).all():
        raise ValueError(f"The split {split!r} is unlabelled: choose another one with --split or --eval_split.")
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if len(wrong):
        raise ValueError(
            f"The split {split!r} has labels outside 0 ≤ label < {num_classes}, as {int(wrong[0])} ({len(wrong)} of "
            f"{len(labels)}; -1 means none): remove these images, or correct the class names."
        )


def stored_labels(source: ImageSource) -> NDArray[np.int64]:
    """Labels of a split, -1 where there is none: all of them where they can be read without the images, else some."""
    if isinstance(source.rows, datasets.Dataset):
        column = source.rows.with_format("arrow")[:][source.label_column]
        return _integers(column.to_pylist())
    if source.files is not None:
        with ThreadPoolExecutor(16) as pool:
            columns = list(pool.map(lambda file: _read_column(file, str(source.label_column)), source.files))
        return np.concatenate([_integers(c[:n]) for c, n in zip(columns, source.lengths, strict=True)])
    rows = source.read(0, 0, min(CHECKED_ROWS, source.lengths[0]))
    return np.array([source.label_of(row) for row in islice(rows, CHECKED_ROWS)], dtype=np.int64)


def few_shot(labels: Tensor, share: float, seed: int) -> Tensor:
    """Indices of a random part of every class, at least one image each; a function of the labels and the seed alone.

    Args:
        labels: (n,) of the whole train split.
        share: of each class, in (0, 1].
        seed: of the selection.
    """
    rng = np.random.default_rng(seed)
    chosen = []
    for label in np.unique(labels.cpu().numpy()):
        members = np.flatnonzero(labels.cpu().numpy() == label)
        chosen.append(rng.choice(members, max(1, round(share * len(members))), replace=False))
    return torch.from_numpy(np.sort(np.concatenate(chosen)))


def _read_column(file: str, column: str) -> list[int | None]:
    with fsspec.open(file, "rb") as opened:
        values: list[int | None] = pq.read_table(opened, columns=[column])[column].to_pylist()
    return values


def _integers(values: list[int | None]) -> NDArray[np.int64]:
    return np.array([-1 if value is None else value for value in values], dtype=np.int64)
