"""Pictures of a search: what was asked for beside what was found."""

from dataclasses import dataclass
from pathlib import Path

from matplotlib import pyplot as plt
from torch import Tensor

from training.figures import axes_off


@dataclass
class Found:
    """A neighbour of a query.

    Attributes:
        image: (H, W, 3) in [0, 1].
        cosine: with the query.
        name: for people.
    """

    image: Tensor
    cosine: float
    name: str


def save_neighbours(path: Path, queries: list[Tensor], names: list[str], found: list[list[Found]]) -> None:
    """A row for each query: as the model saw it, then its neighbours, the nearest first.

    Args:
        path: PNG to write.
        queries: (H, W, 3) in [0, 1].
        names: of the queries.
        found: their neighbours, equally many.
    """
    columns = 1 + len(found[0])
    size = (1.7 * columns, 2.05 * len(queries))
    figure, axes = plt.subplots(len(queries), columns, figsize=size, squeeze=False)
    for row, query, name, neighbours in zip(axes, queries, names, found, strict=True):
        row[0].imshow(query.numpy())
        row[0].set_title(f"query\n{shortened(name)}", fontsize=8, fontweight="bold")
        for axis, each in zip(row[1:], neighbours, strict=True):
            axis.imshow(each.image.numpy())
            axis.set_title(f"cosine {each.cosine:.3f}\n{shortened(each.name)}", fontsize=8)
        axes_off(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def shortened(name: str, length: int = 26) -> str:
    """The beginning of a name that would not fit over a picture; dollars are no formulas."""
    return (name if len(name) <= length else f"{name[: length - 1]}…").replace("$", r"\$")
