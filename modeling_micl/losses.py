"""The MiCL objective: every view must find the other views of its own image among those of a batch of images.

Shapes in the comments: B images of this process, G images of all processes that are contrasted (G = B when negatives
are local), V views, D embedding width.
"""

from itertools import permutations
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers.utils.generic import maybe_autocast


def t_sp_similarity(cosine: Tensor, kappa: float = 1 / 64) -> Tensor:
    """t-distributed spherical similarity, `(1 + s) / 2 / (1 + kappa * (1 - s))` for a cosine s.

    It maps [-1, 1] onto [0, 1], increasing; kappa > 0 makes the neighbourhood of s = 1 steeper, and kappa -> 0 leaves
    the plain `(1 + s) / 2`.

    Args:
        cosine: cosines in [-1, 1], any shape.
        kappa: concentration, > -1/2.
    """
    return 0.5 * (1 + cosine) / (1 + kappa * (1 - cosine))


class _GatherEmbeddings(torch.autograd.Function):
    """All-gather whose backward sums what every process asks of this process's rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        everyone = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, rows.contiguous())
        return torch.cat(everyone)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def micl_loss(
    view_embeds: Tensor,
    temperature: float = 0.07,
    kappa: float = 1 / 64,
    similarity: str = "t-sp",
    negatives: str = "local",
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of picking the own image, averaged over the ordered pairs of different views.

    For V = 2 this is the released objective, ½ [CE(logits) + CE(logitsᵀ)]. A batch of one image has no negatives, and
    its loss is 0. With global negatives each process computes only its own rows, so that the mean of the loss over
    the processes is the loss of the whole batch, and gradients averaged over processes (as DDP does) are its gradient.

    Args:
        view_embeds: (B, V, D), L2-normalised; every process must bring the same B.
        temperature: divides the similarities, > 0.
        kappa: concentration of the T-SP similarity, > -1/2.
        similarity: `"t-sp"` or `"cosine"`.
        negatives: `"local"` contrasts the B images of this process, as the released program does; `"global"` those of
            all processes.

    Returns:
        The loss, a scalar, and the logits: (B, G), view 0 of the own images against view 1 of all. For V > 2 they are
        (V·(V-1), B, G), one such matrix for each pair of views in the order of `itertools.permutations`.
    """
    if similarity not in ("t-sp", "cosine"):
        raise ValueError(f"similarity must be 't-sp' or 'cosine', got {similarity!r}.")
    if negatives not in ("local", "global"):
        raise ValueError(f"negatives must be 'local' or 'global', got {negatives!r}.")
    batch_size, num_views, _ = view_embeds.shape
    gather = negatives == "global" and dist.is_initialized() and dist.get_world_size() > 1
    candidates = _GatherEmbeddings.apply(view_embeds) if gather else view_embeds  # (G, V, D)
    targets = torch.arange(batch_size, device=view_embeds.device) + (dist.get_rank() * batch_size if gather else 0)

    logits, losses = [], []
    with maybe_autocast(view_embeds.device.type, enabled=False):  # the similarities decide everything
        for query_view, key_view in permutations(range(num_views), 2):
            scores = view_embeds[:, query_view] @ candidates[:, key_view].T  # (B, G) cosines
            if similarity == "t-sp":
                scores = t_sp_similarity(scores, kappa)
            logits.append(scores / temperature)
            losses.append(cross_entropy(logits[-1], targets))
    return torch.stack(losses).mean(), logits[0] if num_views == 2 else torch.stack(logits)
