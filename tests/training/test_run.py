"""What a run derives from its settings: plans, masks and optimiser steps."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from run_folder import course, same_weights
from safetensors.torch import load_file
from torch import Tensor

from training import loop, pretrain, processes
from training.checkpoint import newest_checkpoint
from training.config import PretrainConfig
from training.optim import learning_rate
from training.pretrain import view_noise
from training.run import make_plan


Write = Callable[..., Path]
Settings = Callable[..., PretrainConfig]
Train = Callable[..., Path]
ROOT = Path(__file__).parents[2]

# Plans


def test_a_plan_follows_from_settings_data_and_processes(settings: Settings) -> None:
    config = settings(per_device_batch_size=8, gradient_accumulation_steps=3, epochs=5, base_lr=0.1)
    plan = make_plan(config, num_images=100, processes=2)
    assert (plan.forward_images, plan.images_per_step) == (16, 48)
    assert (plan.forwards_per_epoch, plan.total_steps) == (6, 10)
    assert plan.peak_lr == pytest.approx(0.1 * 48 / 256)
    assert make_plan(settings(max_steps=4), 100, 2).total_steps == 4
    assert make_plan(settings(max_steps=4000), 100, 2).total_steps == 48


def test_a_batch_without_negatives_is_refused(write_shards: Write, settings: Settings, run_pretraining: Train) -> None:
    write_shards(20)
    with pytest.raises(ValueError, match="per_device_batch_size=1 leaves no negatives"):
        run_pretraining(settings(per_device_batch_size=1))
    assert not Path(settings().output_dir, "metrics.jsonl").exists()


def test_too_few_images_are_refused(write_shards: Write, settings: Settings, run_pretraining: Train) -> None:
    write_shards(7)
    with pytest.raises(ValueError, match="The 7 images do not fill one batch of 8 .*at most 7"):
        run_pretraining(settings())
    assert make_plan(settings(), 8, 1).total_steps == 8
    contrastive = {"per_device_batch_size": None, "contrastive_batch_size": 16}
    with pytest.raises(ValueError, match="batch of 8 on 2 processes: lower contrastive_batch_size to at most 14"):
        make_plan(settings(negatives="global", **contrastive), 15, 2)
    with pytest.raises(ValueError, match="batch of 16 on 2 processes: lower contrastive_batch_size to at most 15"):
        make_plan(settings(negatives="local", **contrastive), 31, 2)


def test_a_batch_that_cannot_be_shared_out_is_refused_before_anything_is_loaded(
    settings: Settings, run_pretraining: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Accelerator, "num_processes", 3)
    config = settings(
        dataset="no/such/folder", negatives="global", per_device_batch_size=None, contrastive_batch_size=8
    )
    with pytest.raises(ValueError, match="contrastive_batch_size=8 .* 3 processes: use 6 or 9"):
        run_pretraining(config)


def test_the_summary_says_what_follows_from_the_settings(
    write_shards: Write, settings: Settings, run_pretraining: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(45)
    contrastive = {"per_device_batch_size": None, "contrastive_batch_size": 20, "negatives": "global"}
    run_pretraining(settings(max_steps=1, gradient_accumulation_steps=2, per_device_micro_batch_size=5, **contrastive))
    printed = capsys.readouterr().out
    assert "45 images in 1 shards; the last 5 of each epoch's order are left out" in printed
    assert "20 images contrasted together (global negatives)" in printed
    assert re.search(r"images per process +20, on 1 processes, in passes of 5 \(cached loss\)", printed)
    assert re.search(r"images per optimiser step +40 = 2 × 20", printed)
    run_pretraining(settings(max_steps=1, per_device_batch_size=15, resume="none"))
    printed = capsys.readouterr().out
    assert "left out" not in printed
    assert "cached" not in printed


def test_part_of_an_epoch_is_as_many_steps_as_it_has(settings: Settings) -> None:
    for steps in (1, 13, 49, 60):  # 1 / 49 · 49 is a little less than 1
        plan = make_plan(settings(epochs=steps / 49, warmup_epochs=0), num_images=8 * 49, processes=1)
        assert (plan.forwards_per_epoch, plan.total_steps) == (49, steps)


def test_too_much_accumulation_is_refused(settings: Settings) -> None:
    with pytest.raises(ValueError, match="gradient_accumulation_steps"):
        make_plan(settings(epochs=2, gradient_accumulation_steps=9), num_images=32, processes=1)


def test_a_tracker_that_is_not_installed_is_an_error_before_anything_is_loaded(
    settings: Settings, run_pretraining: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tracker in ("nonsense", "tensorboard,nonsense"):
        with pytest.raises(ValueError, match="'nonsense'.*not installed"):
            run_pretraining(settings(dataset="no/such/folder", report_to=tracker))
    monkeypatch.setattr(processes, "get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(ValueError, match="'wandb'.*not installed"):
        run_pretraining(settings(dataset="no/such/folder", report_to="tensorboard, wandb"))


def test_fp16_without_a_gpu_is_refused(settings: Settings, run_pretraining: Train) -> None:
    with pytest.raises(ValueError, match="mixed_precision='fp16' needs a GPU"):
        run_pretraining(settings(dataset="no/such/folder", mixed_precision="fp16"))


@pytest.mark.parametrize(
    ("kind", "fsdp2", "refused"),
    [
        *((DistributedType.DEEPSPEED, False, True), (DistributedType.MEGATRON_LM, False, True)),
        *((DistributedType.FSDP, False, True), (DistributedType.FSDP, True, False)),
    ],
)
def test_what_no_checkpoint_can_be_written_from_is_refused(
    kind: DistributedType,
    fsdp2: bool,
    refused: bool,
    settings: Settings,
    run_pretraining: Train,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Accelerator, "distributed_type", kind)
    monkeypatch.setattr(Accelerator, "is_fsdp2", fsdp2)
    monkeypatch.setattr(AcceleratorState, "fsdp_plugin", SimpleNamespace(), raising=False)
    with pytest.raises(ValueError, match=f"set up for {kind.value}" if refused else "no/such/folder"):
        run_pretraining(settings(dataset="no/such/folder"))


# Randomness


def test_masks_differ_by_seed_and_by_forward_pass() -> None:
    noises = [
        view_noise(seed, forward, 12, 16, torch.device("cpu")) for seed, forward in ((0, 0), (0, 1), (1, 0), (0, 0))
    ]
    assert noises[0].shape == (12, 16)
    assert 0 <= noises[0].min() < 0.1 < 0.9 < noises[0].max() < 1
    assert torch.equal(noises[0], noises[3])
    for other in noises[1:3]:
        assert not torch.isin(other, noises[0]).any()


def test_processes_share_out_the_masks_of_the_whole_batch(
    write_shards: Write, settings: Settings, run_pretraining: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The noise that the model gets is the own rows of the global batch's."""
    write_shards(20)
    drawn: list[Tensor] = []
    original = pretrain.view_noise

    def spy(*args: Any) -> Tensor:
        drawn.append(original(*args))
        return drawn[-1]

    monkeypatch.setattr(pretrain, "view_noise", spy)
    run_pretraining(settings(max_steps=2))
    device = torch.device("cpu")
    assert [noise.shape for noise in drawn] == [(8, 16)] * 2
    assert all(torch.equal(noise, original(0, n, 8, 16, device)) for n, noise in enumerate(drawn))


def test_the_seed_decides_everything(
    write_shards: Write, settings: Settings, run_pretraining: Train, tmp_path: Path
) -> None:
    write_shards(20)
    runs = [
        run_pretraining(settings(output_dir=str(tmp_path / name), seed=seed, max_steps=3))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert course(runs[0]) == course(runs[1])
    assert same_weights(runs[0], runs[1])
    assert course(runs[0])[0] != course(runs[2])[0]


# Accumulation


def test_accumulation_steps_once_for_several_forward_passes(
    write_shards: Write, settings: Settings, run_pretraining: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(40)
    rates: list[float] = []
    original = loop.set_learning_rate

    def spy(optimizer: torch.optim.Optimizer, rate: float) -> None:
        rates.append(rate)
        original(optimizer, rate)

    monkeypatch.setattr(loop, "set_learning_rate", spy)
    run = run_pretraining(settings(epochs=4, gradient_accumulation_steps=3))
    peak = 0.02 * 24 / 256
    assert [step for step, *_ in course(run)] == list(range(1, 7))  # 4 × 5 passes, the last two make no step
    assert [epoch for _, epoch, *_ in course(run)] == [3 * n / 5 for n in range(1, 7)]
    expected = [learning_rate(3 * n / 5, peak, 1, 4) for n in range(6)]
    assert [rate for _, _, _, rate, *_ in course(run)] == pytest.approx(expected)
    assert rates == pytest.approx([rate for rate in expected for _ in range(3)])
    checkpoint, _ = newest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    optimizer = load_file(checkpoint / "optimizer.safetensors")
    assert {int(value) for name, value in optimizer.items() if name.endswith(".step")} == {6}
