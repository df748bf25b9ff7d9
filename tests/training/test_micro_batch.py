"""The search for the largest micro-batch that fits into memory, and what it leaves as it was."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from run_folder import course
from torch import Tensor

from modeling_micl import MiclForPreTraining
from training.config import PretrainConfig
from training.log_files import read_metrics
from training.micro_batch import find_micro_batch


Write = Callable[..., Path]
Settings = Callable[..., PretrainConfig]
Train = Callable[..., Path]
Build = Callable[..., MiclForPreTraining]
IMAGES = 12
CONTRASTIVE: dict[str, Any] = {"per_device_batch_size": None, "contrastive_batch_size": 8}

pytestmark = pytest.mark.usefixtures("no_accelerator")


def prepared(model: MiclForPreTraining) -> tuple[Accelerator, Any]:
    accelerator = Accelerator(cpu=True)
    return accelerator, accelerator.prepare(model.train())


class Memory:
    """Stands in for a device with room for so many images with and without graph, and fails as CUDA does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, images: int, without_graph: int = 100) -> None:
        self.tried: list[int] = []
        forward = MiclForPreTraining.forward

        def limited(model: MiclForPreTraining, pixel_values: Tensor, *rest: Any, **options: Any) -> Any:
            if torch.is_grad_enabled():
                self.tried.append(len(pixel_values))
            if len(pixel_values) > (images if torch.is_grad_enabled() else without_graph):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
            return forward(model, pixel_values, *rest, **options)

        monkeypatch.setattr(MiclForPreTraining, "forward", limited)


@pytest.mark.parametrize(("room", "found"), [(100, 12), (5, 4), (1, 1)])
def test_the_largest_divisor_that_fits_is_found(
    room: int, found: int, tiny_model: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Memory(monkeypatch, room)
    assert search(tiny_model(MiclForPreTraining)) == found
    larger = [size for size in (12, 6, 4, 3, 2, 1) if size > found]
    assert memory.tried == [*larger, found, found]


def test_what_goes_through_together_without_graph_must_fit_too(
    tiny_model: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    Memory(monkeypatch, images=6, without_graph=11)
    assert search(tiny_model(MiclForPreTraining)) == 2  # four times three were twelve


def search(model: MiclForPreTraining) -> int:
    accelerator, model = prepared(model)
    optimizer = torch.optim.AdamW(model.parameters())

    def embed(images: int) -> Tensor:
        return model(torch.randn(images, 3, 32, 32), return_loss=False).view_embeds

    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    try:
        return find_micro_batch(accelerator, model, optimizer, embed, IMAGES)
    finally:
        assert torch.equal(torch.get_rng_state(), random_state)
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not optimizer.state
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_search_leaves_room_for_what_the_optimizer_will_keep(
    tiny_model: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerator, model = prepared(tiny_model(MiclForPreTraining))
    optimizer = torch.optim.AdamW(model.parameters())
    weights = sum(parameter.nbytes for parameter in model.parameters())
    made: list[weakref.ref[Tensor]] = []
    held: list[int] = []
    empty_like = torch.empty_like

    def note(*arguments: Any, **options: Any) -> Tensor:
        tensor = empty_like(*arguments, **options)
        made.append(weakref.ref(tensor))
        return tensor

    def embed(images: int) -> Tensor:
        held.append(sum(tensor.nbytes for ref in made if (tensor := ref()) is not None))
        return model(torch.randn(images, 3, 32, 32), return_loss=False).view_embeds

    monkeypatch.setattr(torch, "empty_like", note)
    find_micro_batch(accelerator, model, optimizer, embed, 1)
    assert held == [2 * weights] * 3
    model(torch.randn(2, 3, 32, 32)).loss.backward()
    optimizer.step()
    model.zero_grad()
    made.clear()
    find_micro_batch(accelerator, model, optimizer, embed, 1)
    assert held[3:] == [0] * 3


def test_a_model_that_never_fits_is_an_error(tiny_model: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    Memory(monkeypatch, 0)
    with pytest.raises(ValueError, match="not even one image fits.*gradient_checkpointing"):
        search(tiny_model(MiclForPreTraining))


def test_the_search_is_refused_where_passes_wait_for_each_other(
    tiny_model: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerator, model = prepared(tiny_model(MiclForPreTraining))
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(ValueError, match="find_micro_batch does not work with FSDP: give per_device_micro_batch_size"):
        find_micro_batch(accelerator, model, torch.optim.AdamW(model.parameters()), mock.Mock(), IMAGES)


def test_other_errors_are_not_taken_for_want_of_memory(tiny_model: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MiclForPreTraining, "forward", mock.Mock(side_effect=RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        search(tiny_model(MiclForPreTraining))


def test_the_processes_agree_on_what_fits_all(tiny_model: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    gather = Accelerator.gather
    for others, expected in ((3, 3), (12, 4)):
        monkeypatch.setattr(
            Accelerator,
            "gather",
            lambda self, own, others=others: torch.cat([gather(self, own), torch.tensor([others])]),
        )
        with monkeypatch.context() as patch:
            Memory(patch, 5)
            assert search(tiny_model(MiclForPreTraining)) == expected


def test_a_run_that_searches_takes_the_same_course(
    write_shards: Write,
    settings: Settings,
    run_pretraining: Train,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_shards(20)
    given = run_pretraining(
        settings(output_dir=str(tmp_path / "given"), max_steps=3, per_device_micro_batch_size=2, **CONTRASTIVE)
    )
    Memory(monkeypatch, 3)
    found = run_pretraining(
        settings(output_dir=str(tmp_path / "found"), max_steps=3, find_micro_batch=True, **CONTRASTIVE)
    )
    assert "per_device_micro_batch_size=2 is the largest that fits" in capsys.readouterr().out
    assert course(found) == course(given)
    assert read_metrics(found / "metrics.jsonl")[0]["images_per_pass"] == 2
