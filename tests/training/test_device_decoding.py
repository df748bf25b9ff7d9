"""JPEGs decoded by the device, which is the CPU here: the crops of the normal path, whatever the workers leave."""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forks
import numpy as np
import pytest
import skimage.data
import torch
import torchvision.io
from conftest import encode, picture
from jpegs import jpeg, mixed, with_bad_data, with_bad_tables, write
from PIL import Image
from run_folder import course

from training import device_decoding, log, loop, pretrain
from training.batch import Batch, concatenate
from training.config import PretrainConfig
from training.data import TrainingBatches, TrainingOrder, batches
from training.device_decoding import check_decoder, decode_on_device
from training.encoded import EncodedBatches
from training.images import CropAndFlip
from training.log_files import read_metrics
from training.photos import PHOTOS
from training.source import ImageSource


Settings = Callable[..., PretrainConfig]
Train = Callable[..., Path]

CPU = torch.device("cpu")
SIZE = (16, 24)
CROP = CropAndFlip(SIZE, min_scale=0.2, horizontal_flip=True)


def some_batches(
    source: ImageSource, steps: int, processes: int = 1, workers: int = 0, crop: CropAndFlip = CROP, places: int = 12
) -> list[Batch]:
    """Whole batches, of which the device decodes each process's part."""
    order, size = TrainingOrder(source, places, seed=3, window=36), places // processes
    parts: list[list[Batch]] = []
    for process in range(processes):
        encoded = batches(EncodedBatches(order, crop, process * size, (process + 1) * size), workers)
        parts.append([decode_on_device(batch, crop.size, CPU, source) for batch in islice(encoded, steps)])
    return [concatenate(list(of_step)) for of_step in zip(*parts, strict=True)]


def normal_batches(source: ImageSource, steps: int, crop: CropAndFlip = CROP, places: int = 12) -> list[Batch]:
    order = TrainingOrder(source, places, seed=3, window=36)
    return list(islice(batches(TrainingBatches(order, crop, 0, places), 0), steps))


def difference(some: Batch, others: Batch) -> torch.Tensor:
    """In levels of gray."""
    return (some.pixels.int() - others.pixels.int()).abs()


# Pixels


def test_crops_of_photographs_are_nearly_those_of_pillow(tmp_path: Path) -> None:
    folder = Path(skimage.data.__file__).parent
    photos = [Image.open(folder / name).convert("RGB") for name in PHOTOS.values()]
    source = write(tmp_path, [encode(photo, "JPEG", quality=90) for photo in photos])
    crop = CropAndFlip((224, 224), min_scale=0.2, horizontal_flip=True)
    some, others = (of(source, 3, crop=crop, places=len(photos)) for of in (some_batches, normal_batches))
    differing = torch.stack([difference(*pair) for pair in zip(some, others, strict=True)]).float()
    assert differing.shape == (3, len(photos), 224, 224, 3)
    assert differing.mean() < 0.2
    assert differing.max() <= 20
    assert (differing > 2).float().mean() < 0.001
    assert differing.amax(dim=(2, 3, 4)).min() > 0  # another way has been gone


def test_all_kinds_of_files_come_in_order_with_the_same_stand_ins(tmp_path: Path) -> None:
    source = write(tmp_path, mixed(36))
    some, others = (of(source, 6) for of in (some_batches, normal_batches))
    for batch, normal in zip(some, others, strict=True):
        assert batch.index.tolist() == normal.index.tolist()
        assert batch.labels.tolist() == normal.labels.tolist()
        assert batch.broken == normal.broken
        assert difference(batch, normal).float().mean(dim=(1, 2, 3)).max() < 2
    assert len({skipped.index for batch in some for skipped in batch.broken}) == 8


def test_more_images_than_are_decoded_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path, mixed(36))
    (whole,) = some_batches(source, 1)
    monkeypatch.setattr(device_decoding, "TOGETHER", 2)
    (parts,) = some_batches(source, 1)
    assert torch.equal(whole.pixels, parts.pixels)


def test_batches_of_one_kind_alone(tmp_path: Path) -> None:
    kinds = {
        "other": [encode(picture(number)) for number in range(12)],
        "jpeg": [jpeg(number) for number in range(12)],
    }
    for name, files in kinds.items():
        source = write(tmp_path / name, files)
        (batch,), (normal,) = (of(source, 1) for of in (some_batches, normal_batches))
        assert batch.index.tolist() == normal.index.tolist()
        assert difference(batch, normal).float().mean() < (2 if name == "jpeg" else 1e-9)


@pytest.mark.parametrize(("processes", "workers"), [(1, 2), (2, 1), (3, 0)])
def test_processes_and_workers_change_no_batch(processes: int, workers: int, tmp_path: Path) -> None:
    files = mixed(36)
    files[0] = with_bad_tables(files[0])
    source = write(tmp_path, files)
    alone, found = some_batches(source, 4), some_batches(source, 4, processes, workers)
    for batch, other in zip(alone, found, strict=True):
        assert torch.equal(batch.pixels, other.pixels)
        assert (batch.index.tolist(), batch.labels.tolist()) == (other.index.tolist(), other.labels.tolist())
        assert {skipped.index for skipped in batch.broken} == {skipped.index for skipped in other.broken}


# Broken images


@pytest.mark.parametrize("streaming", [True, False])
def test_an_image_that_only_the_device_finds_broken_is_gray_and_named(streaming: bool, tmp_path: Path) -> None:
    files = [jpeg(number) for number in range(12)]
    (good,) = some_batches(write(tmp_path / "good", files, streaming), 1)
    files[5] = with_bad_tables(files[5])
    source = write(tmp_path / "bad", files, streaming)
    (batch,) = some_batches(source, 1)
    (normal,) = normal_batches(source, 1)
    assert batch.index.tolist() == good.index.tolist()
    for index, pixels, expected in zip(batch.index.tolist(), batch.pixels, good.pixels, strict=True):
        assert torch.equal(pixels, torch.full_like(pixels, 128) if index == 5 else expected)
    (skipped,), (as_ever,) = batch.broken, normal.broken
    assert (skipped.index, skipped.shard, skipped.row, skipped.file) == (5, 0, 5, as_ever.file)
    assert skipped.reason == as_ever.reason
    assert skipped.name == (None if streaming else "picture-5")


def test_wrong_bits_that_pillow_reads_over_are_read_over_here(tmp_path: Path) -> None:
    files = [jpeg(number) for number in range(12)]
    (whole,) = some_batches(write(tmp_path / "whole", files), 1)
    source = write(tmp_path / "wrong", [with_bad_data(file) for file in files])
    (batch,), (normal,) = (of(source, 1) for of in (some_batches, normal_batches))
    assert batch.broken == normal.broken == []
    assert difference(batch, normal).float().mean() < 2 < difference(batch, whole).float().mean()


def test_what_only_the_device_cannot_decode_is_decoded_by_pillow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path, mixed(36))
    expected = some_batches(source, 3)
    decode, refused = torchvision.io.decode_jpeg, []

    def refuse_some(contents: list[torch.Tensor], *options: Any) -> Any:
        if any(len(content) % 2 for content in contents):
            refused.append(len(contents))
            raise RuntimeError("not supported")
        return decode(contents, *options)

    monkeypatch.setattr(torchvision.io, "decode_jpeg", refuse_some)
    for batch, other in zip(some_batches(source, 3), expected, strict=True):
        assert torch.equal(batch.pixels, other.pixels)
        assert batch.broken == other.broken
    assert {1} < set(refused)


# The device


def test_the_command_says_that_there_is_no_gpu_before_it_begins(tmp_path: Path) -> None:
    where = {"dataset": tmp_path / "nowhere", "output_dir": tmp_path / "run"}
    done = forks.run(forks.command("training.pretrain", decode_on_gpu=True, report_to="none", **where), tmp_path)
    assert done.status == 1
    said = "training.pretrain: decode_on_gpu=True needs a CUDA GPU, and the device is 'cpu': leave it out"
    assert done.complaints.startswith(said)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("lacking", [True, False])
def test_a_gpu_without_decoder_is_refused(lacking: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("not compiled with nvJPEG support")

    if lacking:
        monkeypatch.delattr(torchvision.io, "decode_jpeg")
    else:
        monkeypatch.setattr(torchvision.io, "decode_jpeg", refuse)
    with pytest.raises(ValueError, match=r"decode_on_gpu=True, but torchvision decodes no JPEG here \(.*leave it out"):
        check_decoder(torch.device("cuda"))


def test_a_gpu_that_decodes_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = torchvision.io.decode_jpeg
    devices: list[torch.device] = []

    def on_the_cpu(contents: list[torch.Tensor], mode: str, device: torch.device) -> Any:
        devices.append(device)
        return decode(contents, mode, CPU)

    monkeypatch.setattr(torchvision.io, "decode_jpeg", on_the_cpu)
    check_decoder(torch.device("cuda"))
    assert devices == [torch.device("cuda")]


def test_a_gpu_is_waited_for_before_it_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or its decoder would write into memory that is still being read."""
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: done.append(f"wait for {device}"))
    monkeypatch.setattr(torchvision.io, "decode_jpeg", lambda contents, *_: done.append("decode") or contents)
    device_decoding.decode_jpegs([torch.zeros(1)], torch.device("cuda"))
    assert done == ["wait for cuda", "decode"]


# Training


USUAL = {"epochs": 6, "warmup_epochs": 0, "max_bad_fraction": 0.5}


@pytest.fixture
def train(
    settings: Settings, run_pretraining: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """Train on a folder of images, with the CPU as the GPU if that is to decode."""
    monkeypatch.setattr(pretrain, "check_decoder", lambda _: None)
    write(tmp_path / "data", mixed(45))

    def run(name: str, **changes: Any) -> Path:
        return run_pretraining(settings(output_dir=str(tmp_path / name), **USUAL | changes))

    return run


CACHED = {"per_device_batch_size": None, "contrastive_batch_size": 8, "per_device_micro_batch_size": 4}


@pytest.mark.parametrize("changes", [{}, CACHED, {"views_per_decode": 3}], ids=["plain", "cached", "views_per_decode"])
def test_training_goes_as_ever(
    changes: dict[str, Any], train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    normal = course(train("normal", **changes))
    decode, decoded = torchvision.io.decode_jpeg, []
    monkeypatch.setattr(torchvision.io, "decode_jpeg", lambda *given: decoded.append(given) or decode(*given))
    run = train("device", decode_on_gpu=True, **changes)
    found = course(run)
    assert len(decoded) == len(found) / changes.get("views_per_decode", 1) == 30 / changes.get("views_per_decode", 1)
    losses, as_ever = (np.array([entry[2] for entry in entries]) for entries in (found, normal))
    assert np.abs(losses - as_ever).max() < 0.1
    assert losses[-5:].mean() < losses[:5].mean() - 0.1
    assert [entry[:2] for entry in found] == [entry[:2] for entry in normal]


def test_an_interrupted_run_goes_on_to_the_same_end(train: Callable[..., Path]) -> None:
    whole = train("whole", decode_on_gpu=True, epochs=2, views_per_decode=2)
    train("interrupted", decode_on_gpu=True, epochs=2, views_per_decode=2, max_steps=3)
    resumed = train("interrupted", decode_on_gpu=True, epochs=2, views_per_decode=2)
    assert course(resumed) == course(whole)


def test_a_run_does_not_change_its_decoder_on_the_way(train: Callable[..., Path]) -> None:
    train("run", max_steps=3)
    with pytest.raises(ValueError, match="decode_on_gpu: False → True"):
        train("run", decode_on_gpu=True)


def test_broken_images_are_in_the_log_of_the_run(train: Callable[..., Path], tmp_path: Path) -> None:
    files = [jpeg(number) for number in range(40)]
    files[7] = with_bad_tables(files[7])
    write(tmp_path / "data", files)
    run = train("run", decode_on_gpu=True, epochs=1)
    (skipped,) = read_metrics(run / "skipped.jsonl")
    assert (skipped["index"], skipped["row"]) == (7, 7)
    assert read_metrics(run / "metrics.jsonl")[-1]["broken_images"] == 1


def test_decoding_on_the_device_is_not_waiting_for_images(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock on which a batch takes one second to come, two to be decoded and one to learn."""
    now = 0.0

    def passing(seconds: float, done: Callable[..., Any]) -> Callable[..., Any]:
        def work(*given: Any, **options: Any) -> Any:
            nonlocal now
            now += seconds
            return done(*given, **options)

        return work

    def slow(*given: Any) -> Iterator[Batch]:
        return map(passing(1, lambda batch: batch), batches(*given))

    monkeypatch.setattr(loop, "batches", slow)
    monkeypatch.setattr(loop, "decode_on_device", passing(2, decode_on_device))
    monkeypatch.setattr(loop, "learn", passing(1, loop.learn))
    monkeypatch.setattr(log, "time", SimpleNamespace(perf_counter=lambda: now))
    run = train("run", decode_on_gpu=True, epochs=1)
    entries = [entry for entry in read_metrics(run / "metrics.jsonl") if "loss" in entry]
    assert {entry["data_wait"] for entry in entries} == {0.25}
