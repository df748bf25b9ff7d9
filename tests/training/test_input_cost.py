"""What the input pipeline costs, as `training.benchmark` measures it, and that it does no work twice."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.io
from jpegs import jpeg, write

from training import benchmark, data, input_cost
from training.batch import Batch, concatenate
from training.images import decode_rgb
from training.input_cost import BARE, ON_DEVICE, InputCost, InputSettings, measure_source, photographs
from training.source import open_source


Write = Callable[..., Path]
SMALL: dict[str, Any] = {"image_size": 8, "warm_up": 1, "batch_size": 4, "batches": 2, "repetitions": 3}


def test_every_stage_and_the_whole_are_measured(
    tmp_path: Path, write_shards: Write, no_accelerator: None, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "input.json"
    config = InputSettings(dataset=str(write_shards(10, 6)), num_workers=[0, 1], output=str(output), **SMALL)
    config.validate()
    benchmark.main("input", config)
    entries = {entry["name"]: entry for entry in json.loads(output.read_text())["results"]}
    whole = [BARE, "torchvision's transforms", "our batches, 0 workers", "our batches, 1 workers"]
    assert list(entries)[:4] == whole
    assert len(entries) == 10
    for name, entry in entries.items():
        assert len(entry["seconds"]) == 3
        assert entry["ms_per_image"] == pytest.approx(1000 * np.median(entry["seconds"]) / 8)
        assert ("speed_ratio" in entry) == ("images_per_second" in entry) == (name in whole)
    for name in whole:
        ratios = np.divide(entries[BARE]["seconds"], entries[name]["seconds"])
        assert entries[name]["speed_ratio"] == pytest.approx(np.median(ratios))
    printed = capsys.readouterr().out.splitlines()
    assert printed[3].startswith("| 1.00 | plain loop")
    assert len(printed) == 13


@pytest.mark.parametrize(("workers", "cores"), [(0, 1), (1, 1), (2, 2), (8, 4)])
def test_rates_are_those_of_one_core(
    workers: int, cores: int, write_shards: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_cost, "CORES", 4)
    monkeypatch.setattr(InputCost, "bare", lambda _: 0.8)
    monkeypatch.setattr(InputCost, "loop", lambda _, workers: 0.8 / workers if workers else 0.8)
    monkeypatch.setattr(InputCost, "stages", lambda _: {})
    config = InputSettings(num_workers=[workers], **SMALL | {"batch_size": 8, "batches": 1})
    entry = measure_source(open_source(str(write_shards(10))), config)[2]
    assert entry["ms_per_image"] == pytest.approx(100 * cores / max(workers, 1))
    assert entry["images_per_second"] == pytest.approx(10 * max(workers, 1) / cores)
    assert entry["speed_ratio"] == pytest.approx(max(workers, 1) / cores)


def test_what_is_timed_is_what_training_does(write_shards: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each repetition begins behind the first batches, and all of its images are decoded in it."""
    cost = InputCost(open_source(str(write_shards(10, 6))), InputSettings(**SMALL))
    decoded: list[str] = []
    monkeypatch.setattr(data, "decode_rgb", lambda stored: decoded.append(stored["path"]) or decode_rgb(stored))
    monkeypatch.setattr(input_cost, "perf_counter", lambda: len(decoded))
    assert cost.loop(0) == 8
    assert len(set(decoded)) == 12


def test_what_a_device_decodes_is_timed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, decoded = write(tmp_path, [jpeg(number) for number in range(16)]), []
    decode = torchvision.io.decode_jpeg
    with monkeypatch.context() as patched:
        patched.setattr(torchvision.io, "decode_jpeg", lambda *given: decoded.extend(given[0]) or decode(*given))
        patched.setattr(input_cost, "perf_counter", lambda: len(decoded))
        assert InputCost(source, InputSettings(num_workers=[0], **SMALL)).on_device(torch.device("cpu")) == 8
    monkeypatch.setattr(input_cost, "CORES", 4)
    monkeypatch.setattr(InputCost, "on_device", lambda *_: 0.8)
    monkeypatch.setattr(InputCost, "loop", lambda *_: 1.0)
    monkeypatch.setattr(InputCost, "stages", lambda _: {})
    config = InputSettings(num_workers=[3], **SMALL)
    assert ON_DEVICE not in [entry["name"] for entry in measure_source(source, config)]
    entry = measure_source(source, config, torch.device("cpu"))[3]
    assert entry["name"] == ON_DEVICE
    assert entry["images_per_second"] == pytest.approx(10)  # of the whole program


def test_the_photographs_are_jpegs_of_that_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_cost, "DISTINCT", 16)
    monkeypatch.setattr(input_cost, "ROWS_PER_SHARD", 32)
    with photographs(50, 40) as folder:
        source = open_source(str(folder))
        assert source.num_images == 32 * max(2, input_cost.CORES)
        files = [source.image_of(row)["bytes"] for row in source.read(1, 0, 32)]
    assert files[:16] == files[16:]
    assert len(set(files)) == 16
    assert all(file.startswith(b"\xff\xd8") for file in files)
    assert {decode_rgb({"bytes": file}).size for file in files} == {(50, 40)}


@pytest.mark.parametrize(
    "setting",
    [{"batch_size": 0}, {"crop_min_scale": 0}, {"jpeg_size": [5]}, {"num_workers": []}, {"num_workers": [0, 129]}],
    ids=str,
)
def test_impossible_settings_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        InputSettings(**setting).validate()


def test_too_few_images_are_refused(write_shards: Write) -> None:
    with pytest.raises(ValueError, match="batch_size=128 is more than the 10 images"):
        measure_source(open_source(str(write_shards(10))), InputSettings())


@pytest.mark.parametrize("gpu", [False, True])
def test_batches_are_pinned_where_there_is_a_gpu(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    empty = torch.empty

    def without_pinning(*shape: Any, pin_memory: bool, **options: Any) -> torch.Tensor:
        asked.append(pin_memory)
        return empty(*shape, **options)

    parts = [
        Batch(torch.full((n, 2, 2, 3), n, dtype=torch.uint8), *torch.arange(2 * n).view(2, n), []) for n in (1, 2)
    ]
    monkeypatch.setattr(torch, "empty", without_pinning)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert (concatenate(parts[:1]) is parts[0]) != gpu
    asked.clear()
    whole = concatenate(parts)
    assert asked == [gpu] * 3
    assert whole.pixels[:, 0, 0, 0].tolist() == [1, 2, 2]
    assert (whole.labels.tolist(), whole.index.tolist()) == ([0, 0, 1], [1, 2, 3])
