"""Collections: the vectors of a split's images in a folder of Parquet parts, and what they were made of."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.data import IterableDataset

from modeling_micl.configuration_micl import height_and_width
from training.config import setting
from training.data import Batch, decode, worker_number
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
from training.images import Transform
from training.monitor import provenance
from training.run import use_all_cores
from training.source import ImageSource, open_source


# Keys of the schema's metadata: what the vectors are, and the images of this part that could not be decoded
ABOUT, BROKEN = b"micl", b"micl_broken"
# May differ between the parts of a collection: the same model and data can have other names.
NAMES_ONLY = {"model", "dataset", "versions"}
About = dict[str, Any]


@dataclass
class PartBatch:
    """Some images of a part.

    Attributes:
        part: its number.
        rows: how many rows of the data these were, broken ones included.
        batch: the decoded ones.
        paths: their paths or names, None where they have none.
    """

    part: int
    rows: int
    batch: Batch
    paths: list[str | None]


class PartImages(IterableDataset[PartBatch]):
    """The images of parts in order; every worker has some of the parts, as neighbours in the data are read together.

    Args:
        source: the images.
        transform: the crop.
        parts: numbers of the images of each part, rising, by the part's number.
        batch_size: images in a batch; a batch never holds those of two parts.
    """

    def __init__(
        self, source: ImageSource, transform: Transform, parts: dict[int, NDArray[np.int64]], batch_size: int
    ) -> None:
        self.source, self.transform, self.parts, self.batch_size = source, transform, parts, batch_size

    def __iter__(self) -> Iterator[PartBatch]:
        mine = share_of(sorted(self.parts), *worker_number())
        if not mine:
            return
        rows = self.source.rows_at(np.concatenate([self.parts[part] for part in mine]))
        for part in mine:
            left = len(self.parts[part])
            while left:
                some = list(islice(rows, min(self.batch_size, left)))
                batch, paths = decode(self.source, self.transform, some), dict[int, str | None]()
                for number, row in some:
                    paths[number] = (self.source.image_of(row) or {}).get("path")
                yield PartBatch(part, len(some), batch, [paths[number] for number in batch.index.tolist()])
                left -= len(some)


def share_of(parts: list[int], worker: int, workers: int) -> list[int]:
    """A worker's contiguous part of a list."""
    first, last = (edge * len(parts) // workers for edge in (worker, worker + 1))
    return parts[first:last]


# What vectors are made of


@dataclass
class CollectionSettings:
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

    def _validate_at_least(self, least: int, *names: str) -> None:
        for name in names:
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")


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


def differences(then: About, now: About) -> str:
    """What differs, for people; empty if only names do."""
    differing = [key for key in now if then.get(key) != now[key] and key != "versions"]
    if not set(differing) - NAMES_ONLY:
        return ""
    return ", ".join(f"{key}: {then.get(key)!r} → {now[key]!r}" for key in differing)


# Parts


def part_name(part: int, count: int) -> str:
    """File of a part."""
    return f"part-{part:05d}-of-{count:05d}.parquet"


def schema_of(source: ImageSource, dimension: int, vector_type: str) -> pa.Schema:
    """Columns of a collection, readable for pyarrow and, with class names, for `datasets`."""
    features: dict[str, Any] = {"index": datasets.Value("int64"), "path": datasets.Value("string")}
    if source.label_column:
        named = source.class_names is not None
        features["label"] = datasets.ClassLabel(names=source.class_names) if named else datasets.Value("int64")
    features["vector"] = datasets.List(datasets.Value(vector_type), length=dimension)
    return datasets.Features(features).arrow_schema


@dataclass
class Part:
    """A part of a collection in the making.

    Attributes:
        rows: of the data so far, those of broken images included.
        index: numbers of the images.
        paths: their paths or names, None where they have none.
        labels: their labels, None where they have none.
        vectors: (n, d) of each batch.
        broken: "image: reason" of each image that could not be decoded.
    """

    rows: int = 0
    index: list[int] = field(default_factory=list)
    paths: list[str | None] = field(default_factory=list)
    labels: list[int | None] = field(default_factory=list)
    vectors: list[Tensor] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def add(self, some: PartBatch, vectors: Tensor) -> None:
        """Add images and their vectors (n, d)."""
        self.rows += some.rows
        self.index += some.batch.index.tolist()
        self.paths += some.paths
        self.labels += [None if label < 0 else label for label in some.batch.labels.tolist()]
        self.vectors.append(vectors)
        self.broken += some.batch.broken


def write_part(file: Path, part: Part, schema: pa.Schema, about: About) -> None:
    """Write a part in one move, so that whatever has its name is whole."""
    kind = schema.field("vector").type
    flat = torch.cat(part.vectors).flatten().numpy().astype(kind.value_type.to_pandas_dtype())
    columns = {
        "index": part.index,
        "path": part.paths,
        "label": part.labels,
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(flat), kind.list_size),
    }
    facts = {ABOUT: json.dumps(about | {"versions": provenance()["versions"]}), BROKEN: json.dumps(part.broken)}
    schema = schema.with_metadata(schema.metadata | facts)
    unfinished = file.with_name(f".tmp-{file.name}")
    with unfinished.open("wb") as opened:
        with pq.ParquetWriter(opened, schema) as writer:
            if part.index:  # `datasets` cannot read an empty row group
                writer.write_table(pa.table({name: columns[name] for name in schema.names}, schema))
        opened.flush()
        os.fsync(opened.fileno())
    unfinished.replace(file)


def read_facts(file: Path) -> tuple[About, list[str]]:
    """What a part's vectors are, and the images that are not in it because they are broken.

    Raises:
        ValueError: if it is no readable part of a collection.
    """
    try:
        metadata = pq.read_schema(file).metadata or {}
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"{file} cannot be read ({error}): delete it, and run training.embed again.") from error
    if ABOUT not in metadata:
        raise ValueError(f"{file} is not from training.embed.")
    return json.loads(metadata[ABOUT]), json.loads(metadata[BROKEN])


def finished_parts(folder: Path, about: About) -> list[Path]:
    """The parts of a collection that are there.

    Raises:
        ValueError: if they hold something else than `about` says, naming what differs.
    """
    files = sorted(folder.glob("part-*.parquet"))
    for file in files:
        if changes := differences(read_facts(file)[0], about):
            raise ValueError(
                f"{file} was made otherwise ({changes}). Go back to that, or choose another --output_dir."
            )
    return files


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
