"""Which patches each view sees: the only randomness of MiCL pre-training."""

import torch


def visible_patches_per_view(num_patches: int, mask_ratio: float, num_views: int = 2) -> int:
    """Number K of patches in one view.

    The float arithmetic is the released program's and is kept on purpose: 100 patches at a mask ratio of 0.9 give
    `int(100 * (1 - 0.9)) = 9`, not 10, hence K = 4 for two views.

    Args:
        num_patches: patches L of one image.
        mask_ratio: share of the patches that no view sees, in [0, 1).
        num_views: disjoint views V that share the visible patches.

    Raises:
        ValueError: if not even one patch would be left for each view.
    """
    patches_per_view = int(num_patches * (1 - mask_ratio)) // num_views
    if patches_per_view < 1:
        raise ValueError(
            f"mask_ratio={mask_ratio} leaves {int(num_patches * (1 - mask_ratio))} of {num_patches} patches for "
            f"num_views={num_views} views, but every view needs at least one: lower mask_ratio or num_views, or use "
            "larger images or smaller patches."
        )
    return patches_per_view


def sample_views(
    batch_size: int,
    num_patches: int,
    mask_ratio: float,
    num_views: int = 2,
    noise: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Draw disjoint random views: the patches with the smallest noise, dealt out in order of their noise.

    Args:
        batch_size: images B.
        num_patches: patches L of one image.
        mask_ratio: share of the patches that no view sees, in [0, 1).
        num_views: disjoint views V of each image.
        noise: (B, L) numbers that decide the order of the patches; drawn from U[0, 1) when absent.
        generator: source of the noise, on `device`; the device's default generator when absent.
        device: where to draw the noise.

    Returns:
        (B, V, K) int64, the patches that each view sees. K is `visible_patches_per_view(...)`.

    Raises:
        ValueError: if `noise` has another shape than (B, L), or no patch is left for a view.
    """
    patches_per_view = visible_patches_per_view(num_patches, mask_ratio, num_views)
    if noise is None:
        # Not torch.rand, which refuses symbolic sizes (torch.compile, export) when given a generator, even None.
        noise = torch.empty(batch_size, num_patches, device=device).uniform_(generator=generator)
    elif noise.shape != (batch_size, num_patches):
        raise ValueError(
            f"noise must have shape (batch_size, num_patches) = {(batch_size, num_patches)}, got {tuple(noise.shape)}."
        )
    ids_shuffle = noise.argsort(dim=1)
    return ids_shuffle[:, : num_views * patches_per_view].reshape(batch_size, num_views, patches_per_view)
