"""What a contrastive batch costs: everything is measured, and the arithmetic is right. Times are never asserted."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from modeling_micl import MiclConfig, sample_views
from training import batch_cost, resume_cost, step_cost
from training.batch_cost import GrowthSettings, MemorySettings, ViewsSettings
from training.benchmark import main, parse
from training.benchmark_parts import PARTS, markdown
from training.resume_cost import ResumeSettings
from training.source import ImageSource
from training.step_cost import Learner, Way, peak_memories, way_step


ROOT = Path(__file__).parents[2]
TINY: dict[str, Any] = {
    **{"image_size": 32, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"mask_ratio": 0.75, "mixed_precision": "no", "repetitions": 3},
}  # 64 patches, two views of 8
Measure = Callable[..., dict[str, Any]]

pytestmark = pytest.mark.usefixtures("no_accelerator")


@pytest.fixture
def measure(tmp_path: Path) -> Measure:
    """Run a part in this process; gives what it has written."""

    def run(part: str, **settings: Any) -> dict[str, Any]:
        config = PARTS[part].settings(**TINY | {"output": str(tmp_path / "new" / "numbers.json")} | settings)
        config.validate()
        main(part, config)
        report: dict[str, Any] = json.loads(Path(config.output).read_text())
        return report

    return run


def assert_times(entry: dict[str, Any], images: int) -> None:
    low, _, high = (1000 * second / images for second in sorted(entry["seconds"]))
    assert entry["ms_per_image"] == pytest.approx(1000 * sorted(entry["seconds"])[1] / images)
    assert entry["ms_per_image_iqr"] == pytest.approx((high - low) / 2)  # of three numbers
    assert low > 0


def cells(printed: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("|")]


def test_memory_measures_every_way_in_its_own_process(measure: Measure, capfd: pytest.CaptureFixture[str]) -> None:
    report = measure("memory", contrastive_batch_sizes=[4, 8], micro_batch_sizes=[2, 4])
    entries = report["results"]
    assert [(e["images"], e["micro_batch"], e["gradient_checkpointing"]) for e in entries] == [
        *((4, 4, False), (4, 4, True), (4, 2, False)),
        *((8, 8, False), (8, 8, True), (8, 2, False), (8, 4, False)),
    ]
    for entry in entries:
        plain = next(e for e in entries if e["images"] == entry["images"])
        assert entry["time_ratio"] == entry["ms_per_image"] / plain["ms_per_image"]
        assert entry["memory_ratio"] == entry["peak_memory_mib"] / plain["peak_memory_mib"]
        assert entry["peak_memory_mib"] > 0  # would be 0 if the process had taken over the peak of this one
        assert_times(entry, entry["images"])
    assert report["part"] == "memory"
    assert report["device"] == "cpu"
    assert report["settings"]["hidden_size"] == TINY["hidden_size"]
    assert {"command", "threads", "hardware", "versions"} <= report.keys()
    table = cells(capfd.readouterr().out)
    assert [row[:2] for row in table[2:]] == [[str(e["images"]), e["name"]] for e in entries]
    assert [row[2] for row in table[2:]] == [f"{e['time_ratio']:.2f}" for e in entries]


def test_memory_follows_what_is_held_at_once() -> None:
    model = MiclConfig(
        **{"image_size": 64, "patch_size": 4, "hidden_size": 64, "intermediate_size": 256, "mask_ratio": 0.0},
        **{"num_hidden_layers": 8, "num_attention_heads": 4},
    )
    ways = [Way(16, 16), Way(16, 16, gradient_checkpointing=True), Way(16, 1)]
    builds = [partial(way_step, "no", model, way) for way in ways]
    plain, *less = (peak or 0 for peak in peak_memories(torch.device("cpu"), builds))
    assert 2 * max(less) < plain  # a third in truth; nearly all of it if malloc kept what is freed


def test_what_does_not_fit_is_left_out_of_the_times(
    measure: Measure, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        batch_cost, "peak_memories", lambda _, builds: [None if b.args[2].name == "plain" else 3 << 20 for b in builds]
    )
    entries = measure("memory", contrastive_batch_sizes=[4], micro_batch_sizes=[2])["results"]
    assert [entry["peak_memory_mib"] for entry in entries] == [None, 3, 3]
    assert [entry["ms_per_image"] is None for entry in entries] == [True, False, False]
    assert all(entry["time_ratio"] is None and entry["memory_ratio"] is None for entry in entries)
    assert cells(capsys.readouterr().out)[2] == ["4", "plain", "–", "–", "–", "–", "–"]


def end_at_once(*_: Any) -> None:
    os._exit(9)


def test_a_process_that_is_ended_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_cost, "_peak_of_process", end_at_once)
    with pytest.raises(RuntimeError, match="fewer images at once"):
        peak_memories(torch.device("cpu"), [partial(way_step, "no", MiclConfig(), Way(2, 2))])


def test_growth_measures_the_step_and_the_loss_in_it(measure: Measure) -> None:
    entries = measure("growth", contrastive_batch_sizes=[16, 4, 8], micro_batch_sizes=[8])["results"]
    assert [(entry["images"], entry["micro_batch"]) for entry in entries] == [(4, 4), (8, 8), (16, 8)]
    for entry in entries:
        assert entry["time_ratio"] == entry["ms_per_image"] / entries[0]["ms_per_image"]
        assert entry["loss_share"] == entry["loss_alone"]["ms_per_image"] / entry["ms_per_image"]
        assert_times(entry, entry["images"])
        assert_times(entry["loss_alone"], entry["images"])


def test_views_have_the_same_number_of_patches(measure: Measure) -> None:
    entries = measure("views", contrastive_batch_sizes=[4, 6], num_views=[2, 3, 8])["results"]
    assert [(entry["images"], entry["num_views"]) for entry in entries] == [
        (images, views) for images in (4, 6) for views in (2, 3, 8)
    ]
    for entry in entries:
        first = next(e for e in entries if e["images"] == entry["images"])
        assert entry["patches_per_view"] == 8
        assert entry["time_ratio"] == entry["ms_per_image"] / first["ms_per_image"]
        assert entry["views_ratio"] == entry["num_views"] / 2
        assert_times(entry, entry["images"])


def test_resume_measures_every_place_in_data_of_that_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []
    first_batch = resume_cost.time_to_first_batch

    def time_to_first_batch(source: ImageSource, config: ResumeSettings, epochs: float) -> float:
        assert (source.num_images, len(source.lengths), source.row_groups) == (
            500,
            3,
            [[100, 66], [100, 67], [100, 67]],
        )
        asked.append(epochs)
        return first_batch(source, config, epochs)

    monkeypatch.setattr(resume_cost, "time_to_first_batch", time_to_first_batch)
    output = tmp_path / "new" / "numbers.json"
    config = ResumeSettings(images=500, shards=3, global_batch_size=50, places=[0, 7.5], output=str(output))
    config.validate()
    main("resume", config)
    entries = json.loads(output.read_text())["results"]
    assert asked == [0, 0, 0, 7.5, 7.5, 7.5]
    assert [entry["epochs"] for entry in entries] == [0, 7.5]
    assert all(entry["median_seconds"] == sorted(entry["seconds"])[1] > 0 for entry in entries)
    assert [row[0] for row in cells(capsys.readouterr().out)[2:]] == ["0", "7.5"]


@pytest.mark.parametrize("setting", [{"images": 4095}, {"shards": 0}, {"places": []}, {"places": [-1]}], ids=str)
def test_impossible_places_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        ResumeSettings(**setting).validate()


@pytest.mark.parametrize(("image_size", "patch_size"), [(224, 16), (224, 14), (96, 8), (40, 4)])
@pytest.mark.parametrize("mask_ratio", [0.6, 0.75, 0.8, 0.9])
def test_rounding_takes_no_patch_away(image_size: int, patch_size: int, mask_ratio: float) -> None:
    settings = ViewsSettings(image_size=image_size, patch_size=patch_size, mask_ratio=mask_ratio)
    expected = int(settings.model_config().num_patches * (1 - mask_ratio)) // 2
    for views in (2, 3, 4):
        model = settings.with_views(views)
        assert model.num_views == views
        assert sample_views(1, model.num_patches, model.mask_ratio, views).shape == (1, views, expected)


@pytest.mark.parametrize("way", [Way(6, 6), Way(6, 6, gradient_checkpointing=True), Way(6, 2)])
def test_a_step_is_one_of_training(
    way: Way, tiny_config: Callable[..., MiclConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = Learner(Accelerator(cpu=True), tiny_config(), most_images=8)
    seen: list[tuple[int, bool, bool]] = []
    learner.unwrapped.vit.register_forward_hook(
        lambda module, given, _: seen.append(
            (len(given[0]), torch.is_grad_enabled(), module.layers[0].gradient_checkpointing)
        )
    )
    before = {name: p.clone() for name, p in learner.unwrapped.named_parameters() if p.requires_grad}
    learner.step(way)
    passes, checkpointing = 6 // way.micro_batch, way.gradient_checkpointing
    # The cached loss keeps the graph of its last pass; the others go through together without.
    without_graph = [(6 - way.micro_batch, False, checkpointing)] if passes > 1 else []
    assert seen == without_graph + [(way.micro_batch, True, checkpointing)] * passes
    assert all((p != before[name]).any() for name, p in learner.unwrapped.named_parameters() if name in before)
    assert all(p.grad is None for p in learner.unwrapped.parameters())


def test_ways_can_be_mixed(tiny_config: Callable[..., MiclConfig]) -> None:
    learner = Learner(Accelerator(cpu=True), tiny_config(), most_images=4)
    for checkpointing in (True, False):
        learner.step(Way(4, 4, checkpointing))
        assert learner.unwrapped.vit.layers[0].gradient_checkpointing == checkpointing


def test_numbers_of_a_table_have_their_formats() -> None:
    columns = {"batch": ("images", ""), "time": ("time_ratio", ".2f"), "compiled": ("compiled", "")}
    entries = [{"images": 4, "time_ratio": 1.006, "compiled": False}, {"images": 8, "time_ratio": None}]
    assert markdown(columns, entries).splitlines()[1:] == ["| --- | --- | --- |", "| 4 | 1.01 | no |", "| 8 | – | – |"]


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (MemorySettings, {"repetitions": 0}, "repetitions must be at least 1"),
        (
            MemorySettings,
            {"contrastive_batch_sizes": [1, 4]},
            "contrastive_batch_sizes takes different numbers from 2",
        ),
        (MemorySettings, {"contrastive_batch_sizes": [4, 4]}, "different numbers"),
        (MemorySettings, {"micro_batch_sizes": []}, "micro_batch_sizes takes different numbers from 1"),
        (MemorySettings, {"micro_batch_sizes": [24]}, "24 does not divide the 32 of"),
        (GrowthSettings, {"micro_batch_sizes": [64, 128]}, "takes one number"),
        (ViewsSettings, {"num_views": [1, 2]}, "num_views takes different numbers from 2"),
        (ViewsSettings, {"num_views": [2, 3], "mask_ratio": 0.2}, "num_views=3 of 78 patches .* the 196 patches"),
        (ViewsSettings, {"mask_ratio": 0.999}, "mask_ratio=0.999"),
    ],
)
def test_impossible_settings_are_refused(kind: type[Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**settings).validate()


@pytest.mark.parametrize("part", list(PARTS))
def test_a_part_has_its_own_settings(part: str) -> None:
    chosen, settings = parse(["--repetitions", "4", "--part", part])
    assert chosen == part
    assert type(settings) is PARTS[part].settings
    assert settings.repetitions == 4
    assert settings.output.endswith(f"/{part}.json")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "the following arguments are required: --part"),
        (["--part", "speed"], "choose from 'peers', 'step', 'loop'"),
        (["--part", "views", "--micro_batch_sizes", "8"], "--part views: unknown flag --micro_batch_sizes"),
        (["--part", "memory", "--repetitions", "0"], "--part memory: repetitions must be at least 1"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(flags)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    flags = ["--part", "growth", "--output", str(tmp_path / "growth.json"), "--micro_batch_sizes", "4"]
    flags += ["--contrastive_batch_sizes", "4", "8", "--repetitions", "1", "--hidden_size", "16"]
    flags += ["--num_attention_heads", "2", "--num_hidden_layers", "1"]
    command = [sys.executable, "-m", "training.benchmark", *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert re.search(r"^growth on cpu \(.*\): .*growth\.json$", done.stdout, re.MULTILINE)
    assert json.loads((tmp_path / "growth.json").read_text())["command"].split()[3:] == flags
