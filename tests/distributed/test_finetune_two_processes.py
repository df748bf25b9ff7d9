"""Fine-tuning on two processes is that of one process with twice the batch, and each test image counts once."""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from forks import Done, command, run
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

from modeling_micl import MiclConfig, MiclForPreTraining
from training.results import save_model


STEPS, TEST_IMAGES, CLASSES = 9, 31, 3

pytestmark = pytest.mark.slow


def pictures(length: int) -> tuple[list[Image.Image], list[int]]:
    """Noisy pictures whose brightness is their class, but for every fifth label."""
    rng = np.random.default_rng(length)
    labels = rng.integers(0, CLASSES, length)
    pixels = rng.normal(60 + 70 * labels[:, None, None, None], 30, (length, 16, 16, 3)).clip(0, 255)
    labels[::5] = 0
    return [Image.fromarray(each) for each in pixels.astype(np.uint8)], labels.tolist()


def write_split(folder: Path, split: str, length: int) -> None:
    images, labels = pictures(length)
    stored = []
    for image in images:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        stored.append({"bytes": buffer.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=CLASSES)})
    folder.mkdir(exist_ok=True)
    datasets.Dataset.from_dict({"image": stored, "label": labels}, features=features).to_parquet(
        folder / f"{split}.parquet"
    )


@dataclass
class Finished(Done):
    """A command that has come to its end."""

    folder: Path

    def column(self, name: str) -> list[float]:
        """A metric of all entries that have it."""
        entries = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return [entry[name] for entry in entries if name in entry]

    def result(self) -> dict[str, Any]:
        """The only entry of eval.json."""
        (entry,) = json.loads((self.folder / "model" / "eval.json").read_text())["results"]
        assert isinstance(entry, dict)
        return entry


def finetune(folder: Path, processes: int) -> Finished:
    """Run the command on processes that share a batch of sixteen; images are varied, but not mixed or erased."""
    settings = {
        **{"dataset": folder / "data", "model": folder / "encoder", "output_dir": folder / str(processes)},
        **{"per_device_batch_size": 16 // processes, "epochs": 4, "warmup_epochs": 1, "base_lr": 0.02},
        **{"mixup_alpha": 0, "cutmix_alpha": 0, "erasing_probability": 0, "drop_path_rate": 0, "ema_decay": 0.9},
        **{"max_steps": STEPS, "mixed_precision": "no", "logging_steps": 1, "report_to": "none", "num_workers": 0},
    }
    done = run(command("training.finetune", **settings), folder / "home", processes)
    return Finished(**vars(done), folder=folder / str(processes))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Finished]:
    """A run of one process and one of two."""
    folder = tmp_path_factory.mktemp("runs")
    write_split(folder / "data", "train", 68)  # four batches
    write_split(folder / "data", "test", TEST_IMAGES)
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    save_model(MiclForPreTraining(MiclConfig(**size, image_size=16, patch_size=4, mask_ratio=0.5)), folder / "encoder")
    return {processes: finetune(folder, processes) for processes in (1, 2)}


@pytest.mark.parametrize("processes", [1, 2])
def test_the_command_comes_to_its_end(processes: int, runs: dict[int, Finished]) -> None:
    assert runs[processes].status == 0, runs[processes].complaints[-5000:]
    assert f"{16 // processes}, on {processes} processes" in runs[processes].printed
    assert runs[processes].printed.count("top-1 accuracy") == 1
    assert {path.name for path in runs[processes].folder.iterdir()} == {"checkpoints", "metrics.jsonl", "model"}


def test_two_processes_learn_what_one_does(runs: dict[int, Finished]) -> None:
    one, two = runs[1], runs[2]
    assert len(one.column("loss")) == STEPS
    for name in ("loss", "grad_norm"):
        assert two.column(name) == pytest.approx(one.column(name), rel=1e-4)
    assert two.column("learning_rate") == one.column("learning_rate")
    for place in ("model", f"checkpoints/step-{STEPS:06d}"):
        some, others = (load_file(run.folder / place / "model.safetensors") for run in (one, two))
        assert some.keys() == others.keys()
        # A key's bias does not change what attention gives: its gradient is rounding, which Adam blows up.
        for parameter in (name for name in some if not name.endswith("k_proj.bias")):
            torch.testing.assert_close(others[parameter], some[parameter], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("processes", [1, 2])
def test_each_test_image_counts_once(processes: int, runs: dict[int, Finished]) -> None:
    """31 of them, of which two processes cannot have equally many, against the stored classifier's answers."""
    result, model = runs[processes].result(), runs[processes].folder / "model"
    images, labels = pictures(TEST_IMAGES)
    pixels = AutoImageProcessor.from_pretrained(model)(images, return_tensors="pt")
    with torch.no_grad():
        answers = AutoModelForImageClassification.from_pretrained(model).eval()(**pixels).logits.argmax(dim=1)
    assert result["num_test_images"] == TEST_IMAGES
    assert result["value"] == pytest.approx(float((answers == torch.tensor(labels)).float().mean()))
    assert 0 < result["value"] < 1
    accuracies = runs[processes].column("top1_accuracy")
    assert len(accuracies) == 4  # before the first step, after two whole epochs and at the end
    assert all(round(31 * value) == pytest.approx(31 * value) for value in accuracies)
