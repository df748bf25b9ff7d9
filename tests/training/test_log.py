"""What a run measures and how it is logged."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from modeling_micl import MiclConfig, MiclForPreTrainingOutput, micl_loss
from training.log import CollapseAlarm, MetricsLog, SpikeAlarm, read_metrics
from training.monitor import batch_metrics, effective_rank, gigaflop_per_image, provenance


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


def alarm_of(losses: list[float], cosine: float = 0.5, first_step: int = 0) -> list[str]:
    """Warnings for these losses of 64 contrasted images, logged every ten steps."""
    alarm = CollapseAlarm(contrasted_images=64, patience=5, first_step=first_step)
    found = (alarm.check(10 * n, {"loss": loss, "negative_cosine": cosine}) for n, loss in enumerate(losses))
    return [warning for warning in found if warning]


GUESSING = math.log(64)


def test_the_alarm_sounds_after_a_loss_that_stays_at_guessing() -> None:
    assert alarm_of([GUESSING] * 4) == []
    assert len(alarm_of([GUESSING] * 5)) == 1
    assert len(alarm_of([0.985 * GUESSING] * 5)) == 1
    assert alarm_of([0.97 * GUESSING] * 50) == []
    assert "ln(contrasted images) = 4.159" in alarm_of([GUESSING] * 5)[0]


def test_the_alarm_starts_over_after_a_lower_loss_and_after_sounding() -> None:
    assert alarm_of(([GUESSING] * 4 + [1.0]) * 10) == []
    assert len(alarm_of([GUESSING] * 14)) == 2


def test_the_alarm_is_silent_at_the_beginning() -> None:
    assert alarm_of([GUESSING] * 24, first_step=200) == []
    assert len(alarm_of([GUESSING] * 25, first_step=200)) == 1


def test_the_alarm_tells_collapse_from_a_stall() -> None:
    collapsed, stalled = alarm_of([GUESSING] * 5, cosine=0.999)[0], alarm_of([GUESSING] * 5, cosine=0.4)[0]
    assert "point the same way" in collapsed
    assert "natural images" in collapsed
    assert "point the same way" not in stalled
    for warning in (collapsed, stalled):
        assert "lower mask_ratio" in warning


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
    ("size", "patch", "mask_ratio", "gigaflop"),
    [
        ((768, 12, 12), 16, 0.9, 10.2),
        ((768, 12, 12), 16, 0.8, 20.4),
        ((1024, 24, 16), 16, 0.9, 36.3),
        ((1024, 24, 16), 16, 0.8, 72.6),
        ((1280, 32, 16), 14, 0.9, 98.3),
        ((1280, 32, 16), 14, 0.8, 196.6),
    ],
)
def test_the_arithmetic_of_a_step_is_the_known_one(
    size: tuple[int, int, int], patch: int, mask_ratio: float, gigaflop: float
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
    assert gigaflop_per_image(config) == pytest.approx(gigaflop, rel=0.01)


def test_numbers_come_with_hardware_and_versions() -> None:
    found = json.loads(json.dumps(provenance()))
    assert found["hardware"]["cpu"]
    assert found["hardware"]["cpu_cores"] >= 1
    assert torch.__version__.startswith(found["versions"]["torch"])
    assert {"python", "transformers", "accelerate", "datasets", "modeling-micl"} <= found["versions"].keys()


def spikes_of(losses: list[float]) -> list[int]:
    """Entries that are warned of, in comparison with the four before."""
    alarm = SpikeAlarm(factor=2.0, entries=4)
    return [n for n, loss in enumerate(losses) if alarm.check(n, {"loss": loss})]


def test_a_loss_far_above_the_recent_ones_is_a_spike_and_said_once() -> None:
    assert spikes_of([4.0, 3.0, 2.0, 1.0, 5.1]) == [4]  # more than twice the median 2.5
    assert spikes_of([4.0, 3.0, 2.0, 1.0, 4.9]) == []
    assert spikes_of([1.0] * 6 + [3.0, 3.0, 1.0, 1.0, 1.0, 3.0]) == [6, 11]
    assert spikes_of([1.0] * 3 + [9.0]) == []  # too early to say
    assert spikes_of([math.nan] * 4 + [1.0] * 4 + [math.nan, 1.0, 9.0]) == [10]
