"""Whether a contrastive batch can be shared out to processes and passes, and what comes nearest if it cannot."""


def share_of(images: int, processes: int, micro_batch: int | None) -> int:
    """Images of each process when all contrast theirs together.

    Args:
        images: contrasted together.
        processes: that share them.
        micro_batch: images of a process in one pass, for the proposal.

    Raises:
        ValueError: if the processes would get unequal shares.
    """
    if images % processes:
        unit = processes * (micro_batch or 1)
        below = images // unit * unit
        raise ValueError(
            f"contrastive_batch_size={images} cannot be shared out equally to {processes} processes: "
            f"use {f'{below} or ' if below else ''}{below + unit}."
        )
    return images // processes


def check_micro_batch(micro_batch: int, images: int, whole: str) -> None:
    """Raise a ValueError unless so many images are some passes of micro_batch images; `whole` names them in words."""
    if micro_batch > images:
        raise ValueError(
            f"per_device_micro_batch_size={micro_batch} is more than {whole}: use at most {images}, or leave it unset."
        )
    if images % micro_batch:
        below = max(size for size in divisors(images) if size < micro_batch)
        above = min(size for size in divisors(images) if size > micro_batch)
        raise ValueError(f"per_device_micro_batch_size={micro_batch} does not divide {whole}: use {below} or {above}.")


def check_contrasted(images: int, name: str, value: int) -> None:
    """Raise a ValueError that names the setting if there is no second image to be told from the first."""
    if images < 2:
        raise ValueError(f"{name}={value} leaves no negatives, and the loss would be 0: use at least 2.")


def divisors(images: int) -> list[int]:
    """All sizes of equal parts, from 1 up."""
    return [size for size in range(1, images + 1) if images % size == 0]
