"""The README.md of a portable model folder, filled in from what the run and its eval.json hold."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from training.monitor import provenance
from training.run import Run


TEMPLATES = Path(__file__).resolve().parents[1] / "model_cards"


def write_card(template: str, run: Run, folder: Path, **facts: Any) -> None:
    """Write `README.md` beside the weights.

    Args:
        template: file in `model_cards/`.
        run: the finished run, for its settings and its length.
        folder: portable model folder; the card's results are those of its eval.json and no others.
        **facts: what else the template asks for.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, keep_trailing_newline=True
    )
    card = environment.get_template(template).render(
        name=run.folder.name,
        run=run.config.to_dict(),
        plan=asdict(run.plan),
        progress=asdict(run.progress),
        data={"images": run.source.num_images, "fingerprint": run.source.fingerprint},
        model=run.unwrapped().config,
        **json.loads((folder / "eval.json").read_text()),
        **provenance(),
        **facts,
    )
    (folder / "README.md").write_text(card)
