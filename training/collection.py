"""Collections: the vectors of a split's images, the model that made them, and the search for the nearest."""

from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from modeling_micl.configuration_micl import height_and_width
from training.batch import Batch
from training.checks import Checks
from training.config import setting
from training.evaluation import load_frozen
from training.features import (
    Frozen,
    Normalization,
    Pooling,
    Views,
    encoder_features,
    stored_normalization,
    weights_digest,
)
from training.parts import About, differences, finished_parts, part_name, read_facts
from training.processes import use_all_cores
from training.source import ImageSource, open_source


@dataclass
class CollectionSettings(Checks):
    """Shared by the programs that use a collection."""

    collection: str | None = setting(None, "folder that training.embed has written")
    model: str | None = setting(None, "where the model of the collection is now; unset, where it was")
    dataset: str | None = setting(None, "where the images of the collection are now; unset, where they were")
    seed: int = setting(0, "of the choice of visible patches")

    def validate(self) -> None:
        """Raise a ValueError that names the first impossible setting, its value and the remedy."""
        if self.collection is None:
            raise ValueError("collection is not set: name the folder of training.embed with --collection.")
        self._validate_at_least(0, "seed")


@dataclass
class Encoder:
    """A stored model that makes vectors.

    Attributes:
        name: portable folder or Hub id.
        model: the encoder, or a classifier without its last layer, on the device.
        features: "cls" or "mean".
        accelerator: its processes and precision.
        normalization: the model's own.
    """

    name: str
    model: Frozen
    features: Pooling
    accelerator: Accelerator
    normalization: Normalization

    @classmethod
    def load(cls, accelerator: Accelerator, name: str, features: Pooling) -> "Encoder":
        """Read it; raises a ValueError if it cannot be read."""
        model = load_frozen(name).to(accelerator.device)
        return cls(name, model, features, accelerator, stored_normalization(name))

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of its images in pixels."""
        return height_and_width(self.model.config.image_size)

    def about(self) -> About:
        """Everything that a vector depends on but the image."""
        return {
            "model": self.name,
            "weights": weights_digest(self.model),
            "normalization": asdict(self.normalization),
            "image_size": list(self.size),
            "features": self.features,
            "mixed_precision": self.accelerator.mixed_precision,
        }

    @torch.no_grad()
    def encode(self, batch: Batch, views: Views | None = None) -> Tensor:
        """Vectors (n, d) of the images in a batch, or of the patches of them that `views` draws; on the CPU."""
        if not len(batch.labels):
            return torch.empty(0, self.model.config.hidden_size)
        extract = encoder_features(self.model, self.accelerator, self.features, views, self.normalization)
        return extract(batch.to(self.accelerator.device)).cpu()


def encoder_of(about: About, name: str | None = None) -> Encoder:
    """The model that made a collection.

    Args:
        about: the collection's metadata.
        name: where the model is now; unset, where it was.

    Raises:
        ValueError: if it cannot be read, or is not the same any more.
    """
    accelerator = Accelerator(mixed_precision=about["mixed_precision"])
    use_all_cores(accelerator)
    encoder = Encoder.load(accelerator, name or str(about["model"]), about["features"])
    if changes := differences(about, encoder.about()):
        raise ValueError(f"--model {encoder.name!r} is not the one that made the collection ({changes}).")
    return encoder


def open_images_of(about: About, dataset: str | None = None) -> ImageSource:
    """The images that a collection was made of.

    Args:
        about: the collection's metadata.
        dataset: where they are now; unset, where they were.

    Raises:
        ValueError: if they are not there, or others.
    """
    dataset = dataset or str(about["dataset"])
    where = (about["dataset_config"], about["streaming"], about["image_column"], about["label_column"])
    source = open_source(dataset, about["split"], *where)
    if source.fingerprint != about["fingerprint"]:
        raise ValueError(
            f"--dataset {dataset!r}: its split {about['split']!r} has other files, columns or numbers of rows than "
            "when the collection was made: make it anew with training.embed."
        )
    return source


@dataclass
class Collection:
    """The vectors of a split's images.

    Attributes:
        about: what they were made of.
        index: (n,) the images' numbers in the data, rising.
        paths: their paths or names, None where they have none.
        labels: the names of their labels, None where they have none.
        vectors: (n, d) float32.
    """

    about: About
    index: NDArray[np.int64]
    paths: list[str | None]
    labels: list[str | None]
    vectors: Tensor

    def name_of(self, place: int) -> str:
        """An image for people, by its place among the vectors: label, path and number, as far as there are any."""
        path = self.paths[place]
        facts = (self.labels[place], Path(path).name if path else None, f"image {self.index[place]}")
        return ", ".join(fact for fact in facts if fact)


def read_collection(folder: Path) -> Collection:
    """Read all parts.

    Raises:
        ValueError: if there are none, some are missing, or they do not belong together.
    """
    files = sorted(folder.glob("part-*.parquet"))
    if not files:
        raise ValueError(f"--collection {folder} holds no vectors: make them with training.embed.")
    about, _ = read_facts(files[0])
    finished_parts(folder, about)
    count = int(files[0].stem.split("-of-")[1])
    missing = [part for part in range(count) if not (folder / part_name(part, count)).exists()]
    if missing:
        raise ValueError(
            f"--collection {folder} is not complete, {len(missing)} of {count} parts are missing: run the same "
            "command of training.embed again."
        )
    table = pa.concat_tables([pq.read_table(file) for file in files])
    if not len(table):
        raise ValueError(f"--collection {folder} is empty: all of its images are broken.")
    vectors = table["vector"].combine_chunks().flatten().to_numpy().astype(np.float32)
    names = datasets.Features.from_arrow_schema(table.schema).get("label")
    labels = table["label"].to_pylist() if names else [None] * len(table)
    if isinstance(names, datasets.ClassLabel):
        labels = [None if label is None else names.int2str(label) for label in labels]
    return Collection(
        about=about,
        index=table["index"].to_numpy(),
        paths=table["path"].to_pylist(),
        labels=[None if label is None else str(label) for label in labels],
        vectors=torch.from_numpy(vectors).unflatten(0, (len(table), -1)),
    )


def nearest(vectors: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosines (m, k), falling, of queries (m, d) with the k nearest of vectors (n, d), and their places (m, k)."""
    found = (normalize(queries, dim=1) @ normalize(vectors, dim=1).T).topk(min(k, len(vectors)), dim=1)
    return found.values, found.indices
