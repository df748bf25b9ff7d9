"""Small studies for the tests of several modules."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from training.study_plan import Planner, StudyPlan
from training.study_settings import StudySettings


Plan = Callable[..., tuple[Planner, StudyPlan]]
RECIPE = """
image_size: 16
patch_size: 4
hidden_size: 32
num_hidden_layers: 1
num_attention_heads: 2
mask_ratio: 0.5
temperature: 0.05
contrastive_batch_size: 8
negatives: global
epochs: 10
warmup_epochs: 2
num_workers: 0
mixed_precision: no
"""


def study(**changes: Any) -> StudySettings:
    """Settings of a study of ten steps; mappings may be given as they are."""
    values = {name: json.dumps(value) if isinstance(value, dict) else value for name, value in changes.items()}
    return StudySettings(**({"steps": 10} | values))


def small_study(folder: Path, **changes: Any) -> StudySettings:
    """A study of the images in `folder/data`, whose recipe, runs and results are in the folder, too."""
    (folder / "recipe.yaml").write_text(RECIPE)
    places = {"recipe": "recipe.yaml", "dataset": "data", "output_dir": "studies/mine", "report_dir": "results"}
    return study(**({name: str(folder / place) for name, place in places.items()} | changes))
