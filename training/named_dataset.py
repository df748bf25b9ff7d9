"""What `--dataset` names: a dataset on the Hub, a local folder or file, or the demonstration."""

import re
from pathlib import Path

import datasets
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from httpx2 import HTTPError
from huggingface_hub.errors import HFValidationError

from modeling_micl.hub_access import reason, why_unreadable
from training.photos import photo_crops


DEMONSTRATION = "photos"
_SPLIT_WORDS = {"train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation"}
_HIDDEN = re.compile(r"(^|/)(\.|__)")  # files and folders that the library passes over


def available_splits(dataset: str, dataset_config: str | None = None) -> list[str]:
    """Names of a dataset's splits, as far as they are known without reading it."""
    builder = find_builder(dataset, dataset_config)
    return [str(split) for split in builder.config.data_files or builder.info.splits or ()]


def find_builder(dataset: str, config: str | None) -> datasets.DatasetBuilder:
    """The library's builder of a dataset; raises a ValueError that says why it cannot be read."""
    path = Path(str(photo_crops()) if dataset == DEMONSTRATION else dataset).expanduser()
    try:
        if path.is_file():
            kind = {".parquet": "parquet", ".tar": "webdataset", ".arrow": "arrow"}.get(path.suffix)
            if kind is None:
                raise ValueError(f"--dataset {dataset}: a file must be .parquet, .tar or .arrow, or name its folder.")
            return datasets.load_dataset_builder(kind, data_files=str(path))
        return datasets.load_dataset_builder(str(path) if path.is_dir() else dataset, config)
    except (OSError, HTTPError, HFValidationError) as error:
        raise ValueError(f"--dataset {dataset!r} {why_unreadable(dataset, error, 'dataset')}") from error
    except RuntimeError as error:  # the library's word for a loading script
        raise ValueError(
            f"--dataset {dataset!r} cannot be read without running its authors' code ({reason(error)}). If the Hub "
            f"keeps a copy as Parquet files, get it with `hf download {dataset} --repo-type dataset --revision "
            "refs/convert/parquet --local-dir FOLDER`, and give the folder."
        ) from error


def check_none_left_out(folder: Path, builder: datasets.DatasetBuilder) -> None:
    """Raise a ValueError if words in the names of files or classes were taken for those of splits.

    The library looks for `train`, `test`, `val` and the like in the whole path, so that a class "train" beside "bus",
    or one "test-7.png", would be all there is.
    """
    groups = [path for path in folder.iterdir() if path.is_dir() and _SPLIT_WORDS.intersection(_words(path.name))]
    if any(path.is_dir() for group in groups for path in group.iterdir()):
        return  # folders of splits that hold folders of classes
    used = {Path(file) for files in (builder.config.data_files or {}).values() for file in files}
    found = (path for path in folder.rglob("*.*") if not _HIDDEN.search(str(path.relative_to(folder))))
    images = {path.resolve() for path in found if path.suffix.lower() in ImageFolder.EXTENSIONS and path.is_file()}
    left_out = sorted(images - {path.resolve() for path in used})
    if left_out and used:
        example = next(iter(used)).relative_to(folder)
        raise ValueError(
            f"{len(left_out)} of the {len(images)} images in --dataset {folder} would be left out, as "
            f"{left_out[0].name}, because a word in names as {example} is taken for the name of a split: move "
            f"everything into {folder / 'train'}, or rename."
        )


def _words(name: str) -> list[str]:
    return re.split(r"[^a-z]+", name.lower())
