"""Random parts of images: which patches are visible when a share of them is hidden."""

import numpy as np
import torch
from torch import Tensor

from training.batch import Batch
from training.features import Views


def num_visible(num_patches: int, hidden_share: float) -> int:
    """Patches that are left, at least one."""
    return max(1, round(num_patches * (1 - hidden_share)))


def patch_order(index: Tensor, num_patches: int, seed: int) -> Tensor:
    """Random orders (n, L) of the patches of the images with the numbers `index` (n,).

    An image's order depends on its number and the seed alone. The first K patches are those that are visible, so that
    what is seen of an image when more is hidden is a part of what is seen when less is.
    """
    orders = [np.random.default_rng((seed, number)).permutation(num_patches) for number in index.tolist()]
    return torch.from_numpy(np.stack(orders))


def visible_patches(hidden_share: float, num_patches: int, seed: int) -> Views:
    """Draws the patches (n, 1, K) of a batch that are visible."""

    def views(batch: Batch) -> Tensor:
        order = patch_order(batch.index, num_patches, seed)
        return order[:, None, : num_visible(num_patches, hidden_share)].to(batch.pixels.device)

    return views
