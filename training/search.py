"""Search a collection by pictures: `python -m training.search --collection runs/photos/vectors --query picture.jpg`.

Prints the nearest images by cosine and draws them beside the query. With `--visible 0.1` the query is reduced to a
tenth of its patches, as if only a fragment of the picture were left.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import registered_extensions
from torch import Tensor

from modeling_micl.configuration_micl import height_and_width
from training.batch import Batch
from training.collection import (
    Collection,
    CollectionSettings,
    Encoder,
    encoder_of,
    nearest,
    open_images_of,
    read_collection,
)
from training.config import setting
from training.data import decode
from training.features import Views
from training.figures import only_patches
from training.images import central_crop, decode_rgb, to_pixels
from training.parser import parse_settings
from training.results import table
from training.search_figures import Found, save_neighbours
from training.source import ImageSource
from training.visible import num_visible, visible_patches


@dataclass
class SearchConfig(CollectionSettings):
    """The nearest images of one or more pictures."""

    query: list[str] = setting([], "pictures, folders of pictures, or numbers of images in the data")
    k: int = setting(5, "nearest images to show")
    visible: float = setting(1.0, "share of a query's patches that the model sees, in (0, 1]; random ones")
    picture: str = setting("search.png", "PNG to draw")

    def validate(self) -> None:
        """Raise a ValueError that names the first impossible setting, its value and the remedy."""
        super().validate()
        self._validate_at_least(1, "k")
        if not self.query:
            raise ValueError("query is not set: name one or more pictures with --query.")
        if not 0 < self.visible <= 1:
            raise ValueError(f"visible must lie in (0, 1], got {self.visible}.")


def asked_for(query: list[str], source: ImageSource) -> dict[str, dict[str, Any] | None]:
    """The undecoded pictures that are asked for, by their names; those of folders in order.

    Raises:
        ValueError: if there is no such file or number, or a folder has no pictures.
    """
    found: dict[str, dict[str, Any] | None] = {}
    for name in query:
        path = Path(name)
        if not path.exists() and name.isdecimal():
            if not int(name) < source.num_images:
                raise ValueError(f"--query {name} is no file, and the data have only {source.num_images} images.")
            ((_, row),) = source.rows_at(np.array([int(name)]))
            found[f"image {name}"] = source.image_of(row)
            continue
        inside = [path] if path.is_file() else sorted(path.iterdir()) if path.is_dir() else []
        files = [file for file in inside if path.is_file() or file.suffix.lower() in registered_extensions()]
        if not files:
            raise ValueError(f"--query {name} is no picture, and no folder with any.")
        found |= {str(file): {"path": str(file)} for file in files}
    return found


def read_pictures(stored: dict[str, dict[str, Any] | None], size: tuple[int, int]) -> Batch:
    """Pictures as one batch, numbered.

    Raises:
        ValueError: if one cannot be decoded.
    """
    images = []
    for name, image in stored.items():
        try:
            crop = central_crop(size)(decode_rgb(image), np.random.default_rng(0))
        except Exception as error:  # Pillow's plugins raise nearly anything
            raise ValueError(f"--query {name} cannot be decoded: {error}") from error
        images.append(torch.from_numpy(to_pixels(crop)))
    return Batch(torch.stack(images), torch.full((len(images),), -1), torch.arange(len(images)), [])


def seen_patches(encoder: Encoder, queries: Batch, views: Views) -> list[Tensor]:
    """What the model sees of queries, (H, W, 3) in [0, 1] each."""
    patch_size = height_and_width(encoder.model.config.patch_size)
    return [
        only_patches(pixels / 255, ids, patch_size)
        for pixels, ids in zip(queries.pixels, views(queries)[:, 0], strict=True)
    ]


def neighbours(
    collection: Collection, source: ImageSource, size: tuple[int, int], cosines: Tensor, places: Tensor
) -> list[list[Found]]:
    """The images of neighbours, read from the data by their numbers."""
    numbers = np.unique(collection.index[places.flatten().numpy()])
    batch = decode(source, central_crop(size), list(source.rows_at(numbers)))
    images = dict(zip(batch.index.tolist(), batch.pixels / 255, strict=True))
    return [
        [
            Found(images[int(collection.index[place])], cosine, collection.name_of(place))
            for cosine, place in zip(*pair, strict=True)
        ]
        for pair in zip(cosines.tolist(), places.tolist(), strict=True)
    ]


def main(config: SearchConfig) -> None:
    """Search, draw and print."""
    collection = read_collection(Path(str(config.collection)))
    source = open_images_of(collection.about, config.dataset)
    stored = asked_for(config.query, source)
    encoder = encoder_of(collection.about, config.model)
    queries, num_patches = read_pictures(stored, encoder.size), encoder.model.config.num_patches
    views = visible_patches(1 - config.visible, num_patches, config.seed)
    vectors = encoder.encode(queries, views if config.visible < 1 else None)
    cosines, places = nearest(collection.vectors, vectors, config.k)
    found = neighbours(collection, source, encoder.size, cosines, places)
    save_neighbours(
        Path(config.picture), seen_patches(encoder, queries, views), [Path(name).name for name in stored], found
    )
    seen = f" (seen: {num_visible(num_patches, 1 - config.visible)} of {num_patches} patches)"
    for name, some in zip(stored, found, strict=True):
        title = f"nearest by cosine to {name}{seen if config.visible < 1 else ''}"
        rows = {f"{rank}.": f"{each.cosine:6.3f}  {each.name}" for rank, each in enumerate(some, 1)}
        encoder.accelerator.print(table(title, rows))
    encoder.accelerator.print(f"picture: {config.picture}")


if __name__ == "__main__":
    try:
        main(parse_settings(SearchConfig, "training.search"))
    except (ValueError, RuntimeError) as error:
        sys.exit(f"training.search: {error}")
