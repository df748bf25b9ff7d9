"""Datasets of every kind as undecoded rows in shards of known length, and clear words where there is none."""

import io
import os
import socket
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import pytest
from torch.utils.data import DataLoader, IterableDataset

from training.source import ImageSource, Row, available_splits, open_source


Write = Callable[..., Path]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def write_tars(tmp_path: Path, write_image_folder: Write) -> Callable[..., Path]:
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


IMAGES = ([{"bytes": b"a", "path": None}, {"bytes": b"b", "path": None}], datasets.Image())
CLASSES = ([1, 0], datasets.ClassLabel(names=["cat", "dog"]))


def all_rows(source: ImageSource) -> list[Row]:
    if source.random_access:
        return list(source.rows)
    return [row for shard, length in enumerate(source.lengths) for row in source.read(shard, 0, length)]


def numbers(source: ImageSource, rows: list[Row]) -> list[int]:
    """Numbers of the pictures, by their names."""
    return [int("".join(filter(str.isdigit, Path(source.image_of(row)["path"]).name))) for row in rows]


def test_a_folder_in_the_hubs_layout_streams(write_shards: Write) -> None:
    source = open_source(str(write_shards(5, 1, 7)))
    assert not source.random_access
    assert (source.lengths, source.num_images) == ([5, 1, 7], 13)
    assert (source.image_column, source.label_column) == ("image", "label")
    assert source.class_names == [f"class {label}" for label in range(4)]
    rows = all_rows(source)
    assert numbers(source, rows) == list(range(13))
    assert [source.label_of(row) for row in rows] == [n % 4 for n in range(13)]
    assert source.image_of(rows[0])["bytes"].startswith(b"\x89PNG")


def test_the_same_folder_can_be_read_at_random(write_shards: Write) -> None:
    source = open_source(str(write_shards(5, 1, 7)), streaming=False)
    assert source.random_access
    assert source.lengths == [13]
    assert numbers(source, all_rows(source)) == list(range(13))
    assert source.image_of(source.rows[11])["bytes"].startswith(b"\x89PNG")


def test_one_parquet_file_is_a_dataset(write_shards: Write) -> None:
    file = next(write_shards(6).rglob("*.parquet"))
    assert open_source(str(file)).lengths == [6]
    assert open_source(str(file), streaming=False).lengths == [6]


def test_webdataset_tars_stream(write_tars: Write) -> None:
    folder = write_tars(4, 3)
    source = open_source(str(folder), label_column="cls")
    assert not source.random_access
    assert (source.image_column, source.lengths) == ("png", [4, 3])
    rows = all_rows(source)
    assert numbers(source, rows) == list(range(7))
    assert [source.label_of(row) for row in rows] == [n % 2 for n in range(7)]
    assert open_source(str(folder / "train-0001.tar")).lengths == [3]
    assert open_source(str(folder)).label_column is None


def test_a_folder_of_images_is_read_at_random_and_its_folders_are_the_classes(write_image_folder: Write) -> None:
    source = open_source(str(write_image_folder(7)))
    assert source.random_access
    assert (source.lengths, source.class_names, source.label_column) == ([7], ["even", "odd"], "label")
    rows = all_rows(source)
    assert sorted(numbers(source, rows)) == list(range(7))
    assert [source.label_of(row) for row in rows] == [n % 2 for n in numbers(source, rows)]


def test_a_folder_of_images_can_stream(write_image_folder: Write) -> None:
    source = open_source(str(write_image_folder(7)), streaming=True)
    assert not source.random_access
    assert source.num_images == 7
    assert sorted(numbers(source, all_rows(source))) == list(range(7))


def test_a_home_folder_may_be_written_with_a_tilde(write_shards: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_shards(3)
    monkeypatch.setenv("HOME", str(folder.parent))
    assert open_source(f"~/{folder.name}").num_images == 3


@pytest.mark.parametrize("bounds", [(0, 7), (0, 0), (2, 5), (6, 7), (3, 3)])
def test_a_part_of_a_shard_can_be_read(bounds: tuple[int, int], write_shards: Write) -> None:
    source = open_source(str(write_shards(5, 40, 7)))
    for shard, first in ((0, 0), (1, 5), (2, 45)):
        start, stop = (min(bound, source.lengths[shard]) for bound in bounds)
        assert numbers(source, list(source.read(shard, start, stop))) == list(range(first + start, first + stop))
    assert numbers(source, list(source.read(1, 15, 35))) == list(range(20, 40))


class _ReadsAllShards(IterableDataset[list[int]]):
    def __init__(self, source: ImageSource) -> None:
        self.source = source

    def __iter__(self) -> Iterator[list[int]]:
        yield numbers(self.source, all_rows(self.source))


def read_in_workers(source: ImageSource) -> list[list[int]]:
    return list(DataLoader(_ReadsAllShards(source), batch_size=None, num_workers=2))


def test_a_worker_process_reads_all_that_it_asks_for(write_shards: Write) -> None:
    assert read_in_workers(open_source(str(write_shards(5, 20, 7)))) == [list(range(32))] * 2


def test_reading_that_datasets_splits_among_workers_would_be_noticed(
    write_shards: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(self: ImageSource, shard: int, start: int, stop: int) -> Iterator[Row]:
        yield from self.rows.shard(len(self.lengths), shard).skip(start).take(stop - start)

    source = open_source(str(write_shards(5, 20, 7)))
    monkeypatch.setattr(ImageSource, "read", read)
    assert numbers(source, all_rows(source)) == list(range(32))
    assert read_in_workers(source) != [list(range(32))] * 2


@pytest.mark.parametrize("streaming", [True, False])
def test_only_the_first_images_can_be_used(streaming: bool, write_shards: Write) -> None:
    folder = str(write_shards(5, 4, 7))
    for max_images, lengths in ((3, [3, 0, 0]), (5, [5, 0, 0]), (7, [5, 2, 0]), (100, [5, 4, 7])):
        source = open_source(folder, streaming=streaming, max_images=max_images)
        assert source.lengths == (lengths if streaming else [min(max_images, 16)])
        assert numbers(source, all_rows(source)) == list(range(min(max_images, 16)))


def test_an_empty_shard_is_passed_over(write_shards: Write) -> None:
    source = open_source(str(write_shards(5, 0, 7)))
    assert source.lengths == [5, 0, 7]
    assert numbers(source, all_rows(source)) == list(range(12))


def test_the_fingerprint_tells_other_data(write_shards: Write) -> None:
    prints = [
        open_source(str(write_shards(5, 6, folder="a"))).fingerprint,
        open_source(str(write_shards(5, 7, folder="b"))).fingerprint,
        open_source(str(write_shards(6, 5, folder="c"))).fingerprint,
        open_source(str(write_shards(5, 6, folder="d", labels=3))).fingerprint,
        open_source(str(write_shards(5, 6, split="other", folder="e")), split="other").fingerprint,
        open_source(str(write_shards(5, 6, folder="f")), max_images=10).fingerprint,
    ]
    assert len(set(prints)) == len(prints)


@pytest.mark.parametrize("streaming", [True, False])
def test_the_fingerprint_stays_where_the_data_is_moved(streaming: bool, write_shards: Write) -> None:
    folders = (write_shards(5, 6, folder="here"), write_shards(5, 6, folder="there"))
    here, there = (open_source(str(folder), streaming=streaming).fingerprint for folder in folders)
    assert here == there


def test_one_of_several_image_columns_must_be_named(write_columns: Callable[..., str]) -> None:
    file = write_columns(left=IMAGES, right=IMAGES)
    with pytest.raises(ValueError, match=r"several image columns \['left', 'right'\].*--image_column"):
        open_source(file)
    source = open_source(file, image_column="right")
    assert source.image_of(all_rows(source)[0])["bytes"] == b"a"


def test_data_without_images_is_refused(write_columns: Callable[..., str]) -> None:
    file = write_columns(text=(["a", "b"], datasets.Value("string")))
    with pytest.raises(ValueError, match=r"no image column among \['text'\].*--image_column"):
        open_source(file)
    with pytest.raises(ValueError, match=r"--image_column 'picture' does not exist.*text"):
        open_source(file, image_column="picture")


@pytest.mark.parametrize("streaming", [True, False])
def test_bytes_of_images_may_be_a_plain_column(streaming: bool, write_columns: Callable[..., str]) -> None:
    file = write_columns(picture=([b"a", b"b"], datasets.Value("binary")))
    source = open_source(file, image_column="picture", streaming=streaming)
    assert [source.image_of(row)["bytes"] for row in all_rows(source)] == [b"a", b"b"]


def test_the_only_class_label_is_the_label(write_columns: Callable[..., str]) -> None:
    source = open_source(write_columns(image=IMAGES, animal=CLASSES, count=([3, 4], datasets.Value("int64"))))
    assert (source.label_column, source.class_names) == ("animal", ["cat", "dog"])
    assert [source.label_of(row) for row in all_rows(source)] == [1, 0]


def test_integers_are_labels_when_named(write_columns: Callable[..., str]) -> None:
    file = write_columns(image=IMAGES, count=([3, None], datasets.Value("int32")))
    assert open_source(file).label_column is None
    assert [open_source(file).label_of(row) for row in all_rows(open_source(file))] == [-1, -1]
    source = open_source(file, label_column="count")
    assert [source.label_of(row) for row in all_rows(source)] == [3, -1]
    assert source.class_names is None


def test_of_several_class_labels_none_is_guessed(write_columns: Callable[..., str]) -> None:
    file = write_columns(image=IMAGES, animal=CLASSES, breed=CLASSES)
    assert open_source(file).label_column is None
    assert open_source(file, label_column="breed").label_column == "breed"


@pytest.mark.parametrize("name", ["caption", "weight", "nothing"])
def test_a_label_column_must_hold_integers(name: str, write_columns: Callable[..., str]) -> None:
    columns = {"caption": (["a", "b"], datasets.Value("string")), "weight": ([1.0, 2.0], datasets.Value("float32"))}
    file = write_columns(image=IMAGES, **columns)
    with pytest.raises(ValueError, match=rf"--label_column '{name}' must hold integers.*caption"):
        open_source(file, label_column=name)


@pytest.mark.parametrize("streaming", [True, False])
def test_a_wrong_split_names_those_there_are(streaming: bool, write_shards: Write) -> None:
    write_shards(5)
    folder = str(write_shards(3, split="test"))
    assert available_splits(folder) == ["train", "test"]
    assert open_source(folder, split="test", streaming=streaming).num_images == 3
    with pytest.raises(ValueError, match=r"no split 'validation'.*train.*test"):
        open_source(folder, split="validation", streaming=streaming)


def test_a_dataset_without_rows_is_refused(write_shards: Write) -> None:
    with pytest.raises(ValueError, match="is empty"):
        open_source(str(write_shards(0)))


def test_what_is_no_dataset_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "table.csv").write_text("a,b\n")
    for dataset in (tmp_path / "empty", tmp_path / "table.csv"):
        with pytest.raises(ValueError, match=str(dataset)):
            open_source(str(dataset))


def test_a_folder_that_does_not_exist_is_refused_without_asking_the_hub(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        open_source(str(tmp_path / "nowhere"))


class _Gatekeeper(BaseHTTPRequestHandler):
    """A Hub that has a dataset and shows it to nobody."""

    def do_GET(self) -> None:
        self.send_response(403)
        self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("X-Error-Message", "Access to this dataset is restricted.")
        self.send_header("Content-Length", "2")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(b"{}")

    do_HEAD = do_POST = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def gated_hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Gatekeeper)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def no_hub() -> str:
    """An address where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


# The client waits 23 s between its attempts to reach the Hub.
IMPATIENT = """
import runpy, time
time.sleep = lambda _: None
runpy.run_module("training.pretrain", run_name="__main__")
"""


def complaint_of_command(hub: str, tmp_path: Path, *flags: str) -> str:
    """What the command says when it fails, with the Hub elsewhere."""
    environment = os.environ | {
        "HF_ENDPOINT": hub,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "HF_HUB_OFFLINE", "HF_DATASETS_CACHE"):
        environment.pop(proxy, None)
    command = [sys.executable, "-c", IMPATIENT, "--report_to", "none", "--mixed_precision", "no"]
    command += ["--output_dir", str(tmp_path / "run"), *flags]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.slow
def test_a_gated_dataset_tells_how_to_get_access(gated_hub: str, tmp_path: Path) -> None:
    complaint = complaint_of_command(gated_hub, tmp_path)
    assert "gated" in complaint
    assert "https://huggingface.co/datasets/ILSVRC/imagenet-1k" in complaint
    assert "hf auth login" in complaint


@pytest.mark.slow
def test_a_hub_out_of_reach_is_told_from_a_wrong_path(no_hub: str, tmp_path: Path) -> None:
    complaint = complaint_of_command(no_hub, tmp_path, "--dataset", "somebody/pictures")
    assert "'somebody/pictures' is no local folder, and the Hub cannot be reached" in complaint
    assert "hf auth login" in complaint
