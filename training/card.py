"""The README.md of a portable model folder, filled in from what the run and its eval.json hold."""

import json
from dataclasses import asdict
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from training.run import Run


TEMPLATES = Path(__file__).resolve().parents[1] / "model_cards"


def write_card(run: Run, folder: Path) -> None:
    """Write `README.md` beside the weights.

    Args:
        run: the finished run, for its settings and its length.
        folder: portable model folder; the card's results are those of its eval.json and no others.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, keep_trailing_newline=True
    )
    card = environment.get_template("template.md").render(
        name=run.folder.name,
        run=run.config.to_dict(),
        plan=asdict(run.plan),
        progress=asdict(run.progress),
        data={"images": run.source.num_images, "fingerprint": run.source.fingerprint},
        model=run.unwrapped().config,
        **json.loads((folder / "eval.json").read_text()),
    )
    (folder / "README.md").write_text(card)
