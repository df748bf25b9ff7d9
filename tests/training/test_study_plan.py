"""The runs of a study: each once, of equal length by the budget, and the same command every time."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from study_files import Plan, small_study

from training.classifier_config import FinetuneConfig
from training.config import PretrainConfig
from training.monitor import gigaflop_per_image
from training.parser import parse_settings
from training.run import make_plan
from training.study_plan import Planner, StudyPlan, steps_of


@pytest.fixture
def planned(tmp_path: Path, write_shards: Callable[..., Path]) -> Plan:
    """Plan a study of 40 train images, of which 8 are held out."""
    write_shards(20, 20)

    def plan(**changes: Any) -> tuple[Planner, StudyPlan]:
        settings = small_study(tmp_path, **changes)
        settings.validate()
        planner = Planner(settings)
        return planner, planner.plan()

    return plan


def test_a_setting_that_several_factors_and_grids_ask_for_is_run_once(planned: Plan) -> None:
    grids = {"both": {"temperature": [0.05, 0.1], "mask_ratio": [0.5, 0.75]}}
    _, plan = planned(factors={"temperature": [0.05, 0.1], "mask_ratio": [0.5, 0.75]}, grids=grids, seeds=[0, 7])
    assert [run.name for run in plan.runs] == [
        f"{label}, seed {seed}"
        for label in ("centre", "temperature=0.1", "mask_ratio=0.75", "temperature=0.1 mask_ratio=0.75")
        for seed in (0, 7)
    ]
    assert len({run.folder for run in plan.runs}) == len(plan.runs)
    assert plan.factors["temperature"]["0.05"] == plan.factors["mask_ratio"]["0.5"] == plan.centre
    assert [cell["point"] for cell in plan.grids["both"]][:3] == [
        plan.centre,
        plan.factors["mask_ratio"]["0.75"],
        plan.factors["temperature"]["0.1"],
    ]
    assert plan.values == {"temperature": "0.05", "mask_ratio": "0.5"}


def test_the_command_line_of_a_run_gives_the_planned_settings_and_steps(planned: Plan) -> None:
    _, plan = planned(factors={"temperature": [0.1], "patch_size": [[8]]}, steps=7)
    for run in plan.runs:
        config = parse_settings(PretrainConfig, "training.pretrain", run.flags)
        told = {name: value for name, value in run.config.to_dict().items() if name in config.to_dict()}
        assert config.to_dict() == told
        assert (config.report_to, config.knn_images, config.eval_split) == ("none", 0, "validation")
        assert make_plan(config, 32, 1).total_steps == run.steps == 7
        assert config.warmup_epochs / config.epochs == pytest.approx(0.2)  # the recipe's share
        assert run.program == "training.pretrain"
    assert plan.runs[1].config.temperature == 0.1
    assert plan.runs[2].config.patch_size == [8]


def test_equal_compute_gives_a_cheaper_setting_more_steps(planned: Plan) -> None:
    _, plan = planned(factors={"mask_ratio": [0.75], "gigaflop": [0.1]}, gigaflop=0.2, steps=None)
    for run, budget in zip(plan.runs, (0.2, 0.2, 0.1), strict=True):
        cost = 8 * gigaflop_per_image(run.config.model_config())
        assert run.steps * cost <= budget < (run.steps + 1) * cost
        assert run.gigaflop == pytest.approx(run.steps * cost)
    centre, cheaper, half = plan.runs
    assert cheaper.steps > centre.steps > half.steps > 0
    assert plan.values["gigaflop"] == "0.2"


def test_equal_images_give_a_larger_batch_fewer_steps(planned: Plan) -> None:
    _, plan = planned(factors={"contrastive_batch_size": [16]}, images=64, steps=None)
    assert [run.steps for run in plan.runs] == [8, 4]
    assert steps_of({"images": 64.0}, 1.0, 10) == 6


def test_the_common_settings_change_the_centre(planned: Plan) -> None:
    _, plan = planned(common={"temperature": 0.2}, factors={"temperature": [0.05]})
    assert [run.config.temperature for run in plan.runs] == [0.2, 0.05]
    assert plan.values["temperature"] == "0.2"


def test_a_point_changes_with_every_setting_and_not_with_the_seed(planned: Plan) -> None:
    _, plan = planned(seeds=[0, 1])
    assert len({run.point for run in plan.runs}) == 1
    points = {planned(common=changes)[1].centre for changes in ({}, {"temperature": 0.2}, {"horizontal_flip": False})}
    assert len(points) == 3
    assert planned(steps=11)[1].centre not in points


def test_a_setting_that_was_run_under_another_label_keeps_its_folder(planned: Plan) -> None:
    _, plan = planned(factors={"temperature": [0.1]})
    before = plan.runs[1].folder
    before.mkdir(parents=True)
    _, plan = planned(grids={"one": {"temperature": [0.1], "mask_ratio": [0.5]}})
    assert plan.runs[1].folder == before
    assert "temperature=0.1" in str(before)


def test_a_choice_is_confirmed_with_other_seeds_on_test(planned: Plan) -> None:
    planner, plan = planned(factors={"temperature": [0.1]}, final_seeds=[5])
    again = planner.again(plan.factors["temperature"]["0.1"], 5)
    assert (again.point, again.config.seed, again.config.temperature) == (plan.runs[1].point, 5, 0.1)
    assert (plan.runs[1].judged_on, again.judged_on) == ("validation", "test")


def test_a_choice_is_fine_tuned_on_the_images_that_are_not_held_out_and_scored_on_test(planned: Plan) -> None:
    asked = {"epochs": 2, "warmup_epochs": 0, "max_images": 30}
    planner, plan = planned(final_seeds=[5], few_shot=[0.5], finetune=asked)
    assert not plan.runs[0].finetuning
    again = planner.again(plan.centre, 5)
    assert again.few_shot == [0.5]
    config = parse_settings(FinetuneConfig, "training.finetune", again.finetuning)
    assert (config.model, config.dataset) == (str(again.folder / "model"), again.config.dataset)
    assert (config.eval_split, config.seed, config.epochs, config.max_images) == ("test", 5, 2, 30)
    assert not config.random_init
    assert Path(config.output_dir).parent == again.folder
    scratch = planner.finetuning(again, again.folder, random_init=True)
    longer, _ = planned(final_seeds=[5], finetune=asked | {"epochs": 3})
    others = [scratch, longer.again(plan.centre, 5).finetuning]
    folders = {parse_settings(FinetuneConfig, "training.finetune", flags).output_dir for flags in others}
    assert len(folders | {config.output_dir}) == 3


def test_another_method_runs_by_its_own_program(planned: Plan) -> None:
    _, plan = planned(trials={"micl": {"base_lr": [1e-3]}, "mae": {"base_lr": [1e-3]}})
    assert [run.program for run in plan.runs] == ["training.pretrain", "training.compare"]
    assert "--method=mae" in plan.runs[1].flags
    assert not [flag for flag in plan.runs[0].flags if flag.startswith("--method")]
    assert [run.guessing for run in plan.runs] == [pytest.approx(2.0794), None]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"factors": {"temprature": [1]}}, "unknown flag --temprature.*did you mean 'temperature'"),
        ({"factors": {"temperature": [-1]}}, "temperature must be > 0, got -1"),
        ({"common": {"mask_ratio": 0.99}}, "mask_ratio=0.99 leaves 0"),
        ({"finetune": {"epoch": 3}, "final_seeds": [1]}, "unknown flag --epoch.*did you mean 'epochs'"),
    ],
)
def test_a_mistake_is_refused_before_anything_runs(
    changes: dict[str, Any], named: str, planned: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        planned(**changes)
    assert re.search(named, capsys.readouterr().err)


def test_a_budget_or_a_batch_that_does_not_suffice_is_refused(planned: Plan) -> None:
    with pytest.raises(ValueError, match="gigaflop=1e-09 do not suffice for one step"):
        planned(gigaflop=1e-9, steps=None)
    with pytest.raises(ValueError, match="32 images do not fill one batch of 33"):
        planned(common={"contrastive_batch_size": 33})
