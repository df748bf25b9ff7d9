"""A checkpoint is the same whoever wrote it, and one process, two copies or two halves of a model go on alike."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from assassin import fill_disk
from forks import run
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from modeling_micl import MiclConfig, MiclForPreTraining
from training.checkpoint import CheckpointWriter, DiskFull, load_checkpoint
from training.optim import build_optimizer


KINDS = ("plain", "copies", "halves")

pytestmark = pytest.mark.slow


def build(accelerator: Accelerator, kind: str, seed: int) -> SimpleNamespace:
    """A model and its optimiser as one process has them, or as two copies or two halves."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 65}
    model = MiclForPreTraining(MiclConfig(**sizes, image_size=16, patch_size=4, mask_ratio=0.5))
    if kind == "halves":
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.vit.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    optimizer = build_optimizer(model, 0.05, (0.9, 0.95), learning_rate=1e-3 / 3)
    if kind != "halves":  # on the CPU accelerate itself does not shard
        model, optimizer = accelerator.prepare(model, optimizer)
        assert isinstance(model, DistributedDataParallel) == (kind == "copies")
    return SimpleNamespace(accelerator=accelerator, model=model, optimizer=optimizer, averaged=None)


def train(run: SimpleNamespace, step: int) -> None:
    """One step on a batch that is the same for all processes, so that their mean gradient is that of one."""
    generator = torch.Generator().manual_seed(step)
    pixels, noise = (torch.rand(size, generator=generator) for size in ((4, 3, 16, 16), (4, 16)))
    run.model(pixels, noise=noise).loss.backward()
    run.optimizer.step()
    run.optimizer.zero_grad()


def save(run: SimpleNamespace, folder: Path, *name: str) -> None:
    writer = CheckpointWriter(folder / "-".join(name), keep=1)
    writer.begin(run, 2, {}, copy=False)
    writer.finish()


def train_and_save(accelerator: Accelerator, kind: str, folder: Path) -> None:
    run = build(accelerator, kind, seed=0)
    save(run, folder, kind, "untrained")
    for step in (1, 2):
        train(run, step)
    save(run, folder, kind)


def load_and_go_on(accelerator: Accelerator, kind: str, folder: Path) -> None:
    for source in KINDS:
        run = build(accelerator, kind, seed=1)
        train(run, 9)
        load_checkpoint(run, folder / source / "step-000002")
        save(run, folder, source, kind)
        train(run, 3)
        save(run, folder, source, kind, "later")
        load_checkpoint(run, folder / f"{source}-untrained" / "step-000002")
        save(run, folder, source, kind, "untrained")


def main(folder: Path) -> None:
    """What each of the two processes does."""
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    for action in (train_and_save, load_and_go_on):
        for kind in ("copies", "halves"):
            action(accelerator, kind, folder)
            learn_of_a_full_disk(accelerator, kind, folder)


def learn_of_a_full_disk(accelerator: Accelerator, kind: str, folder: Path) -> None:
    """Only the first process writes, but none may go on as if it had."""
    run = build(accelerator, kind, seed=0)
    with pytest.MonkeyPatch.context() as patch:
        if accelerator.is_main_process:
            fill_disk(patch, "model.safetensors")
        with pytest.raises(DiskFull, match="step 2 could not be written"):
            save(run, folder, kind, "refused")
    accelerator.wait_for_everyone()  # they agree on what comes next
    assert list((folder / f"{kind}-refused").iterdir()) == []


@pytest.fixture(scope="module")
def alone() -> Iterator[Accelerator]:
    """Accelerate in this process, which forgets it afterwards; one thread, as each of the two processes has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a key's bias has rounding for a gradient, which Adam blows up
    yield Accelerator(cpu=True, mixed_precision="no")
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def folder(alone: Accelerator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints KIND, what came of each when it was loaded as another, KIND-OTHER, and later, KIND-OTHER-later."""
    folder = tmp_path_factory.mktemp("checkpoints")
    train_and_save(alone, "plain", folder)
    done = run(partial(main, folder), folder, processes=2)
    assert done.status == 0, done.complaints[-5000:]
    load_and_go_on(alone, "plain", folder)
    return folder


def stored(folder: Path, *name: str) -> tuple[dict[str, Tensor], str]:
    """All tensors of a checkpoint, and the optimiser's settings."""
    checkpoint = folder / "-".join(name) / "step-000002"
    model, optimizer = (load_file(checkpoint / f"{kind}.safetensors") for kind in ("model", "optimizer"))
    return model | optimizer, json.loads((checkpoint / "optimizer.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_all_write_the_same(kind: str, folder: Path) -> None:
    (tensors, settings), (alone, of_alone) = stored(folder, kind), stored(folder, "plain")
    assert settings == of_alone
    assert settings["param_groups"][0]["lr"] == 1e-3 / 3
    assert "vit.embeddings.position_embeddings" in tensors
    assert "vit.embeddings.position_embeddings.exp_avg" not in tensors
    assert tensors["vit.embeddings.cls_token.step"] == 2
    assert tensors.keys() == alone.keys()
    # A key's bias does not change what attention gives: its gradient is rounding, which Adam blows up.
    for name in (name for name in alone if "k_proj.bias" not in name):
        torch.testing.assert_close(tensors[name], alone[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", KINDS)
def test_what_any_wrote_comes_back_exactly_whatever_loads_it(source: str, kind: str, folder: Path) -> None:
    for state in ((), ("untrained",)):
        (tensors, settings), (loaded, loaded_settings) = (
            stored(folder, source, *state),
            stored(folder, source, kind, *state),
        )
        assert settings == loaded_settings
        assert tensors.keys() == loaded.keys()
        assert all(torch.equal(tensors[name], loaded[name]) for name in tensors)
        assert any(name.endswith("exp_avg") for name in tensors) == (state == ())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", KINDS)
def test_the_next_step_is_the_same(source: str, kind: str, folder: Path) -> None:
    tensors, _ = stored(folder, source, kind, "later")
    expected, _ = stored(folder, source, source, "later")
    before, _ = stored(folder, source)
    for name, values in tensors.items():
        torch.testing.assert_close(values, expected[name], rtol=1e-5, atol=1e-8, msg=name)
        assert name.endswith("position_embeddings") or not torch.equal(values, before[name])
