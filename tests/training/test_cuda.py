"""What only a CUDA GPU can show; left out but for `python -m pytest --cuda`, which runs nothing else."""

import copy
import io
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import skimage.data
import torch
from conftest import encode
from jpegs import mixed, write
from PIL import Image
from run_folder import course

from modeling_micl import MiclForPreTraining
from training import loop
from training.batch import Batch
from training.config import PretrainConfig
from training.data import TrainingBatches, TrainingOrder, batches
from training.device_decoding import check_decoder, decode_on_device
from training.encoded import EncodedBatches
from training.images import CropAndFlip
from training.log_files import read_metrics
from training.photos import PHOTOS
from training.source import ImageSource


Write = Callable[..., Path]
Settings = Callable[..., PretrainConfig]
Train = Callable[..., Path]
Build = Callable[..., MiclForPreTraining]

pytestmark = pytest.mark.cuda
GPU = torch.device("cuda")
CONTRASTIVE: dict[str, Any] = {"per_device_batch_size": None, "contrastive_batch_size": 16}


@pytest.fixture(autouse=True)
def _on_the_gpu(no_accelerator: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU")


def losses(run: Path) -> torch.Tensor:
    return torch.tensor([loss for _, _, loss, *_ in course(run)])


# The numbers


def test_loss_and_gradients_are_those_of_the_cpu(tiny_model: Build) -> None:
    on_cpu = tiny_model(MiclForPreTraining).double().train()
    on_gpu = copy.deepcopy(on_cpu).to(GPU)
    pixels, noise = torch.randn(6, 3, 32, 32, dtype=torch.float64), torch.rand(6, 16)
    expected, found = on_cpu(pixels, noise=noise).loss, on_gpu(pixels.to(GPU), noise=noise.to(GPU)).loss
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-12, atol=0)
    expected.backward(), found.backward()
    for ours, theirs in zip(on_gpu.parameters(), on_cpu.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad.cpu(), theirs.grad, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_run_goes_the_same_way(
    mode: str, write_shards: Write, settings: Settings, run_pretraining: Train, tmp_path: Path
) -> None:
    write_shards(40)
    plain, compiled = (
        run_pretraining(settings(output_dir=str(tmp_path / name), torch_compile=name, max_steps=10))
        for name in ("no", mode)
    )
    torch.testing.assert_close(losses(compiled), losses(plain), rtol=1e-4, atol=0)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_batch_in_passes_is_the_whole_batch(
    precision: str, write_shards: Write, settings: Settings, run_pretraining: Train, tmp_path: Path
) -> None:
    write_shards(40)
    options = CONTRASTIVE | {"mixed_precision": precision, "max_steps": 10}
    whole = run_pretraining(settings(output_dir=str(tmp_path / "whole"), **options))
    parts = run_pretraining(settings(output_dir=str(tmp_path / "parts"), per_device_micro_batch_size=4, **options))
    torch.testing.assert_close(losses(parts), losses(whole), rtol=1e-4 if precision == "no" else 2e-2, atol=0)


def test_a_resumed_run_is_the_uninterrupted_one(
    write_shards: Write, settings: Settings, run_pretraining: Train, tmp_path: Path
) -> None:
    write_shards(40)
    whole = run_pretraining(settings(output_dir=str(tmp_path / "whole"), max_steps=12))
    parts = (
        settings(output_dir=str(tmp_path / "parts"), max_steps=6),
        settings(output_dir=str(tmp_path / "parts"), max_steps=12),
    )
    assert [len(course(run_pretraining(part))) for part in parts] == [6, 12]
    assert course(tmp_path / "parts") == course(whole)


def test_frozen_features_are_judged_and_the_model_is_written(
    write_shards: Write, settings: Settings, run_pretraining: Train
) -> None:
    write_shards(20)
    write_shards(10, split="test")
    run = run_pretraining(
        settings(epochs=2, mixed_precision="bf16", knn_images=20, knn_epochs=1, online_probe=True, num_workers=2),
        figures=True,
    )
    entries = [entry for entry in read_metrics(run / "metrics.jsonl") if "knn_accuracy" in entry]
    assert [entry["step"] for entry in entries] == [0, 2, 4]
    assert (run / "model" / "README.md").exists()


# The loop


@pytest.mark.parametrize(
    "options", [{}, {"num_workers": 2}, {"mixed_precision": "bf16", "max_grad_norm": 1.0}], ids=str
)
def test_no_step_waits_for_the_gpu(
    options: dict[str, Any],
    write_shards: Write,
    settings: Settings,
    run_pretraining: Train,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_shards(40)
    learn, steps = loop.learn, list[int]()

    def without_waiting(*arguments: Any, **options: Any) -> Any:
        steps.append(len(steps))
        torch.cuda.set_sync_debug_mode("error" if len(steps) > 2 else "default")  # the first prepare
        try:
            return learn(*arguments, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(loop, "learn", without_waiting)
    run_pretraining(settings(max_steps=8, logging_steps=4, **options))
    assert len(steps) == 8


def test_the_largest_micro_batch_is_found_in_the_gpus_memory(
    write_shards: Write, settings: Settings, run_pretraining: Train, capfd: pytest.CaptureFixture[str]
) -> None:
    write_shards(150)
    share = 400 * 2**20 / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(share)
    try:
        run_pretraining(
            settings(
                image_size=[256],
                hidden_size=64,
                num_hidden_layers=4,
                per_device_batch_size=None,
                contrastive_batch_size=128,
                find_micro_batch=True,
                max_steps=2,
            )
        )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    found = int(capfd.readouterr().out.split("per_device_micro_batch_size=")[1].split()[0])
    assert 1 <= found < 128


# JPEGs


def both_ways(source: ImageSource, crop: CropAndFlip, places: int, steps: int = 3) -> list[tuple[Batch, Batch]]:
    """Batches decoded by the GPU, and by workers."""
    order = TrainingOrder(source, places, seed=3, window=36)
    encoded = batches(EncodedBatches(order, crop, 0, places), 2)
    ours = [decode_on_device(batch, crop.size, GPU, source) for batch in islice(encoded, steps)]
    return list(zip(ours, islice(batches(TrainingBatches(order, crop, 0, places), 0), steps), strict=False))


def test_crops_of_photographs_are_nearly_those_of_workers(tmp_path: Path) -> None:
    check_decoder(GPU)
    folder = Path(skimage.data.__file__).parent
    photos = [Image.open(folder / name).convert("RGB") for name in PHOTOS.values()]
    source = write(tmp_path, [encode(photo, "JPEG", quality=90) for photo in photos])
    for ours, workers in both_ways(source, CropAndFlip((224, 224), min_scale=0.2, horizontal_flip=True), len(photos)):
        difference = (ours.pixels.cpu().int() - workers.pixels.int()).abs().float()
        assert ours.index.tolist() == workers.index.tolist()
        assert difference.mean() < 1.5
        assert difference.mean(dim=(1, 2, 3)).max() < 4


def test_all_kinds_of_files_come_in_order(tmp_path: Path) -> None:
    source = write(tmp_path, mixed(36))
    for ours, workers in both_ways(source, CropAndFlip((16, 24), min_scale=0.2, horizontal_flip=True), 12):
        assert ours.index.tolist() == workers.index.tolist()
        assert ours.labels.tolist() == workers.labels.tolist()
        assert (ours.pixels.cpu().int() - workers.pixels.int()).abs().float().mean() < 4


def test_a_run_decodes_on_the_gpu(
    write_shards: Write, settings: Settings, run_pretraining: Train, tmp_path: Path
) -> None:
    photo = Image.open(Path(skimage.data.__file__).parent / "astronaut.png").convert("RGB")
    buffer = io.BytesIO()
    photo.save(buffer, "JPEG", quality=90)
    write(tmp_path / "jpegs", [buffer.getvalue()] * 40)
    ours, workers = (
        run_pretraining(
            settings(dataset=str(tmp_path / "jpegs"), output_dir=str(tmp_path / str(on_gpu)), decode_on_gpu=on_gpu)
        )
        for on_gpu in (True, False)
    )
    torch.testing.assert_close(losses(ours), losses(workers), rtol=2e-2, atol=0)
