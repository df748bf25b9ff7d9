"""The runs that a study asks for: each with its settings, its length by the budget, and its folder."""

import hashlib
import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from training.classifier_config import FinetuneConfig
from training.comparison import ComparisonConfig, gigaflop_per_trained_image
from training.config import TrainingSettings
from training.parser import parse_settings
from training.run import make_plan
from training.source import open_source
from training.study_data import held_out_data
from training.study_settings import BUDGETS, Changes, Combination, StudySettings


CENTRE = "centre"
ONCE_ON_TEST = {"eval_split": "test", "eval_epochs": 0, "report_to": "none"}
SAME_FOR_ALL = {"report_to": "none", "knn_images": 0, "eval_split": "validation"}


@dataclass
class PlannedRun:
    """One run of a study.

    Attributes:
        point: digest of all its settings but the seed, which stands for "the same setting".
        label: the setting in words.
        changes: to the centre.
        flags: its command line, without the program.
        config: what they mean.
        gigaflop_per_image: of the model, forward and backward.
        steps: optimiser steps.
        final: whether it confirms a choice, and is scored on test, too.
        few_shot: shares of the labels that it is judged with besides all of them.
        finetuning: command line of the fine-tuning of its encoder, without the program; empty where there is none.
    """

    point: str
    label: str
    changes: Changes
    flags: list[str]
    config: ComparisonConfig
    gigaflop_per_image: float
    steps: int
    final: bool = False
    few_shot: list[float] = field(default_factory=list)
    finetuning: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """Of the run."""
        return Path(self.config.output_dir)

    @property
    def program(self) -> str:
        """The entry point that runs it."""
        return "training.pretrain" if self.config.method == "micl" else "training.compare"

    @property
    def judged_on(self) -> str:
        """Name of the split that is classified."""
        return "test" if self.final else "validation"

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.label}, seed {self.config.seed}"

    @property
    def images(self) -> int:
        """Of the whole run, counted each time."""
        return self.steps * images_per_step(self.config)

    @property
    def gigaflop(self) -> float:
        """Of the whole run."""
        return self.gigaflop_per_image * self.images

    @property
    def guessing(self) -> float | None:
        """The loss of a contrastive method that has learned nothing, None for others."""
        contrastive = self.config.method in ("micl", "simclr")
        return round(math.log(self.config.contrasted_images(1)), 4) if contrastive else None


@dataclass
class StudyPlan:
    """All runs, and which of them belong together.

    Attributes:
        runs: each once, though it may belong to several factors and grids.
        centre: point of the recipe with the common settings.
        factors: the points of each factor, by the values' names.
        grids: for each grid, the points and the names of their values.
        trials: the same for each method.
        values: what the factors of all these are in the centre.
    """

    runs: list[PlannedRun]
    centre: str
    factors: dict[str, dict[str, str]]
    grids: dict[str, list[dict[str, Any]]]
    trials: dict[str, list[dict[str, Any]]]
    values: dict[str, str]


class Planner:
    """Makes the runs of a study.

    Args:
        settings: of the study.
    """

    def __init__(self, settings: StudySettings) -> None:
        self.settings = settings
        self.runs: dict[tuple[str, int], PlannedRun] = {}
        self.data: dict[str, tuple[Path, int]] = {}

    def plan(self) -> StudyPlan:
        """All runs but the final ones.

        Raises:
            ValueError: if the budget does not suffice for one step.
            SystemExit: with status 2, if there is no such setting or it has no such value.
        """
        study = self.settings
        self._check_finetuning()
        trials = {name: self._several(points, f"{name} ") for name, points in study.trial_points().items()}
        centre = "" if trials else self.add(CENTRE, {})
        factors = {
            name: {label: self.add(f"{name}={label}", changes) for label, changes in points.items()}
            for name, points in study.factor_points().items()
        }
        grids = {name: self._several(points) for name, points in study.grid_points().items()}
        values = {name: self._centre_value(name) for name in factors}
        return StudyPlan(list(self.runs.values()), centre, factors, grids, trials, values)

    def _several(self, points: list[Combination], group: str = "") -> list[dict[str, Any]]:
        return [{"values": words, "point": self.add(group + in_words(words), changes)} for words, changes in points]

    def _centre_value(self, factor: str) -> str:
        """What a factor is in the centre; that of a budget is in the study, that of words is the centre itself."""
        study = self.settings
        if factor in BUDGETS:
            return str(study.budget().get(factor, ""))
        if factor == "dataset":
            return study.dataset_name()
        value = getattr(self._parse(study.mapping("common")), factor, CENTRE)
        return " ".join(map(str, value)) if isinstance(value, list) else str(value)

    def add(self, label: str, changes: Changes) -> str:
        """Plan a setting with every seed, once; returns its point."""
        runs = [self.run(label, changes, seed) for seed in self.settings.seeds]
        for run in runs:
            self.runs.setdefault((run.point, run.config.seed), run)
        return runs[0].point

    def again(self, point: str, seed: int) -> PlannedRun:
        """A planned setting with another seed, to confirm it on test images."""
        planned = next(run for run in self.runs.values() if run.point == point)
        run = self.run(planned.label, planned.changes, seed)
        return replace(run, final=True, few_shot=self.settings.few_shot, finetuning=self.finetuning(run, run.folder))

    def finetuning(self, run: PlannedRun, folder: Path, random_init: bool = False) -> list[str]:
        """Command line of `training.finetune` for the encoder of a run, or one like it; empty where none is asked for.

        Args:
            run: trained by then.
            folder: in which it has one of its own.
            random_init: keep only the architecture.
        """
        asked = self.settings.mapping("finetune")
        if not asked:
            return []
        about = {"dataset": run.config.dataset, "seed": run.config.seed, "model": run.folder / "model"}
        told = asked | ONCE_ON_TEST | about | {"random_init": random_init}
        output = folder / f"finetuned-{digest(parse_settings(FinetuneConfig, 'training.study', as_flags(told)))}"
        return as_flags(told | {"output_dir": output})

    def _check_finetuning(self) -> None:
        asked = {"model": "that of a run"} | self.settings.mapping("finetune")
        parse_settings(FinetuneConfig, "training.study", as_flags(asked))

    def run(self, label: str, changes: Changes, seed: int) -> PlannedRun:
        """One run with some changes to the centre."""
        study, asked = self.settings, changes
        changes = study.mapping("common") | changes
        budget = {name: float(changes.pop(name)) for name in BUDGETS if name in changes} or study.budget()
        dataset = changes.pop("dataset", None) or study.dataset_name()
        folder, num_images = self._data(dataset)
        changes = SAME_FOR_ALL | changes | {"dataset": folder, "seed": seed}
        config = self._parse(changes)
        cost = gigaflop_per_trained_image(config)
        steps = steps_of(budget, cost, images_per_step(config))
        forwards_per_epoch = make_plan(config, num_images, processes=1).forwards_per_epoch
        epochs = steps * config.gradient_accumulation_steps / forwards_per_epoch
        changes |= {"epochs": epochs, "warmup_epochs": epochs * config.warmup_epochs / config.epochs}
        point = digest(self._parse(changes | {"seed": 0, "output_dir": ""}))
        changes["output_dir"] = self._folder(point, label) / f"seed-{seed}"
        config = self._parse(changes)
        told = {name: value for name, value in changes.items() if (name, value) != ("method", "micl")}
        return PlannedRun(point, label, asked, self._flags(told), config, cost, steps)

    def _folder(self, point: str, label: str) -> Path:
        """Of a setting; one that was run under another label before is known by its point."""
        folder = Path(self.settings.output_dir)
        readable = "".join(letter if letter.isalnum() or letter in ".-=" else "_" for letter in label)
        return next(folder.glob(f"*-{point}"), folder / f"{readable}-{point}")

    def _flags(self, changes: Changes) -> list[str]:
        return ["--config", self.settings.recipe, *as_flags(changes)]

    def _parse(self, changes: Changes) -> ComparisonConfig:
        return parse_settings(ComparisonConfig, "training.study", self._flags(changes))

    def _data(self, dataset: str) -> tuple[Path, int]:
        """Folder with a train and a validation part of a dataset's train split, and images of the first."""
        if dataset not in self.data:
            study, recipe = self.settings, self._parse({})
            folder = held_out_data(replace(recipe, dataset=dataset), study.held_out, Path(study.output_dir).parent)
            self.data[dataset] = folder, open_source(str(folder)).num_images
        return self.data[dataset]


def images_per_step(config: ComparisonConfig) -> int:
    """Images of an optimiser step of one process."""
    return config.images_per_process(1) * config.gradient_accumulation_steps


def steps_of(budget: dict[str, float], gigaflop_per_image: float, images: int) -> int:
    """Optimiser steps of `images` images that come nearest to a budget without exceeding it.

    Raises:
        ValueError: if that is none.
    """
    ((name, most),) = budget.items()
    cost = {"steps": 1.0, "images": images, "gigaflop": gigaflop_per_image * images}[name]
    if most < cost:
        raise ValueError(f"{name}={most:g} do not suffice for one step, which takes {cost:.4g}: raise it.")
    return int(most / cost + 1e-9)


def as_flags(settings: Changes) -> list[str]:
    """A command line."""
    flags = []
    for name, value in settings.items():
        flags += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
    return flags


def digest(config: TrainingSettings) -> str:
    """Changes with any setting."""
    return hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest()[:8]


def in_words(values: dict[str, str]) -> str:
    """The values of several factors."""
    return " ".join(f"{name}={value}" for name, value in values.items())
