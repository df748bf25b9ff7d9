"""Protocols for frozen features: the vote of nearest neighbours, and linear probes fitted to them."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, normalize

from training.optim import learning_rate


LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
WEIGHT_DECAYS = (0.0, 0.1, 1.0)
FAST = "linear probe on frozen features; learning rate and weight decay chosen on a tenth of train"
PROBE_EPOCHS = 30
HELD_OUT = 0.1


def knn_accuracy(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    k: int = 20,
    temperature: float | None = 0.07,
) -> float:
    """Top-1 accuracy, in [0, 1], of a vote of the k nearest by cosine, weighted by exp(cosine / temperature).

    This is the protocol of DINO (arXiv 2104.14294) and, before it, of instance discrimination (arXiv 1805.01978).

    Args:
        train: (n, d) features to vote.
        train_labels: (n,) their labels.
        test: (m, d) features to classify.
        test_labels: (m,) their labels.
        k: voters; all of them if there are fewer.
        temperature: of the weights; None gives every voter the same weight, and the lowest label wins a draw.
    """
    train = normalize(train, dim=1)
    num_classes = int(train_labels.max()) + 1
    correct = 0
    for queries, labels in zip(normalize(test, dim=1).split(1024), test_labels.split(1024), strict=True):
        cosines, nearest = (queries @ train.T).topk(min(k, len(train)), dim=1)  # (n, k)
        weights = torch.ones_like(cosines) if temperature is None else (cosines / temperature).exp()
        votes = torch.zeros(len(queries), num_classes, device=queries.device)
        votes.scatter_add_(1, train_labels[nearest], weights)
        correct += int((votes.argmax(dim=1) == labels).sum())
    return correct / len(test_labels)


@dataclass
class LinearProbe:
    """A linear classifier of frozen features, and how it was chosen.

    Attributes:
        weight: (C, d), to be applied to the features as they are.
        bias: (C,).
        learning_rate: the chosen one.
        weight_decay: the chosen one.
        held_out_accuracy: top-1 accuracy in [0, 1] of that choice on the held-out part of train.
    """

    weight: Tensor
    bias: Tensor
    learning_rate: float
    weight_decay: float
    held_out_accuracy: float

    def scores(self, features: Tensor) -> Tensor:
        """(n, d) features → (n, C) logits."""
        return features @ self.weight.T + self.bias


def fit_probe(features: Tensor, labels: Tensor, num_classes: int, seed: int = 0) -> LinearProbe:
    """Fit a linear classifier to frozen features; learning rate and weight decay are chosen on a part of them.

    All pairs of `LEARNING_RATES` and `WEIGHT_DECAYS` are trained on nine tenths of the images (AdamW, cosine schedule)
    and judged on the tenth that was held out; the best is then trained on all. Test images play no part in it.

    Args:
        features: (n, d) of the train split, n ≥ 10.
        labels: (n,) their labels.
        num_classes: C.
        seed: of the held-out part and the order.

    Raises:
        ValueError: if there are fewer than ten images.
    """
    if len(labels) < 10:
        raise ValueError(f"A linear probe needs at least 10 labelled images, got {len(labels)}: raise --max_images.")
    generator = torch.Generator().manual_seed(seed)
    mean, std = features.mean(dim=0), features.std(dim=0)  # BatchNorm without affine parameters
    std = torch.where(std > 1e-6 * mean.abs(), std, 1.0)  # a feature that never varies must not become rounding / 0
    inputs = (features - mean) / std
    order = torch.randperm(len(labels), generator=generator).to(labels.device)
    held_out, rest = order.tensor_split([max(1, round(HELD_OUT * len(labels)))])
    grid = [(rate, decay) for rate in LEARNING_RATES for decay in WEIGHT_DECAYS]
    heads = _train_heads(inputs[rest], labels[rest], num_classes, grid, generator)
    accuracies = [_accuracy(linear(inputs[held_out], *head), labels[held_out]) for head in heads]
    best = max(range(len(grid)), key=accuracies.__getitem__)
    ((weight, bias),) = _train_heads(inputs, labels, num_classes, [grid[best]], generator)
    weight = weight / std
    return LinearProbe(weight, bias - weight @ mean, *grid[best], accuracies[best])


def _train_heads(
    inputs: Tensor, labels: Tensor, num_classes: int, grid: list[tuple[float, float]], generator: torch.Generator
) -> list[tuple[Tensor, Tensor]]:
    """Weight and bias for each (learning rate, weight decay), all trained on the same batches from zero."""
    device, width = inputs.device, inputs.shape[1]
    heads = [(torch.zeros(num_classes, width, device=device), torch.zeros(num_classes, device=device)) for _ in grid]
    optimizer = torch.optim.AdamW(
        [
            {"params": [tensor.requires_grad_() for tensor in head], "weight_decay": decay, "peak": rate}
            for head, (rate, decay) in zip(heads, grid, strict=True)
        ]
    )
    batch_size = max(min(256, len(labels)), len(labels) // 200)
    for epoch in range(PROBE_EPOCHS):
        batches = torch.randperm(len(labels), generator=generator).to(labels.device).split(batch_size)
        for number, batch in enumerate(batches):
            for group in optimizer.param_groups:
                done = epoch + number / len(batches)
                group["lr"] = learning_rate(done, group["peak"], warmup_epochs=0, epochs=PROBE_EPOCHS)
            with torch.enable_grad():
                losses = [cross_entropy(linear(inputs[batch], *head), labels[batch]) for head in heads]
                optimizer.zero_grad()
                torch.stack(losses).sum().backward()
            optimizer.step()
    return [(weight.detach(), bias.detach()) for weight, bias in heads]


def _accuracy(scores: Tensor, labels: Tensor) -> float:
    return float((scores.argmax(dim=1) == labels).float().mean())
