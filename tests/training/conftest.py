"""Small image data sets that the tests of `training` share, and runs that leave no global state behind."""

import io
import json
import logging
import signal
import tarfile
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import matplotlib
import numpy as np
import pytest
from accelerate.state import AcceleratorState, GradientState
from hub_client import hub_for_this_process
from hub_server import HubServer
from PIL import Image

from training import log, pretrain
from training.config import PretrainConfig


GARBAGE = b"this is no image"


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(number: int, size: tuple[int, int] = (20, 16)) -> Image.Image:
    """A smooth picture, (width, height), that no other number has."""
    coarse = np.random.default_rng(number).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def rows_of(numbers: Sequence[int], broken: Collection[int], labels: int) -> datasets.Dataset:
    """Rows whose picture, name and label tell their number."""
    images = [{"bytes": GARBAGE if n in broken else encode(picture(n)), "path": f"picture-{n}.png"} for n in numbers]
    names = [f"class {label}" for label in range(labels)]
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    columns = {"image": images, "label": [n % labels for n in numbers]}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    datasets.disable_progress_bars()
    matplotlib.use("Agg")
    logging.getLogger("datasets").setLevel(logging.ERROR)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run begins with one of the machine."""
    monkeypatch.setattr(log, "matmul_peak", lambda *_: 1e10)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    """A Hub that wants TOKEN, and a client that knows it."""
    with hub_for_this_process(tmp_path / "home") as server:
        yield server


@pytest.fixture
def write_shards(tmp_path: Path) -> Callable[..., Path]:
    """Write Parquet shards of these lengths in the Hub's layout; pictures are numbered through."""

    def write(
        *lengths: int, split: str = "train", folder: str = "data", broken: Collection[int] = (), labels: int = 4
    ) -> Path:
        first = 0
        for shard, length in enumerate(lengths):
            path = tmp_path / folder / "data" / f"{split}-{shard:05d}-of-{len(lengths):05d}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            rows_of(range(first, first + length), broken, labels).to_parquet(path)
            first += length
        return tmp_path / folder

    return write


@pytest.fixture
def write_image_folder(tmp_path: Path) -> Callable[[int], Path]:
    """Write numbered pictures into one folder for each of two classes."""

    def write(length: int) -> Path:
        for number in range(length):
            path = tmp_path / "pictures" / ("even", "odd")[number % 2] / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(picture(number)))
        return tmp_path / "pictures"

    return write


@pytest.fixture
def write_tars(tmp_path: Path, write_image_folder: Callable[[int], Path]) -> Callable[..., Path]:
    """Write WebDataset tars of these lengths; the pictures are numbered through."""

    def write(*lengths: int) -> Path:
        pictures = sorted(write_image_folder(sum(lengths)).rglob("*.png"), key=lambda path: path.name)
        folder = tmp_path / "tars"
        folder.mkdir()
        for shard, length in enumerate(lengths):
            with tarfile.open(folder / f"train-{shard:04d}.tar", "w") as tar:
                for number in range(sum(lengths[:shard]), sum(lengths[:shard]) + length):
                    tar.add(pictures[number], f"{number:06d}.png")
                    label = tarfile.TarInfo(f"{number:06d}.cls")
                    label.size = len(str(number % 2))
                    tar.addfile(label, io.BytesIO(str(number % 2).encode()))
        return folder

    return write


@pytest.fixture
def write_columns(tmp_path: Path) -> Callable[..., str]:
    """Write one Parquet file with these columns, each given as values and type."""

    def write(**columns: tuple[list[Any], Any]) -> str:
        features = datasets.Features({name: kind for name, (_, kind) in columns.items()})
        values = {name: values for name, (values, _) in columns.items()}
        path = tmp_path / "columns.parquet"
        datasets.Dataset.from_dict(values, features=features).to_parquet(path)
        return str(path)

    return write


def renormalize(model: Path) -> None:
    """Have the image processor of a model's folder say other means and deviations than ImageNet's."""
    file = model / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_mean": [0.5] * 3, "image_std": [0.5, 0.1, 2.0]}))


def forget_accelerators() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def no_accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Accelerate keeps its state in globals, and a run takes over Ctrl-C; yields what forgets it between two runs."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    forget_accelerators()
    yield forget_accelerators
    forget_accelerators()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., PretrainConfig]:
    """Build the settings of a run of a few seconds; keywords replace single values."""
    small: dict[str, Any] = {
        "dataset": str(tmp_path / "data"),
        "output_dir": str(tmp_path / "run"),
        "image_size": [16],
        "patch_size": [4],
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "mask_ratio": 0.5,
        "shuffle_window": 8,
        "per_device_batch_size": 8,
        "epochs": 8,
        "warmup_epochs": 1,
        "base_lr": 0.02,
        "mixed_precision": "no",
        "num_workers": 0,
        "logging_steps": 1,
        "knn_images": 0,
        "report_to": "none",
    }

    def build(**overrides: Any) -> PretrainConfig:
        return PretrainConfig(**(small | overrides))

    return build


@pytest.fixture
def run_pretraining(no_accelerator: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Run the entry point in this process, as if it were a new one; the figures are only drawn when asked for."""

    def run(config: PretrainConfig, figures: bool = False) -> Path:
        with monkeypatch.context() as patch:
            if not figures:
                patch.setattr(pretrain, "save_figures", lambda *_: None)
            forget_accelerators()
            config.validate()
            pretrain.main(config)
        return Path(config.output_dir)

    return run


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """With source/, 33 images of which two are broken, for training.prepare."""
    from prepared import write_split  # which needs this file's pictures

    write_split(tmp_path / "source")
    return tmp_path


@pytest.fixture
def run_prepare(workplace: Path) -> Callable[..., Path]:
    """Run training.prepare in this process; keywords replace single settings. Returns the prepared dataset."""
    from prepared import run

    return partial(run, workplace)
