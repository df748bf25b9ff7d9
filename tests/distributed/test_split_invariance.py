"""A contrastive batch has one gradient, however processes and passes through the model share it out."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from forks import run
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn import Module

from modeling_micl import MiclForPreTraining, losses
from training import pretrain
from training.batch import Batch
from training.config import PretrainConfig
from training.pretrain import Contrast, untrained_model
from training.run import Run, make_plan


IMAGES, PROCESSES = 64, 2
Result = dict[str, Any]


def settings(micro_batch: int | None, **changes: Any) -> PretrainConfig:
    small: dict[str, Any] = {
        **{"image_size": [16], "patch_size": [4], "hidden_size": 16, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "mask_ratio": 0.25, "negatives": "global", "mixed_precision": "no"},
        **{"contrastive_batch_size": IMAGES, "per_device_micro_batch_size": micro_batch},
    }
    return PretrainConfig(**(small | changes))


def own_images(run: Run) -> Batch:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (IMAGES, 16, 16, 3), generator=generator, dtype=torch.uint8)
    labels = torch.zeros(IMAGES, dtype=torch.int64)
    own = slice(run.first_place, run.last_place)
    return Batch(pixels[own], labels[own], labels[own], [])


def learn(
    micro_batch: int | None = None,
    dtype: torch.dtype = torch.float64,
    passes: int = 1,
    prepare: Callable[[Accelerator, Module], Module] = Accelerator.prepare,
    **changes: Any,
) -> Result:
    """The real task's gradient of one batch, or of the mean over several."""
    AcceleratorState._reset_state()
    GradientState._reset_state()
    config = settings(micro_batch, gradient_accumulation_steps=passes, **changes)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=passes)
    plan = make_plan(config, 1000, accelerator.num_processes)
    model = untrained_model(config).to(dtype)
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable()
    optimizer = torch.optim.SGD(model.parameters())
    run = Run(config, accelerator, mock.Mock(), plan, prepare(accelerator, model), optimizer)  # the data are made here
    original = pretrain.normalize_pixels
    with mock.patch.object(pretrain, "normalize_pixels", lambda pixels: original(pixels).to(dtype)):
        for _ in range(passes):
            with accelerator.accumulate(run.model):
                output = Contrast(run, config, None).forward_backward(own_images(run))
            run.progress.forwards += 1
    gradients = {n.removeprefix("module."): p.grad for n, p in run.model.named_parameters() if p.requires_grad}
    gradients = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in gradients.items()}
    metrics = Contrast(run, config, None).metrics(output)
    means = accelerator.reduce(torch.stack([output.loss, *metrics.values()]).double(), reduction="mean")
    logits, embeds = (accelerator.gather(getattr(output, n).contiguous()) for n in ("logits", "view_embeds"))
    return {"gradients": gradients, "means": means, "logits": logits, "view_embeds": embeds}


# Mutants


def detach(ctx: Any, grad: Tensor) -> None:
    """As `accelerator.gather` does."""


def times_processes(self: Accelerator, loss: Tensor) -> None:
    (PROCESSES * loss / self.gradient_accumulation_steps).backward()


def noise_by_rank(original: Callable[..., Tensor], seed: int, *rest: Any) -> Tensor:
    return original(seed + dist.get_rank(), *rest)


def other_views_with_graph(
    original: Callable[..., Tensor], self: MiclForPreTraining, pixels: Tensor, noise: Tensor, *rest: Any
) -> Tensor:
    return original(self, pixels, noise.flip(0) if torch.is_grad_enabled() else noise, *rest)


def sampling(self: MiclForPreTraining, *arguments: Any) -> Tensor:
    return other_views_with_graph(SAMPLE_VIEWS, self, *arguments)


SAMPLE_VIEWS, VIEW_NOISE = MiclForPreTraining.sample_views, pretrain.view_noise
BROKEN: dict[str, tuple[Any, str, Any]] = {
    "detached gather": (losses._GatherEmbeddings, "backward", staticmethod(detach)),
    "loss times processes": (Accelerator, "backward", times_processes),
    "masks by rank": (pretrain, "view_noise", partial(noise_by_rank, VIEW_NOISE)),
    "other views with graph": (MiclForPreTraining, "sample_views", sampling),
    "no synchronisation at the end": (Accelerator, "sync_gradients", False),
}
# Costs time only: what was averaged already is the same on all processes, and stays so when it is averaged again.
HARMLESS: dict[str, tuple[Any, str, Any]] = {
    "synchronisation after every pass": (Accelerator, "no_sync", lambda *_: nullcontext())
}


def learn_broken(name: str, micro_batch: int | None) -> Result:
    target, attribute, replacement = (BROKEN | HARMLESS)[name]
    with mock.patch.object(target, attribute, replacement):
        return learn(micro_batch)


# Fully sharded


@contextmanager
def no_sync(self: Accelerator, model: Any) -> Iterator[None]:
    """Accelerate's for FSDP2, which it does not offer on the CPU."""
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def shard(accelerator: Accelerator, model: Any) -> Module:
    for layer in model.vit.layers:
        fully_shard(layer)
    return fully_shard(model)


def learn_sharded(**changes: Any) -> Result:
    with mock.patch.object(Accelerator, "no_sync", no_sync):
        return learn(prepare=shard, **changes)


FP32 = {"dtype": torch.float32}
ALONE: dict[str, Callable[[], Result]] = {
    "1 × 64": learn,
    "1 × 8 cached": partial(learn, 8),
    "1 × 1 cached": partial(learn, 1),
    "1 × 64, fp32": partial(learn, **FP32),
    "1 × 8 cached, fp32": partial(learn, 8, **FP32),
    "1 × 64, three views": partial(learn, num_views=3),
    "1 × 8 cached, three views": partial(learn, 8, num_views=3),
    "1 × 64, two batches": partial(learn, passes=2),
    "1 × 8 cached, two batches": partial(learn, 8, passes=2),
}
TOGETHER: dict[str, Callable[[], Result]] = {
    "2 × 32": learn,
    "2 × 4 cached": partial(learn, 4),
    "2 × 4 cached, checkpointed": partial(learn, 4, gradient_checkpointing=True),
    "2 × 4 cached, sharded": partial(learn_sharded, micro_batch=4),
    "2 × 32, fp32": partial(learn, **FP32),
    "2 × 4 cached, fp32": partial(learn, 4, **FP32),
    "2 × 32, three views": partial(learn, num_views=3),
    "2 × 4 cached, three views": partial(learn, 4, num_views=3),
    "2 × 4 cached, two batches": partial(learn, 4, passes=2),
    "2 × 4 cached, sharded, two batches": partial(learn_sharded, micro_batch=4, passes=2),
    **{name: partial(learn_broken, name, 4) for name in BROKEN | HARMLESS},
}
# The mutants that the plain loss can have, too
TOGETHER |= {f"{name}, plain": partial(learn_broken, name, None) for name in list(BROKEN)[:3]}


def run_all_cases(folder: Path) -> None:
    """What each of the processes does."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    torch.save({name: case() for name, case in TOGETHER.items()}, folder / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Result]]:
    """What every process got in every case; one that is alone is its own."""
    folder = tmp_path_factory.mktemp("processes")
    done = run(partial(run_all_cases, folder), folder, PROCESSES)
    assert done.status == 0, done.complaints[-5000:]
    by_rank = [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]
    AcceleratorState._reset_state(reset_partial_state=True)
    alone = {name: [case()] for name, case in ALONE.items()}
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return alone | {name: [of_rank[name] for of_rank in by_rank] for name in TOGETHER}


def gradient_error(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest error of one parameter's gradient, relative to the largest entry of all gradients."""
    assert gradients.keys() == expected.keys()
    scale = max(gradient.abs().max() for gradient in expected.values())
    return (max((gradients[name] - expected[name]).abs().max() for name in expected) / scale).item()


def variant(case: str) -> str:
    """The plain loss on one process that a case must equal."""
    name = f"1 × 64{case[case.index(', ') :] if ', ' in case else ''}"
    return name.replace(", checkpointed", "").replace(", sharded", "")


SPLITS = [name for name in ALONE | TOGETHER if "×" in name and name != variant(name)]


@pytest.mark.parametrize("case", [*SPLITS, *HARMLESS])
def test_every_split_has_the_gradient_of_the_whole_batch(case: str, results: dict[str, list[Result]]) -> None:
    (expected,) = results[variant(case) if case in SPLITS else "1 × 64"]
    tolerance = 1e-6 if "fp32" in case else 1e-12
    for result in results[case]:
        assert gradient_error(result["gradients"], expected["gradients"]) < tolerance


@pytest.mark.parametrize("case", SPLITS)
def test_every_split_measures_the_same(case: str, results: dict[str, list[Result]]) -> None:
    (expected,) = results[variant(case)]
    tolerance = 1e-5 if "fp32" in case else 1e-12
    for result in results[case]:
        torch.testing.assert_close(result["view_embeds"], expected["view_embeds"], rtol=0, atol=tolerance)
        assert result["means"][0].item() == pytest.approx(expected["means"][0].item(), abs=tolerance)
        if case.startswith("1 ×"):  # the spread of embeddings is measured on each process's own
            torch.testing.assert_close(result["means"], expected["means"], rtol=1e-4, atol=tolerance)
            torch.testing.assert_close(result["logits"], expected["logits"], rtol=0, atol=20 * tolerance)
        assert result["means"][1] == expected["means"][1]  # contrastive accuracy


@pytest.mark.parametrize("case", [name for name in TOGETHER if name.removesuffix(", plain") in BROKEN])
def test_a_mistake_in_sharing_out_is_noticed(case: str, results: dict[str, list[Result]]) -> None:
    expected = results["1 × 64"][0]["gradients"]
    assert all(gradient_error(result["gradients"], expected) > 1e-2 for result in results[case])
