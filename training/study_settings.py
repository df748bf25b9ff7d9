"""What a study file holds: the settings to vary, the budget, and how runs are judged."""

import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from training.checks import Checks
from training.comparison import METHODS, ComparisonConfig
from training.config import setting
from training.parser import parse_settings


BUDGETS = ("gigaflop", "images", "steps")
# Settings, and budgets, that differ from the centre's
Changes = dict[str, Any]
# The names of the values of several factors, and what they change
Combination = tuple[dict[str, str], Changes]


@dataclass
class StudySettings(Checks):
    """One question: which settings to vary, around which recipe, at which equal budget, and how to judge."""

    question: str = setting("", "what the study asks, in a sentence")
    recipe: str = setting("training/recipes/cifar10.yaml", "recipe of pre-training that is the centre")
    dataset: str | None = setting(None, "Hub id, local folder or file; unset, that of the recipe")
    common: str = setting("{}", "settings of all runs, as a mapping; they change the centre")
    factors: str = setting(
        "{}", "settings to vary one at a time: a mapping of names to lists, or of words to settings"
    )
    grids: str = setting("{}", "settings to vary together: a mapping of names to such mappings")
    trials: str = setting("{}", "methods to compare: a mapping of each to such mappings, with equally many trials")
    gigaflop: float | None = setting(None, "equal compute: end every run after so many GFLOP of the model")
    images: float | None = setting(None, "or equal images: end every run after so many, counted each time")
    steps: float | None = setting(None, "or equal optimiser steps")
    seeds: list[int] = setting([0], "run every setting with each of these")
    final_seeds: list[int] = setting([], "then run the best setting (of each method) with these, and score on test")
    held_out: int = setting(5, "every so many-th image of train is held out, and the settings are judged on it")
    judge_images: int = setting(5000, "images of each split for kNN and the linear probe")
    labels: bool = setting(True, "whether they mean anything; if not, only losses and the views found are told")
    few_shot: list[float] = setting([], "judge the final runs with these shares of each class's labels, too")
    finetune: str = setting(
        "{}",
        "fine-tune the encoders of the final runs, and one with random weights: a mapping, settings of that program",
    )
    references: bool = setting(False, "also judge pixels, colour histograms and random weights")
    jobs: int = setting(0, "runs at a time, each with its share of the cores; 0 gives each one core")
    plan_only: bool = setting(False, "list the runs and what they cost, and stop")
    render: bool = setting(False, "run nothing, but write the page and the figures of all studies again")
    output_dir: str = setting("runs/studies/study", "folder of the runs; its name is that of the study")
    report_dir: str = setting("training/recipes/studies", "folder for results, RESULTS.md and figures")

    @property
    def name(self) -> str:
        """Of the study."""
        return Path(self.output_dir).name

    def mapping(self, name: str) -> dict[str, Any]:
        """One of the settings that are mappings."""
        try:
            found = json.loads(getattr(self, name))
        except ValueError as error:
            raise ValueError(f"{name} must be a mapping, got {getattr(self, name)!r}: {error}") from None
        if not isinstance(found, dict):
            raise ValueError(f"{name} must be a mapping, got {found!r}.")
        return found

    def dataset_name(self) -> str:
        """That of the recipe where no other is named."""
        return self.dataset or parse_settings(ComparisonConfig, "training.study", ["--config", self.recipe]).dataset

    def budget(self) -> Changes:
        """The one budget that is set."""
        return {name: getattr(self, name) for name in BUDGETS if getattr(self, name) is not None}

    def validate(self) -> None:
        """Raise a ValueError that names the first impossible setting, its value and the remedy."""
        if self.render:
            return
        if len(self.budget()) != 1:
            raise ValueError(f"A study has one budget of {', '.join(BUDGETS)}, got {self.budget() or 'none'}.")
        for name, least in (("held_out", 2), ("judge_images", 10), ("jobs", 0)):
            self._validate_at_least(least, name)
        if not self.seeds or set(self.seeds) & set(self.final_seeds):
            raise ValueError(
                f"seeds={self.seeds} choose and final_seeds={self.final_seeds} confirm: there must be some of the "
                "first, and none in both."
            )
        for name in ("common", "factors", "grids", "trials", "finetune"):
            self.mapping(name)
        self._validate_few_shot(self.few_shot)
        if (self.few_shot or self.mapping("finetune")) and not self.final_seeds:
            raise ValueError("few_shot and finetune are for the final runs: name final_seeds.")
        self.factor_points(), self.grid_points()
        self._validate_trials()

    def _validate_trials(self) -> None:
        if self.mapping("trials") and (self.mapping("factors") or self.mapping("grids")):
            raise ValueError("trials compare methods, factors and grids vary one: make two studies.")
        if self.mapping("trials") and not self.labels:
            raise ValueError("trials are chosen by their accuracies, and labels=False says that these mean nothing.")
        trials = self.trial_points()
        methods = {str(changes["method"]) for points in trials.values() for _, changes in points}
        if unknown := methods - set(METHODS):
            raise ValueError(f"trials has no method {min(unknown)!r}: choose among {', '.join(METHODS)}.")
        counts = {name: len(points) for name, points in trials.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"trials must be equally many for every method, got {counts}.")

    def factor_points(self) -> dict[str, dict[str, Changes]]:
        """For each factor: the changes to the centre, by the value's name."""
        return {name: choices(name, values) for name, values in self.mapping("factors").items()}

    def grid_points(self) -> dict[str, list[Combination]]:
        """For each grid: all combinations of its values."""
        return {name: combinations(values) for name, values in self.mapping("grids").items()}

    def trial_points(self) -> dict[str, list[Combination]]:
        """For each group of trials: all combinations of its values; `method` is one, or the name of the group."""
        return {
            name: [(words, {"method": name} | changes) for words, changes in combinations(factors)]
            for name, factors in self.mapping("trials").items()
        }


def choices(name: str, values: Any) -> dict[str, Changes]:
    """The values of a factor, by their names: settings under words of their own, or plain values of one setting."""
    if isinstance(values, dict):
        return {str(word): dict(changes) for word, changes in values.items()}
    if not isinstance(values, list):
        raise ValueError(f"{name} must have a list of values, or a mapping of words to settings, got {values!r}.")
    return {" ".join(map(str, value)) if isinstance(value, list) else str(value): {name: value} for value in values}


def combinations(factors: Any) -> list[Combination]:
    """All combinations of the values of several factors."""
    if not isinstance(factors, dict):
        raise ValueError(f"Give a mapping of settings to lists of values, got {factors!r}.")
    found = []
    for chosen in product(*(choices(name, values).items() for name, values in factors.items())):
        names = dict(zip(factors, (word for word, _ in chosen), strict=True))
        found.append((names, {key: value for _, changes in chosen for key, value in changes.items()}))
    return found
