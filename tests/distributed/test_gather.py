"""Negatives from all processes: two processes must learn what one would from the whole batch."""

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from forks import run
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from modeling_micl import MiclConfig, MiclForPreTraining, losses


PROCESSES, IMAGES = 2, 3  # images of each process
Result = dict[str, Any]


def build_model(num_views: int = 2, negatives: str = "global") -> MiclForPreTraining:
    torch.manual_seed(0)
    config = MiclConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=4,
        mask_ratio=0.25,
        num_views=num_views,
        negatives=negatives,
        attn_implementation="sdpa",
    )
    return MiclForPreTraining(config).double()


def build_batch() -> tuple[Tensor, Tensor]:
    """Images and noise of all processes."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(PROCESSES * IMAGES, 3, 16, 16, generator=generator, dtype=torch.float64)
    return images, torch.rand(PROCESSES * IMAGES, 16, generator=generator)


def learn(model: torch.nn.Module, images: Tensor, noise: Tensor, factor: float = 1) -> Result:
    outputs = model(images, noise=noise)
    (factor * outputs.loss).backward()
    gradients = {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"loss": outputs.loss.detach(), "logits": outputs.logits.detach(), "gradients": gradients}


def learn_own_share(rank: int, same_masks: bool = True, factor: float = 1, **options: Any) -> Result:
    images, noise = build_batch()
    own = slice(rank * IMAGES, (rank + 1) * IMAGES)
    if not same_masks:
        noise = torch.rand(noise.shape, generator=torch.Generator().manual_seed(100 + rank))
    return learn(DistributedDataParallel(build_model(**options)), images[own], noise[own], factor)


def learn_with_backward(rank: int, backward: Callable[..., Any]) -> Result:
    with mock.patch.object(losses._GatherEmbeddings, "backward", staticmethod(backward)):
        return learn_own_share(rank)


def detach(ctx: Any, grad: Tensor) -> None:
    """As `accelerator.gather` does."""


def keep_own_rows_only(ctx: Any, grad: Tensor) -> Tensor:
    return grad.chunk(PROCESSES)[dist.get_rank()]


CASES: dict[str, Callable[[int], Result]] = {
    "global": learn_own_share,
    "three views": partial(learn_own_share, num_views=3),
    "local": partial(learn_own_share, negatives="local"),
    "detached gather": partial(learn_with_backward, backward=detach),
    "gather without the others' gradients": partial(learn_with_backward, backward=keep_own_rows_only),
    "loss times processes": partial(learn_own_share, factor=PROCESSES),
    "other masks": partial(learn_own_share, same_masks=False),
}
MUTANTS = list(CASES)[3:]


def run_all_cases(folder: Path) -> None:
    """What each of the processes does."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=600))
    rank = dist.get_rank()
    torch.save({name: case(rank) for name, case in CASES.items()}, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Result]]:
    """What every process got in every case."""
    folder = tmp_path_factory.mktemp("processes")
    done = run(partial(run_all_cases, folder), folder, PROCESSES)
    assert done.status == 0, done.complaints[-5000:]
    by_rank = [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]
    return {name: [of_rank[name] for of_rank in by_rank] for name in CASES}


def gradient_error(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest error of one parameter's gradient, relative to the largest entry of all gradients."""
    assert gradients.keys() == expected.keys()
    scale = max(gradient.abs().max() for gradient in expected.values())
    return (max((gradients[name] - expected[name]).abs().max() for name in expected) / scale).item()


@pytest.mark.parametrize(("case", "num_views"), [("global", 2), ("three views", 3)])
def test_gradients_averaged_over_processes_are_those_of_the_whole_batch(
    case: str, num_views: int, results: dict[str, list[Result]]
) -> None:
    expected = learn(build_model(num_views), *build_batch())
    for result in results[case]:
        assert gradient_error(result["gradients"], expected["gradients"]) < 1e-12
    mean_loss = sum(result["loss"] for result in results[case]) / PROCESSES
    torch.testing.assert_close(mean_loss, expected["loss"], rtol=0, atol=1e-12)


def test_every_process_compares_its_images_with_all(results: dict[str, list[Result]]) -> None:
    expected = learn(build_model(), *build_batch())["logits"]
    own_rows = [result["logits"] for result in results["global"]]
    assert [tuple(rows.shape) for rows in own_rows] == [(IMAGES, PROCESSES * IMAGES)] * PROCESSES
    torch.testing.assert_close(torch.cat(own_rows), expected, rtol=0, atol=1e-12)
    assert results["three views"][1]["logits"].shape == (6, IMAGES, PROCESSES * IMAGES)


def test_local_negatives_stay_within_a_process(results: dict[str, list[Result]]) -> None:
    images, noise = build_batch()
    for rank, result in enumerate(results["local"]):
        own = slice(rank * IMAGES, (rank + 1) * IMAGES)
        alone = learn(build_model(), images[own], noise[own])
        torch.testing.assert_close(result["logits"], alone["logits"], rtol=0, atol=1e-12)
        torch.testing.assert_close(result["loss"], alone["loss"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_gather_is_noticed(mutant: str, results: dict[str, list[Result]]) -> None:
    expected = learn(build_model(), *build_batch())["gradients"]
    assert all(gradient_error(result["gradients"], expected) > 1e-2 for result in results[mutant])
