"""The command on two processes: with global negatives it learns what one process learns from the whole batch.

In one pass, or in several with the cached loss.
"""

import io
import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from forks import Done, command, run
from PIL import Image
from safetensors.torch import load_file

from training import figures


STEPS = 26
BATCH = 32
UNEVEN = [3, 25, 0, 14, 70]  # 112 images: three batches
BROKEN = {1, 30, 41, 90}

pytestmark = pytest.mark.slow


def write_shards(folder: Path, split: str, lengths: list[int], broken: Collection[int] = ()) -> None:
    rng = np.random.default_rng(len(lengths))
    folder.mkdir(exist_ok=True)
    for number, length in enumerate(lengths):
        images = []
        for index in range(sum(lengths[:number]), sum(lengths[: number + 1])):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((16, 16)).save(buffer, "PNG")
            images.append({"bytes": b"no image" if index in broken else buffer.getvalue(), "path": None})
        columns = {"image": images, "label": rng.integers(0, 3, length)}
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=3)})
        path = folder / f"{split}-{number:05d}-of-{len(lengths):05d}.parquet"
        datasets.Dataset.from_dict(columns, features=features).to_parquet(path)


@dataclass
class Finished(Done):
    """A run that has come to its end."""

    folder: Path

    def column(self, name: str) -> list[float]:
        """A metric of all steps."""
        entries = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return [entry[name] for entry in entries if "loss" in entry]

    def online(self) -> list[dict[str, float]]:
        """What was found by the evaluations during training."""
        entries = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return [entry for entry in entries if "probe_accuracy" in entry]

    def results(self) -> dict[str, Any]:
        """The values in eval.json, by features."""
        results = json.loads((self.folder / "model" / "eval.json").read_text())["results"]
        return {result["features"]: result["value"] for result in results}


def without_figures(action: Callable[[], object]) -> None:
    """Do something in a fork, with nothing to be put back afterwards."""
    figures.save_figures = figures.save_curves = lambda *_: None
    action()


def pretrain(
    folder: Path,
    processes: int,
    negatives: str = "global",
    micro_batch: int | None = None,
    sharded: bool = False,
    steps: int = STEPS,
    batch: int | None = None,
    drawn: bool = False,
) -> Finished:
    """Train on processes that share a batch, and with FSDP the model, too; figures are drawn if asked for."""
    batch = batch or (BATCH if negatives == "global" else BATCH // processes)
    settings: dict[str, object] = {
        **{"dataset": folder.parent / "data", "output_dir": folder, "image_size": 16, "patch_size": 4},
        **{"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "mask_ratio": 0.5},
        **{"contrastive_batch_size": batch},
        **{"epochs": 17, "warmup_epochs": 1, "base_lr": 0.02},
        **{"max_steps": steps, "mixed_precision": "no", "logging_steps": 1, "report_to": "none"},
        **{"num_workers": 0, "shuffle_window": 8, "negatives": negatives, "knn_images": 50},
        **{"knn_epochs": 8, "online_probe": "true"},
        **({"per_device_micro_batch_size": micro_batch} if micro_batch else {}),
    }
    module = "tests.distributed.fsdp_on_cpu" if sharded else "training.pretrain"
    action = command(module, **settings)
    done = run(action if drawn else partial(without_figures, action), folder.parent / "home", processes)
    return Finished(**vars(done), folder=folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Finished]:
    """Runs of one process and of two, with either kind of negatives and with the cached loss."""
    folder = tmp_path_factory.mktemp("runs")
    write_shards(folder / "data", "train", UNEVEN, BROKEN)
    write_shards(folder / "data", "test", [31])
    for processes, steps in ((2, 10), (1, 17)):  # within an epoch of three batches
        pretrain(folder / "resumed", processes, steps=steps)
    return {
        "one": pretrain(folder / "one", 1, drawn=True),
        "one, cached": pretrain(folder / "one, cached", 1, micro_batch=8),
        "resumed": pretrain(folder / "resumed", 2),
        "global": pretrain(folder / "global", 2, drawn=True),
        "local": pretrain(folder / "local", 2, "local"),
        "global, cached": pretrain(folder / "global, cached", 2, micro_batch=4),
        "sharded, cached": pretrain(folder / "sharded, cached", 2, micro_batch=4, sharded=True, drawn=True),
    }


@pytest.mark.parametrize("name", ["one", "global", "local", "one, cached", "global, cached", "sharded, cached"])
def test_the_command_comes_to_its_end(name: str, runs: dict[str, Finished]) -> None:
    assert runs[name].status == 0, runs[name].complaints[-5000:]
    assert f"on {1 if name.startswith('one') else 2} processes" in runs[name].printed
    assert runs[name].printed.count("kNN accuracy on") == 1
    names = {path.name for path in runs[name].folder.iterdir()}
    drawn = {"figures"} if name in ("one", "global", "sharded, cached") else set()
    assert names == {"checkpoints", "metrics.jsonl", "skipped.jsonl", "model"} | drawn


def test_images_that_any_process_skips_are_listed_once(runs: dict[str, Finished]) -> None:
    for name in ("one", "global", "sharded, cached"):
        skipped = [json.loads(line) for line in (runs[name].folder / "skipped.jsonl").read_text().splitlines()]
        assert sorted(one["index"] for one in skipped) == sorted(BROKEN)
        assert {one["index"]: (one["shard"], one["row"]) for one in skipped}[30] == (3, 2)
        assert "skipped a broken image" in runs[name].complaints
    assert (runs["global"].folder / "skipped.jsonl").read_text() == (runs["one"].folder / "skipped.jsonl").read_text()


@pytest.mark.parametrize("name", ["global", "one, cached", "global, cached", "sharded, cached", "resumed"])
def test_however_a_batch_is_shared_out_it_learns_the_same(name: str, runs: dict[str, Finished]) -> None:
    one, several = runs["one"], runs[name]
    assert len(one.column("loss")) == STEPS
    for metric in ("loss", "grad_norm"):
        assert several.column(metric) == pytest.approx(one.column(metric), rel=1e-5)
    for metric in ("step", "epoch", "learning_rate", "contrastive_accuracy", "broken_images"):
        assert several.column(metric) == pytest.approx(one.column(metric))
    last = f"checkpoints/step-{STEPS:06d}/model.safetensors"
    some, others = load_file(one.folder / last), load_file(several.folder / last)
    assert some.keys() == others.keys()
    # A key's bias does not change what attention gives: its gradient is rounding, which Adam blows up.
    for parameter in (name for name in some if not name.endswith("k_proj.bias")):
        torch.testing.assert_close(others[parameter], some[parameter], rtol=1e-3, atol=1e-5)


def test_a_run_on_two_processes_goes_on_with_one_and_with_two_again(runs: dict[str, Finished]) -> None:
    """With the losses, as above, and no step left out or made twice."""
    assert f"resuming from {runs['resumed'].folder}/checkpoints/step-000017" in runs["resumed"].printed
    assert runs["resumed"].column("step") == list(range(1, STEPS + 1))


def test_with_local_negatives_only_as_many_processes_go_on(runs: dict[str, Finished]) -> None:
    folder = runs["local"].folder
    refused = pretrain(folder, 1, "local", steps=STEPS + 1, batch=BATCH // 2)
    assert refused.status == 1
    assert f"forward_images: {BATCH} → {BATCH // 2}). Go back to them and as many processes" in refused.complaints
    assert len(runs["local"].column("loss")) == STEPS


def test_local_negatives_learn_something_else(runs: dict[str, Finished]) -> None:
    assert runs["local"].column("step") == list(range(1, STEPS + 1))
    assert runs["local"].column("learning_rate") == runs["one"].column("learning_rate")
    assert abs(runs["local"].column("loss")[0] - runs["one"].column("loss")[0]) > 0.1


@pytest.mark.parametrize("name", ["global", "local", "sharded, cached"])
def test_two_processes_share_the_evaluation(name: str, runs: dict[str, Finished]) -> None:
    """Features that learn nothing, and those of the untrained encoder, do not depend on how many worked them out."""
    one, several = runs["one"].results(), runs[name].results()
    learned = "encoder after training"
    assert {features: one[features] for features in one.keys() - {learned}} == {
        features: several[features] for features in several.keys() - {learned}
    }
    if name == "global":
        assert several[learned] == pytest.approx(one[learned], abs=1.5 / 31)


def test_two_processes_share_the_evaluations_during_training(runs: dict[str, Finished]) -> None:
    one, several = runs["one"].online(), runs["global"].online()
    assert [entry["step"] for entry in one] == [entry["step"] for entry in several] == [0, 24]
    assert one[0] == several[0]  # before training
    assert one[1] == pytest.approx(several[1], abs=1.5 / 31)


@pytest.mark.parametrize("name", ["one", "global", "local"])
def test_a_checkpoint_has_the_same_files_however_many_wrote_it(name: str, runs: dict[str, Finished]) -> None:
    files = {path.name for path in (runs[name].folder / "checkpoints" / f"step-{STEPS:06d}").iterdir()}
    assert files == {"model.safetensors", "optimizer.safetensors", "optimizer.json", "state.json", "manifest.json"}
