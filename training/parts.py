"""The parts of a collection: the images of each, and the Parquet file that holds their vectors."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset

from training.batch import Batch
from training.data import decode, worker_number
from training.disk import replace_file
from training.images import Transform
from training.monitor import provenance
from training.source import ImageSource


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


# Files


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
        self.broken += map(str, some.batch.broken)


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
    with replace_file(file) as unfinished, pq.ParquetWriter(unfinished, schema) as writer:
        if part.index:  # `datasets` cannot read an empty row group
            writer.write_table(pa.table({name: columns[name] for name in schema.names}, schema))


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


def differences(then: About, now: About) -> str:
    """What differs, for people; empty if only names do."""
    differing = [key for key in now if then.get(key) != now[key] and key != "versions"]
    if not set(differing) - NAMES_ONLY:
        return ""
    return ", ".join(f"{key}: {then.get(key)!r} → {now[key]!r}" for key in differing)
