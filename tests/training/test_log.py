"""What a run measures and how it is logged."""

import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import normalize
from torch.utils.flop_counter import FlopCounterMode

from modeling_micl import MiclConfig, MiclForPreTraining, MiclForPreTrainingOutput, micl_loss
from modeling_micl.configuration_micl import height_and_width
from training import monitor
from training.log_files import MetricsLog, read_metrics
from training.monitor import batch_metrics, effective_rank, gigaflop_per_image, matmul_peak, provenance


def with_singular_values(values: list[float], rows: int, width: int) -> torch.Tensor:
    """(rows, width) embeddings of mean 0 with these singular values."""
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(rows, len(values), generator=generator, dtype=torch.float64)
    left = torch.linalg.qr(left - left.mean(dim=0)).Q  # still of mean 0
    right = torch.linalg.qr(torch.randn(width, len(values), generator=generator, dtype=torch.float64)).Q
    return left @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right.T


@pytest.mark.parametrize(("rows", "width"), [(40, 8), (8, 40), (9, 9)])
@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0], [3.0, 1.0], [5.0, 1.0, 1.0, 0.5]])
def test_effective_rank_is_the_entropy_of_the_singular_values(values: list[float], rows: int, width: int) -> None:
    shares = [value / sum(values) for value in values]
    expected = math.exp(-sum(share * math.log(share) for share in shares))
    embeds = with_singular_values(values, rows, width) + 7  # the mean does not count
    assert float(effective_rank(embeds)) == pytest.approx(expected, rel=1e-4)


def test_effective_rank_of_collapsed_embeddings_is_one() -> None:
    assert float(effective_rank(torch.full((6, 4), 0.5))) == pytest.approx(1.0)


def test_effective_rank_of_scattered_embeddings_is_near_their_width() -> None:
    scattered = normalize(torch.randn(2000, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    assert 15.5 < float(effective_rank(scattered)) <= 16


def output_of(view_embeds: torch.Tensor) -> MiclForPreTrainingOutput:
    loss, logits = micl_loss(view_embeds)
    return MiclForPreTrainingOutput(loss=loss, logits=logits, view_embeds=view_embeds)


def test_negative_cosine_is_the_mean_over_views_of_different_images() -> None:
    embeds = normalize(torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(0)), dim=2)
    pairs = [float(embeds[i, 0] @ embeds[j, 1]) for i in range(5) for j in range(5) if i != j]
    assert float(batch_metrics(output_of(embeds))["negative_cosine"]) == pytest.approx(sum(pairs) / 20, abs=1e-6)


def test_contrastive_accuracy_is_the_share_of_views_that_find_their_image() -> None:
    axes = torch.eye(4)
    views = torch.stack([axes, axes[[0, 1, 3, 2]]], dim=1)  # images 2 and 3 have swapped second views
    assert float(batch_metrics(output_of(views))["contrastive_accuracy"]) == 0.5


def test_contrastive_accuracy_counts_from_the_first_own_column() -> None:
    """As on the second of two processes with global negatives: own images are in columns 2 and 3."""
    embeds = torch.eye(4)[2:].unsqueeze(1).repeat(1, 2, 1)
    output = MiclForPreTrainingOutput(logits=torch.tensor([[0, 0, 9, 0], [0, 0, 0, 9.0]]), view_embeds=embeds)
    assert float(batch_metrics(output, first_target=2)["contrastive_accuracy"]) == 1.0
    assert float(batch_metrics(output, first_target=0)["contrastive_accuracy"]) == 0.0


def test_three_views_have_metrics_too() -> None:
    metrics = batch_metrics(output_of(torch.eye(4).unsqueeze(1).repeat(1, 3, 1)))
    assert float(metrics["contrastive_accuracy"]) == 1.0
    assert float(metrics["negative_cosine"]) == 0.0


def test_a_new_log_is_empty_and_a_resumed_one_ends_at_its_step(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    log = MetricsLog(path, step=0)
    for step in (10, 20, 20, 30):
        log.write({"step": step, "loss": step / 3})
    resumed = MetricsLog(path, step=20)
    assert [entry["step"] for entry in read_metrics(path)] == [10, 20, 20]
    resumed.write({"step": 30, "loss": 0.5})
    assert read_metrics(path)[-1] == {"step": 30, "loss": 0.5}
    assert read_metrics(path)[0]["loss"] == 10 / 3
    MetricsLog(path, step=0)
    assert read_metrics(path) == []


def test_a_line_that_a_crash_cut_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = json.dumps({"step": 1, "loss": 2.5}) + "\n"
    path.write_text(whole + whole.replace("1", "2") + '{"step": 3, "lo')
    assert [entry["step"] for entry in read_metrics(path)] == [1, 2]
    MetricsLog(path, step=5).write({"step": 6})
    assert [entry["step"] for entry in read_metrics(path)] == [1, 2, 6]


def test_without_a_log_there_are_no_metrics(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize(
    ("size", "patch", "mask_ratio", "published"),
    [
        ((768, 12, 12), 16, 0.9, 10.2),
        ((768, 12, 12), 16, 0.8, 20.4),
        ((1024, 24, 16), 16, 0.9, 36.3),
        ((1024, 24, 16), 16, 0.8, 72.6),
        ((1280, 32, 16), 14, 0.9, 98.3),
        ((1280, 32, 16), 14, 0.8, 196.6),
    ],
)
def test_the_arithmetic_of_a_step_is_the_known_one_but_for_the_last_layer(
    size: tuple[int, int, int], patch: int, mask_ratio: float, published: float
) -> None:
    width, depth, heads = size
    config = MiclConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        patch_size=patch,
        mask_ratio=mask_ratio,
    )
    assert published * (depth - 1) / depth < gigaflop_per_image(config) < published * (depth - 0.7) / depth


def test_the_arithmetic_of_a_step_is_what_is_computed(tiny_model: Callable[..., MiclForPreTraining]) -> None:
    model = tiny_model(MiclForPreTraining, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(3, 3, *height_and_width(model.config.image_size))).loss.backward()
    counted = {name: sum(found.values()) for name, found in counter.get_flop_counts().items()}
    layers = [f"MiclForPreTraining.vit.layers.{number}" for number in range(model.config.num_hidden_layers)]
    assert sum(counted[name] for name in layers) == pytest.approx(3e9 * gigaflop_per_image(model.config))


def test_the_peak_is_the_best_of_several_and_draws_nothing_from_training(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0, *(10, 12), 1, *(20, 21), 2, *(30, 34), 3])  # products of 2, 1 and 4 seconds
    monkeypatch.setattr(monitor, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    monkeypatch.setattr(monitor, "PEAK_SECONDS", 3)
    before = torch.get_rng_state()
    assert matmul_peak(torch.device("cpu"), torch.float32) == 2 * 1024**3
    assert torch.equal(before, torch.get_rng_state())
    assert list(times) == []


def test_a_changed_program_is_marked_and_new_results_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=someone", "-c", "user.email=someone@example.com"]
        return subprocess.run(
            ["git", "-C", tmp_path, *who, *arguments], check=True, capture_output=True, text=True
        ).stdout

    monkeypatch.setattr(monitor, "__file__", str(tmp_path / "training" / "monitor.py"))
    (tmp_path / "training").mkdir()
    for name in ("monitor.py", "RESULTS.md", "step.json"):
        (tmp_path / "training" / name).write_text("as it was")
    assert monitor._commit.__wrapped__() is None
    git("init"), git("add", "."), git("commit", "--message=first")
    commit = git("rev-parse", "HEAD")[:12]
    (tmp_path / "training" / "RESULTS.md").write_text("found")
    (tmp_path / "training" / "step.json").write_text("found")
    (tmp_path / "training" / "new.yaml").write_text("not yet a part of it")
    assert monitor._commit.__wrapped__() == commit
    (tmp_path / "training" / "monitor.py").write_text("changed")
    assert monitor._commit.__wrapped__() == f"{commit}-dirty"


def test_numbers_come_with_hardware_and_versions() -> None:
    found = json.loads(json.dumps(provenance()))
    assert found["hardware"]["cpu"]
    assert found["hardware"]["cpu_cores"] >= 1
    assert torch.__version__.startswith(found["versions"]["torch"])
    assert {"python", "transformers", "accelerate", "datasets", "modeling-micl"} <= found["versions"].keys()
