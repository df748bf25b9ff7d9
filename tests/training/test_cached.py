"""The cached loss: the gradient of the plain one in little memory."""

import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from run_folder import course
from torch import Tensor

from modeling_micl import MiclForPreTraining, MiclForPreTrainingOutput
from training.cached import RandomState, cached_backward
from training.config import PretrainConfig
from training.log_files import read_metrics


Write = Callable[..., Path]
Settings = Callable[..., PretrainConfig]
Train = Callable[..., Path]
Build = Callable[..., MiclForPreTraining]
IMAGES, MICRO = 12, 4
CONTRASTIVE: dict[str, Any] = {"per_device_batch_size": None, "contrastive_batch_size": 8}

pytestmark = pytest.mark.usefixtures("no_accelerator")


def prepared(model: MiclForPreTraining, **options: Any) -> tuple[Accelerator, Any]:
    accelerator = Accelerator(cpu=True, **options)
    return accelerator, accelerator.prepare(model.train())


def build_batch(images: int = IMAGES) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(images, 3, 32, 32, generator=generator), torch.rand(images, 16, generator=generator)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def learn_cached(
    accelerator: Accelerator, model: Any, images: int = IMAGES, micro: int = MICRO
) -> MiclForPreTrainingOutput:
    pixels, noise = build_batch(images)

    def embed(rows: slice) -> MiclForPreTrainingOutput:
        return model(pixels[rows], noise=noise[rows], return_loss=False)

    torch.manual_seed(3)
    return cached_backward(accelerator, model, embed, images, micro)


def learn_at_once(accelerator: Accelerator, model: Any, images: int = IMAGES, micro: int = MICRO) -> Tensor:
    """The same passes with all their graphs."""
    pixels, noise = build_batch(images)
    torch.manual_seed(3)
    passes = zip(pixels.split(micro), noise.split(micro), strict=True)
    view_embeds = torch.cat([model(some, noise=rows, return_loss=False).view_embeds for some, rows in passes])
    loss, _ = model.contrast(view_embeds)
    accelerator.backward(loss)
    return loss.detach()


def assert_same(gradients: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert gradients.keys() == expected.keys()
    scale = max(gradient.abs().max() for gradient in expected.values())
    for name in expected:
        torch.testing.assert_close(gradients[name] / scale, expected[name] / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [({}, 1e-6), ({"num_views": 3}, 1e-6), ({"drop_path_rate": 0.5}, 1e-6), ({"hidden_dropout_prob": 0.3}, 1e-6)],
    ids=lambda options: next(iter(options), "plain") if isinstance(options, dict) else "",
)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_gradient_is_that_of_all_passes_at_once(
    options: dict[str, Any], tolerance: float, precision: str, checkpointing: bool, tiny_model: Build
) -> None:
    model = tiny_model(MiclForPreTraining, attn_implementation="eager", **options)
    if checkpointing:
        model.activation_checkpointing_enable()
    accelerator, model = prepared(model, mixed_precision=precision)
    loss = learn_at_once(accelerator, model)
    expected = gradients(model)
    model.zero_grad()
    output = learn_cached(accelerator, model)
    torch.testing.assert_close(output.loss, loss)
    assert_same(gradients(model), expected, 1e-2 if precision == "bf16" else tolerance)


def test_the_next_step_draws_what_it_would_have_drawn(tiny_model: Build) -> None:
    accelerator, model = prepared(tiny_model(MiclForPreTraining, hidden_dropout_prob=0.3))
    drawn = []
    for learn in (learn_at_once, learn_cached):
        learn(accelerator, model)
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_every_micro_batch_but_the_last_is_embedded_twice(
    dropout: float, checkpointing: bool, tiny_model: Build
) -> None:
    accelerator, model = prepared(tiny_model(MiclForPreTraining, hidden_dropout_prob=dropout))
    if checkpointing:
        model.activation_checkpointing_enable()
    without_graph, passes = [2] * 6 if dropout or checkpointing else [8, 4], []
    model.register_forward_pre_hook(lambda _, given: passes.append((len(given[0]), torch.is_grad_enabled())))
    learn_cached(accelerator, model, images=14, micro=2)
    assert passes == [(images, False) for images in without_graph] + [(2, True)] * 7


@pytest.mark.parametrize("options", [{"drop_path_rate": 0.5}, {"hidden_dropout_prob": 0.3}], ids=str)
def test_a_lost_random_state_is_noticed(
    options: dict[str, Any], tiny_model: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerator, model = prepared(tiny_model(MiclForPreTraining, **options))
    learn_at_once(accelerator, model)
    expected = gradients(model)
    model.zero_grad()
    monkeypatch.setattr(RandomState, "restore", lambda _: None)
    learn_cached(accelerator, model)
    with pytest.raises(AssertionError):
        assert_same(gradients(model), expected, 1e-2)


def test_loss_scaling_scales_the_gradient_and_nothing_else(tiny_model: Build) -> None:
    """As with fp16, for which accelerate makes the scaler on a GPU only."""
    accelerator, model = prepared(tiny_model(MiclForPreTraining))
    loss = learn_cached(accelerator, model).loss
    expected = gradients(model)
    model.zero_grad()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaled = learn_cached(accelerator, model).loss
    assert scaled == loss
    assert_same({name: gradient / 1024 for name, gradient in gradients(model).items()}, expected, 1e-6)


def test_the_output_has_all_images_without_graph(tiny_model: Build) -> None:
    accelerator, model = prepared(tiny_model(MiclForPreTraining))
    output = learn_cached(accelerator, model)
    pixels, noise = build_batch()
    expected = model(pixels, noise=noise)
    for name in ("loss", "logits", "view_embeds", "ids_visible"):
        torch.testing.assert_close(output[name], expected[name].detach())
        assert not output[name].requires_grad


def peak_of_graph(learn: Callable[[], Any]) -> int:
    """The most bytes that graphs have held at once for their backward passes."""
    live, peak = 0, 0

    def forget(size: int) -> None:
        nonlocal live
        live -= size

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    def pack(tensor: Tensor) -> Saved:
        nonlocal live, peak
        saved, size = Saved(tensor), tensor.nbytes
        weakref.finalize(saved, forget, size)
        live += size
        peak = max(peak, live)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        learn()
    assert live == 0
    return peak


def contrast_random(model: MiclForPreTraining, images: int) -> None:
    view_embeds = torch.randn(images, model.config.num_views, model.config.hidden_size, requires_grad=True)
    torch.autograd.grad(model.contrast(view_embeds)[0], view_embeds)


def test_memory_follows_the_passes_and_not_the_batch(tiny_model: Build) -> None:
    accelerator, model = prepared(tiny_model(MiclForPreTraining, num_hidden_layers=4))
    measured = {
        (images, micro): peak_of_graph(partial(learn_cached, accelerator, model, images, micro))
        for images, micro in ((16, 4), (32, 4), (32, 8))
    }
    of_loss = {images: peak_of_graph(partial(contrast_random, model, images)) for images in (16, 32)}
    assert measured[32, 4] - of_loss[32] == measured[16, 4] - of_loss[16]  # the one graph that is kept for the loss
    assert 1.5 * measured[32, 4] < measured[32, 8] < 2 * measured[32, 4]
    plain = peak_of_graph(partial(learn_at_once, accelerator, model, 32, 8))
    assert plain > 3.5 * measured[32, 8]


# Whole runs


def test_a_run_takes_the_same_course_with_the_cached_loss(
    write_shards: Write, settings: Settings, run_pretraining: Train, tmp_path: Path
) -> None:
    write_shards(20)
    courses = {
        micro: course(
            run_pretraining(
                settings(
                    output_dir=str(tmp_path / f"{micro}"), epochs=4, per_device_micro_batch_size=micro, **CONTRASTIVE
                )
            )
        )
        for micro in (None, 2)
    }
    assert len(courses[2]) == 8
    assert courses[2] != courses[None]  # rounding: it is another way to the same numbers
    for cached_step, step in zip(courses[2], courses[None], strict=True):
        assert cached_step == pytest.approx(step, rel=1e-3)


def test_accumulation_adds_no_negatives_to_the_cached_loss(
    write_shards: Write, settings: Settings, run_pretraining: Train, tmp_path: Path
) -> None:
    write_shards(40)
    runs = {
        micro: run_pretraining(
            settings(
                output_dir=str(tmp_path / f"{micro}"),
                epochs=2,
                gradient_accumulation_steps=2,
                per_device_micro_batch_size=micro,
                **CONTRASTIVE,
            )
        )
        for micro in (None, 2)
    }
    assert len(course(runs[2])) == 5
    for cached_step, step in zip(course(runs[2]), course(runs[None]), strict=True):
        assert cached_step == pytest.approx(step, rel=1e-3)
    facts = read_metrics(runs[2] / "metrics.jsonl")[0]
    assert (facts["global_batch_size"], facts["images_per_pass"], facts["images_per_step"]) == (8, 2, 16)


def test_how_a_batch_is_shared_out_may_change_on_resuming(
    write_shards: Write, settings: Settings, run_pretraining: Train
) -> None:
    """Eight images of one process, said in another way, and in several passes."""
    write_shards(20)
    run = run_pretraining(settings(max_steps=3))
    run_pretraining(settings(max_steps=4, **CONTRASTIVE))
    run_pretraining(settings(max_steps=5, per_device_micro_batch_size=2, **CONTRASTIVE))
    assert [step for step, *_ in course(run)] == [1, 2, 3, 4, 5]
    facts = [entry for entry in read_metrics(run / "metrics.jsonl") if "images_per_pass" in entry]
    assert [(entry["step"], entry["images_per_pass"]) for entry in facts] == [(0, 8), (3, 8), (4, 2)]
    with pytest.raises(ValueError, match="forward_images: 8 → 4, contrasted_images: 8 → 4"):
        run_pretraining(settings(max_steps=6, **(CONTRASTIVE | {"contrastive_batch_size": 4})))
