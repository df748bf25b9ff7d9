"""Draw which images a contrastive batch compares: `python -m training.batch_figure` writes recipes/batch.png."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap
from numpy.typing import NDArray


PICTURE = Path(__file__).parent / "recipes" / "batch.png"
PROCESSES, PASSES, IMAGES = 2, 2, 4  # images of one pass of one process
NOT_COMPARED, NEGATIVE, POSITIVE = 0, 1, 2
COLOURS = ["#f4f4f4", "#e9a23b", "#1f4e79"]


def compared(process: bool, one_pass: bool) -> NDArray[np.int64]:
    """What each image's view 1 (row) is to each image's view 2 (column).

    Args:
        process: only images of the same process are compared.
        one_pass: only images of the same pass are compared.
    """
    image = np.arange(PROCESSES * PASSES * IMAGES)
    of_process, of_pass = image // (PASSES * IMAGES), image // IMAGES % PASSES
    apart = np.zeros((len(image), len(image)), dtype=bool)
    for label, matters in ((of_process, process), (of_pass, one_pass)):
        apart |= matters & (label[:, None] != label)
    return np.where(np.eye(len(image), dtype=bool), POSITIVE, np.where(apart, NOT_COMPARED, NEGATIVE))


def main() -> None:
    """Draw the four ways to bring the same sixteen images into one optimiser step."""
    ways = {
        "local negatives,\naccumulation over 2 passes": compared(process=True, one_pass=True),
        "global negatives,\naccumulation over 2 passes": compared(process=False, one_pass=True),
        "local negatives,\ncached loss": compared(process=True, one_pass=False),
        "global negatives,\ncached loss": compared(process=False, one_pass=False),
    }
    figure, axes = plt.subplots(1, len(ways), figsize=(12, 3.9))
    middle = (np.arange(PROCESSES * PASSES) + 0.5) * IMAGES - 0.5
    names = [f"process {p + 1}\npass {n + 1}" for p in range(PROCESSES) for n in range(PASSES)]
    for axis, (title, matrix) in zip(axes, ways.items(), strict=True):
        axis.imshow(matrix, cmap=ListedColormap(COLOURS), vmin=0, vmax=2)
        axis.set_title(f"{title}\n{(matrix[0] == NEGATIVE).sum()} negatives for each view", fontsize=10)
        axis.set_xticks(middle, names, fontsize=6)
        axis.set_yticks(middle, names if axis is axes[0] else [""] * len(names), fontsize=6)
        for border in np.arange(IMAGES, len(matrix), IMAGES) - 0.5:
            axis.axvline(border, color="white", linewidth=1.5)
            axis.axhline(border, color="white", linewidth=1.5)
    axes[0].set_ylabel("view 1 of image")
    figure.supxlabel("view 2 of image: the own one (blue), negatives (orange), not compared (grey)", fontsize=10)
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=110)
    print(PICTURE)  # noqa: T201


if __name__ == "__main__":
    main()
