"""The vote of nearest neighbours, against loops and numbers by hand, and fitted linear probes."""

import math
import random
from collections import defaultdict

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from training import judge
from training.judge import fit_probe, knn_accuracy


# Nearest neighbours


def knn_in_loops(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, k: int, t: float | None
) -> float:
    correct = 0
    for query, label in zip(test.double(), test_labels.tolist(), strict=True):
        cosines = (train.double() @ query / (query.norm() * train.double().norm(dim=1))).tolist()
        votes: dict[int, float] = defaultdict(float)
        for i in sorted(range(len(cosines)), key=lambda i: -cosines[i])[:k]:
            votes[int(train_labels[i])] += 1 if t is None else math.exp(cosines[i] / t)
        correct += max(sorted(votes), key=lambda c: votes[c]) == label
    return correct / len(test_labels)


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0, None])
@pytest.mark.parametrize("k", [1, 2, 5, 20, 60, 61, 1000])
def test_knn_is_what_loops_give(k: int, temperature: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    train, test = (torch.randn(n, 6, generator=generator) for n in (60, 80))
    train_labels, test_labels = (torch.randint(0, 5, (n,), generator=generator) for n in (60, 80))
    train[:, 0] += train_labels
    test[:, 0] += test_labels
    expected = knn_in_loops(train, train_labels, test, test_labels, k, temperature)
    assert 0.05 < expected < 0.95
    assert knn_accuracy(train, train_labels, test, test_labels, k, temperature) == pytest.approx(expected)
    longer = 100 * torch.rand(60, 1, generator=generator) + 1  # length does not count
    assert knn_accuracy(train * longer, train_labels, test, test_labels, k, temperature) == pytest.approx(expected)


def test_knn_by_hand() -> None:
    """One voter at cosine 0.96 for class 0 against two at 0.8 for class 1: near wins when sharp, many when not."""
    train = torch.tensor([[0.96, 0.28], [0.8, 0.6], [0.8, -0.6], [-1.0, 0.0]])
    labels, query, truth = torch.tensor([0, 1, 1, 2]), torch.tensor([[2.0, 0.0]]), torch.tensor([0])
    assert knn_accuracy(train, labels, query, truth, k=3, temperature=0.07) == 1.0  # e^(0.16 / 0.07) = 9.8 > 2
    assert knn_accuracy(train, labels, query, truth, k=3, temperature=0.5) == 0.0  # e^(0.16 / 0.5) = 1.4 < 2
    assert knn_accuracy(train, labels, query, truth, k=3, temperature=None) == 0.0
    assert knn_accuracy(train, labels, query, truth, k=1, temperature=0.5) == 1.0


@pytest.mark.parametrize("labels", [[3, 1, 2], [1, 3, 2], [2, 3, 1]])
def test_the_lowest_label_wins_a_draw(labels: list[int]) -> None:
    """Whatever the order of the voters, and also if another one is nearer."""
    train, query = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.8, 0.2]]), torch.tensor([[1.0, 0.0]])
    voted = {c: knn_accuracy(train, torch.tensor(labels), query, torch.tensor([c]), 3, None) for c in (1, 2, 3)}
    assert voted == {1: 1.0, 2: 0.0, 3: 0.0}


def test_fewer_voters_than_asked_for_all_vote() -> None:
    train, labels = torch.eye(3), torch.tensor([0, 1, 2])
    assert knn_accuracy(train, labels, torch.eye(3), labels, k=20) == 1.0


def test_knn_goes_through_many_queries() -> None:
    test_labels = torch.arange(2500) % 3
    assert knn_accuracy(torch.eye(3), torch.arange(3), torch.eye(3)[test_labels], test_labels, k=1) == 1.0
    half_wrong = torch.where(torch.arange(2500) < 1250, test_labels, 7)  # a class that nobody votes for
    assert knn_accuracy(torch.eye(3), torch.arange(3), torch.eye(3)[test_labels], half_wrong, k=1) == 0.5


# Linear probes


def toy(images: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features of six dimensions, of which the first three tell three classes apart, nearly always."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (images,), generator=generator)
    features = 0.5 * torch.randn(images, 6, generator=generator)
    features[torch.arange(images), labels] += 3
    return features, labels


def accuracy(scores: Tensor, labels: Tensor) -> float:
    return float((scores.argmax(dim=1) == labels).float().mean())


def test_a_probe_learns_what_can_be_told_apart() -> None:
    features, labels = toy(300, seed=1)
    probe = fit_probe(*toy(300, seed=0), num_classes=3)
    assert (probe.weight.shape, probe.bias.shape) == ((3, 6), (3,))
    assert accuracy(probe.scores(features), labels) > 0.97
    assert probe.held_out_accuracy > 0.9
    mixed_up = labels[torch.randperm(300, generator=torch.Generator().manual_seed(2))]
    assert accuracy(fit_probe(features, mixed_up, 3).scores(features), labels) < 0.7


def test_a_probe_takes_features_as_they_are_whatever_their_scales_and_offsets() -> None:
    """The statistics that training normalises by are part of the weights, so that scores do not change."""
    (train, labels), (test, _) = toy(300, seed=0), toy(50, seed=1)
    scales, offsets = 10.0 ** torch.arange(-3, 3), torch.tensor([0.0, 1.0, -5.0, 100.0, -1000.0, 3000.0])
    plain = fit_probe(train, labels, 3)
    moved = fit_probe(train * scales + offsets, labels, 3)
    torch.testing.assert_close(moved.scores(test * scales + offsets), plain.scores(test), rtol=0, atol=2e-5)
    assert plain.scores(test).abs().max() > 0.04
    torch.testing.assert_close(moved.weight * scales, plain.weight, rtol=1e-2, atol=1e-5)


def test_a_probe_trains_on_features_of_mean_0_and_variance_1() -> None:
    """Training with plain AdamW on features that are standardised by hand gives the same scores."""
    features, labels = toy(200, seed=0)
    features = 7 * features - 3
    probe = fit_probe(features, labels, 3)
    standardised = (features - features.mean(dim=0)) / features.std(dim=0)
    layer = torch.nn.Linear(6, 3)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.AdamW(layer.parameters(), weight_decay=probe.weight_decay)
    for epoch in range(judge.PROBE_EPOCHS):
        optimizer.param_groups[0]["lr"] = (
            probe.learning_rate * (1 + math.cos(math.pi * epoch / judge.PROBE_EPOCHS)) / 2
        )
        optimizer.zero_grad()
        cross_entropy(layer(standardised), labels).backward()  # all in one batch
        optimizer.step()
    torch.testing.assert_close(probe.scores(features), layer(standardised).detach(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1000.1, -33000.0])
def test_features_that_never_vary_change_nothing(constant: float) -> None:
    (train, labels), (test, _) = toy(300, seed=0), toy(50, seed=1)
    with_constants = [torch.cat([split, torch.full((len(split), 2), constant)], dim=1) for split in (train, test)]
    probe = fit_probe(with_constants[0], labels, 3)
    expected = fit_probe(train, labels, 3).scores(test)
    torch.testing.assert_close(probe.scores(with_constants[1]), expected, rtol=0, atol=1e-3)


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, list[tuple[float, float]], list[Tensor]]]:
    """Features, grid and scoring weights of every training of a probe."""
    seen: list[tuple[Tensor, list[tuple[float, float]], list[Tensor]]] = []
    train = judge._train_heads

    def spy(inputs: Tensor, labels: Tensor, classes: int, grid: list[tuple[float, float]], *rest: object) -> object:
        heads = train(inputs, labels, classes, grid, *rest)
        seen.append((inputs, grid, heads))
        return heads

    monkeypatch.setattr(judge, "_train_heads", spy)
    return seen


def test_the_choice_is_judged_on_images_that_it_was_not_trained_on(
    trainings: list[tuple[Tensor, list[tuple[float, float]], list[Tensor]]],
) -> None:
    features, labels = toy(203, seed=0)
    features = features + 0.7 * torch.randn(203, 6, generator=torch.Generator().manual_seed(9))  # some are hopeless
    probe = fit_probe(features, labels, 3)
    (rest, grid, heads), (everything, chosen, _) = trainings
    assert len(grid) == len(judge.LEARNING_RATES) * len(judge.WEIGHT_DECAYS) == len(heads)
    assert chosen == [(probe.learning_rate, probe.weight_decay)]
    assert (len(rest), len(everything)) == (183, 203)
    rows = {tuple(row): number for number, row in enumerate(everything.tolist())}
    held_out = sorted(set(range(203)) - {rows[tuple(row)] for row in rest.tolist()})
    assert len(held_out) == 20
    accuracies = [accuracy(everything[held_out] @ w.T + b, labels[held_out]) for w, b in heads]
    assert min(accuracies) < 1
    assert probe.held_out_accuracy == pytest.approx(max(accuracies))
    assert probe.held_out_accuracy == pytest.approx(accuracies[grid.index(chosen[0])])


def test_the_rate_that_does_best_on_the_held_out_part_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "LEARNING_RATES", (0.0, 1e-2, 1e-9))
    monkeypatch.setattr(judge, "WEIGHT_DECAYS", (1e6, 0.0))
    probe = fit_probe(*toy(300, seed=0), num_classes=3)
    assert (probe.learning_rate, probe.weight_decay) == (1e-2, 0.0)


def test_the_seed_decides_a_probe_and_nothing_else_does() -> None:
    features, labels = toy(100, seed=0)
    torch.manual_seed(1)
    first = fit_probe(features, labels, 3, seed=3)
    torch.manual_seed(2)
    again, other = fit_probe(features, labels, 3, seed=3), fit_probe(features, labels, 3, seed=4)
    assert torch.equal(first.weight, again.weight)
    assert torch.equal(first.bias, again.bias)
    assert first.held_out_accuracy == again.held_out_accuracy
    assert not torch.equal(first.weight, other.weight)


def test_fitting_a_probe_leaves_random_numbers_and_gradients_to_others() -> None:
    features, labels = toy(100, seed=0)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    with torch.no_grad():  # as evaluations are called
        probe = fit_probe(features, labels, 3)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert random.getstate() == before[2]
    assert not probe.weight.requires_grad
    assert not features.requires_grad


def test_a_class_without_images_is_never_preferred() -> None:
    features, labels = toy(200, seed=0)
    probe = fit_probe(features, labels, num_classes=7)
    assert probe.weight.shape == (7, 6)
    assert probe.scores(features).argmax(dim=1).max() <= 2


def test_too_few_images_are_refused() -> None:
    features, labels = toy(10, seed=0)
    with pytest.raises(ValueError, match=r"at least 10 labelled images, got 9.*--max_images"):
        fit_probe(features[:9], labels[:9], 3)
    assert fit_probe(features, labels, 3).weight.isfinite().all()
