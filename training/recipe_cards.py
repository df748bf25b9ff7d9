"""Write the card of every pre-training recipe into `model_cards/`: `python -m training.recipe_cards`.

`model_cards/NAME/eval.json` is that of a finished run of the recipe; without it the card says "not trained yet".
"""

import sys
from pathlib import Path

from training.card import TEMPLATES, render_card
from training.config import PretrainConfig
from training.parser import parse_settings
from training.results import read_evaluation


RECIPES = Path(__file__).parent / "recipes"
OTHER_PROGRAMS = ("finetune_", "linear_probe_")


def pretraining_recipes() -> list[Path]:
    """The recipes that have a card of their own."""
    return [recipe for recipe in sorted(RECIPES.glob("*.yaml")) if not recipe.stem.startswith(OTHER_PROGRAMS)]


def recipe_card(recipe: Path) -> str:
    """The card of a recipe's encoder, from the recipe and the eval.json of a finished run."""
    settings = parse_settings(PretrainConfig, "training.recipe_cards", ["--config", str(recipe)])
    evaluation = read_evaluation(TEMPLATES / recipe.stem)
    if evaluation["training"] is None:
        command = f"accelerate launch -m training.pretrain --config training/recipes/{recipe.name}"
        evaluation["training"] = {
            "program": "training.pretrain",
            "command": command,
            "settings": settings.to_dict(),
        }
    return render_card(settings.model_config(), evaluation, recipe.stem)


def main() -> None:
    """Write all cards."""
    for recipe in pretraining_recipes():
        card = TEMPLATES / recipe.stem / "README.md"
        card.parent.mkdir(exist_ok=True)
        card.write_text(recipe_card(recipe), encoding="utf-8")
        print(card)  # noqa: T201


if __name__ == "__main__":
    try:
        main()
    except (ValueError, RuntimeError) as error:
        sys.exit(f"training.recipe_cards: {error}")
