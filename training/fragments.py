"""How often a fragment finds the picture it comes from.

`python -m training.fragments --collection runs/photos/vectors` hides all but a few random patches of images of the
collection, asks for the nearest of all its whole images, and adds to the model's eval.json.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn.functional import normalize
from tqdm.auto import tqdm

from training.collection import (
    Collection,
    CollectionSettings,
    Encoder,
    encoder_of,
    open_images_of,
    read_collection,
)
from training.config import DataSettings, setting
from training.data import run_in_workers
from training.images import central_crop
from training.parser import parse_settings
from training.parts import PartImages
from training.results import METRICS, add_results, result, table
from training.source import ImageSource
from training.visible import num_visible, visible_patches


PROGRAM = "training.fragments"
PROTOCOL = "random visible patches of the central crop ask for their image among whole ones, by cosine"
BATCH = 128


@dataclass
class FragmentsConfig(CollectionSettings):
    """Images of a collection are searched for by random parts of their patches."""

    visible_shares: list[float] = setting([0.05, 0.1, 0.25, 0.5, 1.0], "shares of the patches to see, in (0, 1]")
    max_queries: int = setting(1000, "fragments at each share, of images from all over the collection")
    num_workers: int = setting(4, "decoding processes for each process of the program; 0 decodes in that itself")
    output_dir: str | None = setting(None, "folder whose eval.json gets the results; unset, that of the model")

    def validate(self) -> None:
        """Raise a ValueError that names the first impossible setting, its value and the remedy."""
        super().validate()
        self._validate_at_least(1, "max_queries")
        self._validate_at_least(0, "num_workers")
        for share in self.visible_shares:
            if not 0 < share <= 1:
                raise ValueError(f"visible_shares takes shares in (0, 1], got {share}.")

    def shares(self) -> list[float]:
        """The shares to see, each once, in rising order."""
        return sorted(set(self.visible_shares))

    def results_folder(self, model: str) -> Path:
        """Where eval.json is; raises a ValueError if that is no folder."""
        if self.output_dir is None and not Path(model).is_dir():
            raise ValueError(f"model={model!r} is no local folder: say with --output_dir where results go.")
        return Path(self.output_dir or model)


def ranks(vectors: Tensor, queries: Tensor, places: Tensor) -> Tensor:
    """Ranks (m,), from 1 on, of the vectors at `places` among all by cosine with their queries; a tie counts against.

    Args:
        vectors: (n, d) L2-normalised.
        queries: (m, d).
        places: (m,) of the vector that each query should find.
    """
    cosines = normalize(queries, dim=1) @ vectors.T
    return (cosines >= cosines.gather(1, places[:, None])).sum(dim=1)


def ranks_by_share(
    config: FragmentsConfig, encoder: Encoder, collection: Collection, source: ImageSource
) -> dict[float, Tensor]:
    """Ranks (m,) of the images that the fragments come from, for every share; the same on every process."""
    accelerator, total = encoder.accelerator, len(collection.index)
    chosen = collection.index[np.arange(kept := min(config.max_queries, total)) * total // kept]
    mine = chosen[accelerator.process_index :: accelerator.num_processes]
    parts = dict(enumerate(np.split(mine, range(BATCH, len(mine), BATCH)))) if len(mine) else {}
    images = PartImages(source, central_crop(encoder.size), parts, BATCH)
    vectors, num_patches = normalize(collection.vectors, dim=1), encoder.model.config.num_patches
    found: list[dict[float, Tensor]] = []
    quiet = not accelerator.is_main_process
    with tqdm(total=len(mine), desc="searching", unit="image", leave=False, disable=quiet) as bar:
        for some in run_in_workers(images, config.num_workers):
            places = torch.from_numpy(np.searchsorted(collection.index, some.batch.index.numpy()))
            ranked = {}
            for share in config.shares():
                views = visible_patches(1 - share, num_patches, config.seed) if share < 1 else None
                ranked[share] = ranks(vectors, encoder.encode(some.batch, views), places)
            found.append(ranked)
            bar.update(some.rows)
    found = gather_object(found)
    return {share: torch.cat([each[share] for each in found]) for share in config.shares()}


def entries_of(
    config: FragmentsConfig, encoder: Encoder, collection: Collection, source: ImageSource, ranked: dict[float, Tensor]
) -> list[dict[str, Any]]:
    """Entries of eval.json: for every share, how often the image is the nearest, and among the five nearest."""
    about = collection.about
    data = DataSettings(about["dataset"], about["dataset_config"], max_images=about["max_images"])
    return [
        result(
            PROGRAM,
            data,
            source,
            len(found),
            task="image-retrieval",
            protocol=PROTOCOL,
            metric=METRICS[f"top{k}_accuracy"],
            value=float((found <= k).float().mean()),
            seed=config.seed,
            model=str(Path(encoder.name)),
            mixed_precision=about["mixed_precision"],
            features=encoder.features,
            visible_share=share,
            num_visible_patches=num_visible(encoder.model.config.num_patches, 1 - share),
            num_collection_images=len(collection.index),
        )
        for share, found in ranked.items()
        for k in (1, 5)
    ]


def main(config: FragmentsConfig) -> None:
    """Search, count, write and print."""
    collection = read_collection(Path(str(config.collection)))
    source = open_images_of(collection.about, config.dataset)
    encoder = encoder_of(collection.about, config.model)
    folder = config.results_folder(encoder.name)
    ranked = ranks_by_share(config, encoder, collection, source)
    entries = entries_of(config, encoder, collection, source, ranked)
    if encoder.accelerator.is_main_process:
        add_results(folder, entries)
    rows = {
        f"{100 * one['visible_share']:g}% of the patches ({one['num_visible_patches']})": "  ".join(
            f"{entry['metric'].split()[0]} {entry['value']:6.1%}" for entry in (one, five)
        )
        for one, five in zip(entries[::2], entries[1::2], strict=True)
    }
    first = entries[0]
    title = f"{first['num_test_images']} fragments find their image among {first['num_collection_images']}"
    encoder.accelerator.print(table(title, rows))
    encoder.accelerator.end_training()


if __name__ == "__main__":
    try:
        main(parse_settings(FragmentsConfig, PROGRAM))
    except (ValueError, RuntimeError) as error:
        sys.exit(f"{PROGRAM}: {error}")
