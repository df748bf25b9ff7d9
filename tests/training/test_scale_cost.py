"""One thing is varied at a time; processes share out one contrastive batch. Times are never asserted."""

import json
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from training import scale_cost
from training.monitor import gigaflop_per_image
from training.scale_cost import ScaleSettings, measure_scale, process_seconds


SMALL: dict[str, Any] = {"size": "tiny", "image_size": 32, "patch_size": 8, "mask_ratio": 0.75, "images": 4}
SMALL |= {"repetitions": 1, "mask_ratios": [0.5, 0.75], "batches": [2, 4], "image_sizes": [48]}

pytestmark = pytest.mark.usefixtures("no_accelerator")


def test_every_point_is_measured_against_the_first_of_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale_cost, "process_seconds", lambda processes, *_: [4.0 / processes])
    config = ScaleSettings(**SMALL)
    config.validate()
    entries = measure_scale(Accelerator(cpu=True), config)
    assert json.loads(json.dumps(entries)) == entries
    assert [(e["varied"], e["value"], e["images"], e["patches_per_view"]) for e in entries] == [
        *(("mask ratio", 0.5, 4, 4), ("mask ratio", 0.75, 4, 2)),
        *(("images of a step", 2, 2, 2), ("images of a step", 4, 4, 2)),
        ("image size", 48, 4, 4),
        *(("processes", 1, 4, 2), ("processes", 2, 4, 2)),
    ]
    for number, first in enumerate([0, 0, 2, 2, 4, 5, 5]):
        entry = entries[number]
        assert entry["time_ratio"] == entry["ms_per_image"] / entries[first]["ms_per_image"]
        assert entry["gigaflop_ratio"] == entry["gigaflop_per_image"] / entries[first]["gigaflop_per_image"]
    assert [entry["ms_per_image"] for entry in entries[5:]] == [1000, 500]
    assert entries[4]["gigaflop_per_image"] == gigaflop_per_image(config.model_config(image_size=48))


@pytest.mark.slow
def test_processes_share_out_the_batch() -> None:
    seconds = process_seconds(2, ScaleSettings(**SMALL | {"repetitions": 2}), torch.device("cpu"))
    assert len(seconds) == 2
    assert min(seconds) > 0


def test_a_process_has_its_share_and_contrasts_all(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int, Any]] = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(
        scale_cost.dist, "init_process_group", lambda backend, timeout: asked.append((backend, 0, None))
    )
    monkeypatch.setattr(scale_cost.dist, "destroy_process_group", lambda: asked.append(("destroyed", 0, None)))
    monkeypatch.setattr(scale_cost.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: asked.append(("threads", threads, None)))

    def step(model: Any, images: int, precision: str, device: torch.device, wrap: Any) -> Any:
        asked.append((model.negatives, images, wrap))
        return lambda: None

    monkeypatch.setattr(scale_cost, "_step", step)
    scale_cost.shared_step_seconds(ScaleSettings(**SMALL), "cpu")
    shared = ("global", 2, scale_cost.DistributedDataParallel)
    assert asked == [("threads", 1, None), ("gloo", 0, None), shared, ("destroyed", 0, None)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "fp16"}, "precision takes fp32 or bf16, got 'fp16'"),
        ({"batches": [1, 2]}, r"batches takes numbers from 2 up, got \[1, 2\]"),
        ({"mask_ratios": [0.95]}, "mask_ratio=0.95 leaves"),
        ({"image_sizes": [8]}, "leaves"),
        ({"processes": [3]}, "images=4 cannot be shared out to processes=3"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScaleSettings(**SMALL | settings).validate()
