"""Streams over a bad network: the same rows and the same training, or in time clear words and a checkpoint."""

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import datasets
import fsspec.spec
import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pytest
from conftest import encode, picture
from hub_client import environment, hub_for_this_process, upload
from hub_server import Fault, HubServer
from huggingface_hub import constants
from source_rows import all_rows

from training import source as source_module
from training import stream
from training.config import PretrainConfig
from training.log_files import read_metrics
from training.run import read_state
from training.source import open_source
from training.stream import StreamError


Write = Callable[..., Path]
Settings = Callable[..., PretrainConfig]
Train = Callable[..., Path]
ROOT = Path(__file__).parents[2]
FILES = "GET /datasets/me/pictures/resolve/"
SHORT = "fewer bytes than asked for"

# What a stream must get over: the library with its own attempts, or ours when those are used up or there are none.
PASSING = {
    "a cut connection": Fault(FILES, cut=True),
    "cut connections for long": Fault(FILES, cut=True, times=9),
    "500": Fault(FILES, status=500, times=7),
    "502": Fault(FILES, status=502, times=8),
    "503": Fault(FILES, status=503, times=9),
    "504": Fault(FILES, status=504, times=15),
    "429": Fault(FILES, status=429, times=8),
    "429 with Retry-After": Fault(FILES, status=429, retry_after="3", times=8),
    "a stalled socket": Fault(FILES, pause=2),
    "a slow socket": Fault(FILES, trickle=0.01),
    SHORT: Fault(FILES, short=True),
}


# What it cannot get over: what the run says then, and the fault.
LASTING = {
    "nobody answers": ("no row for stream_timeout=2 seconds", Fault(FILES, cut=True)),
    "503": ("no row for stream_timeout=2 seconds", Fault(FILES, status=503)),
    "a stalled socket": ("no row for stream_timeout=2 seconds: no answer", Fault(FILES, pause=20)),
    "a trickle": ("no row for stream_timeout=2 seconds: no answer", Fault(FILES, trickle=0.6)),
    SHORT: ("no row for stream_timeout=2 seconds: .*Parquet", Fault(FILES, short=True)),
    "403": ("403", Fault(FILES, status=403)),
}
AMID = 4 + 5  # requests for files of `shards`: those that open it, and those of the first epoch


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """One whose client is impatient and gets small files in several pieces, as it does large ones."""
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    monkeypatch.setattr(fsspec.spec.AbstractBufferedFile, "DEFAULT_BLOCK_SIZE", 4096)
    pieces = pa.dataset.ParquetFragmentScanOptions(pre_buffer=False)
    read = partial(pa.dataset.ParquetFileFormat, default_fragment_scan_options=pieces)
    monkeypatch.setattr(pa.dataset, "ParquetFileFormat", lambda **_: read())
    with hub_for_this_process(tmp_path / "home") as server:
        yield server


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds of every pause between two attempts, which takes a thousandth of them."""
    asked: list[float] = []
    sleep = time.sleep

    def shorter(seconds: float) -> None:
        asked.append(seconds)
        sleep(seconds / 1000)

    monkeypatch.setattr(time, "sleep", shorter)
    return asked


@pytest.fixture
def pictures(tmp_path: Path, hub: HubServer) -> Path:
    """A shard of 60 rows in row groups of 10, here and on the Hub."""
    path = tmp_path / "pictures" / "data" / "train-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)
    images = [{"bytes": encode(picture(n, (100, 80))), "path": f"{n}.png"} for n in range(60)]
    rows = datasets.Dataset.from_dict({"image": images}, features=datasets.Features({"image": datasets.Image()}))
    rows.to_parquet(path, batch_size=10)
    upload(hub, tmp_path / "pictures", "datasets/me/pictures")
    return tmp_path / "pictures"


@pytest.fixture
def shards(write_shards: Write, hub: HubServer) -> Path:
    """Three shards to train on, here and on the Hub; each comes in one request."""
    data = write_shards(11, 9, 12)
    upload(hub, data, "datasets/me/pictures")
    return data


def fault(what: str, skip: int = 0) -> Fault:
    return Fault(**(vars(PASSING[what]) | {"skip": skip}))


def losses(run: Path) -> list[float]:
    return [entry["loss"] for entry in read_metrics(run / "metrics.jsonl") if "loss" in entry]


@pytest.mark.parametrize("what", PASSING)
def test_no_row_is_lost_or_doubled(hub: HubServer, pictures: Path, waits: list[float], what: str) -> None:
    expected = all_rows(open_source(str(pictures)))
    source = open_source("me/pictures")
    for skip in (0, 3, 6):
        hub.faults = [fault(what, skip)]
        assert all_rows(source) == expected
        assert hub.faults[0].times == 0


def test_it_goes_on_at_the_row_reached(hub: HubServer, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begins = []
    lists = stream.rows_of_stream

    def noted(shard: datasets.IterableDataset, groups: list[int], start: int, stop: int) -> Iterator[stream.Rows]:
        begins.append(start)
        return lists(shard, groups, start, stop)

    monkeypatch.setattr(source_module, "rows_of_stream", noted)
    source = open_source("me/pictures")
    hub.requests.clear()
    rows = list(source.read(0, 7, 60))
    hub.faults = [Fault(FILES, short=True, skip=len([each for each in hub.requests if FILES in each]) - 1)]
    assert list(source.read(0, 7, 60)) == rows
    assert begins[:2] == [7, 7]
    assert 7 + 16 <= begins[2] < 60


@pytest.mark.parametrize(
    ("what", "workers"),
    [("cut connections for long", 0), ("429 with Retry-After", 0), ("a stalled socket", 0), (SHORT, 2)],
)
def test_a_fault_amid_training_changes_no_loss(
    hub: HubServer,
    shards: Path,
    settings: Settings,
    run_pretraining: Train,
    tmp_path: Path,
    waits: list[float],
    what: str,
    workers: int,
) -> None:
    expected = losses(run_pretraining(settings(epochs=2, output_dir=str(tmp_path / "local"))))
    hub.faults = [fault(what, skip=AMID)]
    run = run_pretraining(settings(epochs=2, dataset="me/pictures", num_workers=workers))
    assert losses(run) == expected
    assert len(expected) == 8
    assert hub.faults[0].times == 0


@pytest.mark.parametrize("what", LASTING)
def test_a_lasting_fault_ends_the_run_in_clear_words_and_the_same_command_goes_on(
    hub: HubServer, shards: Path, settings: Settings, run_pretraining: Train, tmp_path: Path, what: str
) -> None:
    expected = losses(run_pretraining(settings(epochs=2, output_dir=str(tmp_path / "local"))))
    refused = what == "403"
    config = settings(
        epochs=2, dataset="me/pictures", stream_timeout=600 if refused else 2, num_workers=2 if refused else 0
    )
    words, hub.faults = LASTING[what][0], [replace(LASTING[what][1], skip=AMID, times=1000)]
    with pytest.raises(StreamError, match=rf"^Shard \d of the split 'train' cannot.*{words}.*the same command again"):
        run_pretraining(config)
    done = losses(tmp_path / "run")
    assert done == expected[: len(done)]
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert read_state(checkpoint)["progress"]["step"] == len(done) > 0
    hub.faults.clear()
    assert losses(run_pretraining(config)) == expected


def test_what_is_logged_when_the_stream_fails_between_two_entries(
    hub: HubServer, shards: Path, settings: Settings, run_pretraining: Train, tmp_path: Path
) -> None:
    each_step = losses(run_pretraining(settings(epochs=2, output_dir=str(tmp_path / "local"))))
    config = settings(epochs=2, dataset="me/pictures", logging_steps=5)
    hub.faults = [Fault(FILES, status=403, skip=AMID, times=1000)]
    with pytest.raises(StreamError):
        run_pretraining(config)
    hub.faults.clear()
    run_pretraining(config)
    entries = [entry for entry in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in entry]
    begins = [0, *(entry["step"] for entry in entries)]
    assert begins[-1] == 8
    assert len(begins) > 3
    for begin, entry in zip(begins, entries, strict=False):
        assert entry["loss"] == pytest.approx(np.mean(each_step[begin : entry["step"]]), rel=1e-6)


def test_a_file_on_disk_is_tried_once(shards: Path, waits: list[float]) -> None:
    source = open_source(str(shards))
    file = next(shards.rglob("train-00001*"))
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(StreamError, match="Shard 1 of the split 'train' cannot be read any more"):
        all_rows(source)
    assert waits == []


def test_a_shard_that_ends_too_early_is_a_failure(hub: HubServer, shards: Path) -> None:
    source = open_source("me/pictures", stream_timeout=0.3)
    source.lengths[1] += 1
    with pytest.raises(StreamError, match="it ends before row 9 of 10"):
        all_rows(source)


def command(run: Path, **more: object) -> list[str]:
    given = {
        **{"dataset": "me/pictures", "output_dir": run, "image_size": 16, "patch_size": 4, "hidden_size": 32},
        **{"num_hidden_layers": 1, "num_attention_heads": 2, "mask_ratio": 0.5, "mixed_precision": "no"},
        **{"contrastive_batch_size": 8, "negatives": "global", "epochs": 2, "warmup_epochs": 1, "save_steps": 1},
        **{"logging_steps": 1, "knn_images": 0, "report_to": "none", "stream_timeout": 2, "process_timeout": 30},
    }
    return [sys.executable, "-m", "training.pretrain", *(f"--{key}={value}" for key, value in (given | more).items())]


@pytest.mark.slow
def test_a_hanging_stream_leaves_one_clear_line_and_no_process(hub: HubServer, shards: Path, tmp_path: Path) -> None:
    hub.faults = [Fault(FILES, pause=60, skip=AMID, times=1000)]
    start = command(tmp_path / "run", num_workers=2)
    done = subprocess.run(
        start, cwd=ROOT, env=environment(hub, tmp_path / "home"), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("training.pretrain: Shard ")
    assert "no row for stream_timeout=2 seconds" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_stream_that_fails_in_one_process_ends_them_all(hub: HubServer, shards: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    hub.faults = [Fault(FILES, status=403, skip=AMID + 7)]  # one request of one of the two
    ends = []
    for _ in range(2):
        common = environment(hub, tmp_path / "home")
        common |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        pair = [
            subprocess.Popen(
                command(tmp_path / "run", num_workers=0),
                cwd=ROOT,
                env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        ends.append([(process.communicate(timeout=600)[1], process.returncode) for process in pair])
    (first, second), resumed = ends
    assert (first[1], second[1]) == (1, 1)
    assert sum("cannot be read any more (" in said for said, _ in ends[0]) == 1
    assert sum(" lost process " in said for said, _ in ends[0]) == 1
    assert [status for _, status in resumed] == [0, 0]
    assert len(losses(tmp_path / "run")) == 8
