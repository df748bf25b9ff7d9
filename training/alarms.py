"""What watches over the entries of a run's log, and warns."""

import math
from collections import deque
from collections.abc import Callable
from statistics import median


# Looks at each logged entry and returns a warning, or None.
Alarm = Callable[[int, dict[str, float]], str | None]


class CollapseAlarm:
    """Warns when the loss stays at ln(contrasted images), the value of guessing.

    Args:
        contrasted_images: images among which a view must find its own.
        patience: logged steps in a row, after `first_step`, that count as staying there.
        first_step: optimiser steps during which a high loss is normal.
    """

    def __init__(self, contrasted_images: int, patience: int = 5, first_step: int = 200) -> None:
        self.guessing = math.log(contrasted_images)
        self.first_step = first_step
        self.recent: deque[bool] = deque(maxlen=patience)

    def check(self, step: int, metrics: dict[str, float]) -> str | None:
        """A warning with the likely cause, or None."""
        self.recent.append(step >= self.first_step and metrics["loss"] > 0.98 * self.guessing)
        if len(self.recent) < (self.recent.maxlen or 0) or not all(self.recent):
            return None
        self.recent.clear()
        text = (
            f"The loss {metrics['loss']:.3f} sits at ln(contrasted images) = {self.guessing:.3f}: nothing is learned. "
        )
        if metrics.get("negative_cosine", 0) > 0.98:  # not in an entry before a failure
            return text + (
                f"All embeddings point the same way (mean cosine of negatives {metrics['negative_cosine']:.3f}). "
                "If what two views share does not tell their image from others, as with strokes on an empty ground, "
                "no mask ratio, patch size, temperature or learning rate has helped "
                "(training/recipes/studies/RESULTS.md): MiCL wants natural images. If yours are, lower mask_ratio or "
                "base_lr, or take a longer warm-up."
            )
        return text + "Likely the views are too small or too alike between images: lower mask_ratio or temperature."


class SpikeAlarm:
    """Warns when the loss jumps up.

    Args:
        factor: of the median of the recent entries above which a loss is a spike.
        entries: logged losses to compare with; there is no warning before there are so many.
    """

    def __init__(self, factor: float = 2.0, entries: int = 10) -> None:
        self.factor = factor
        self.recent: deque[float] = deque(maxlen=entries)

    def check(self, step: int, metrics: dict[str, float]) -> str | None:
        """A warning at the first entry of a spike, or None."""
        loss, usual = metrics["loss"], median(self.recent) if self.recent else math.nan
        known, before = len(self.recent) == self.recent.maxlen, self.recent[-1] if self.recent else math.nan
        if math.isfinite(loss):
            self.recent.append(loss)
        if not known or not loss > self.factor * usual or before > self.factor * usual:
            return None
        return (
            f"The loss {loss:.3f} at step {step} is more than {self.factor:g} times the {usual:.3f} of the last "
            f"{len(self.recent)} entries. If it does not come down again, go on from an earlier checkpoint with a "
            "lower base_lr or max_grad_norm=1."
        )


class InputAlarm:
    """Warns when training waits for images, once until it has no longer done so for a while.

    Args:
        num_workers: decoding processes of each process.
        free_cores: cores of this machine that the run does not use.
        share: of the time, from which on it is too much.
        patience: logged entries in a row above it, or below it, that count.
    """

    def __init__(self, num_workers: int, free_cores: int, share: float = 0.2, patience: int = 5) -> None:
        self.num_workers, self.free_cores, self.share = num_workers, free_cores, share
        self.recent: deque[bool] = deque(maxlen=patience)
        self.warned = False

    def check(self, step: int, metrics: dict[str, float]) -> str | None:
        """A warning with the remedies in their order, or None."""
        self.recent.append(metrics["data_wait"] > self.share)
        if self.warned:
            self.warned = any(self.recent)
            return None
        if len(self.recent) < (self.recent.maxlen or 0) or not all(self.recent):
            return None
        self.warned = True
        first = "All cores are in use: "
        if self.free_cores > 0:
            first = f"Raise num_workers={self.num_workers} (cores without a process: {self.free_cores}); or "
        return (
            f"Training waits for images {metrics['data_wait']:.0%} of the time (data_wait), and more than "
            f"{self.share:.0%} in {len(self.recent)} entries in a row. {first}make smaller images once with `python "
            "-m training.prepare`; or, in pre-training, take more from each decoded image with num_views=4 or "
            "views_per_decode=2."
        )
