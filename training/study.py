"""Ask a question with many small runs: `python -m training.study --config training/recipes/studies/NAME.yaml`.

A study file names a recipe, the settings to vary around it, the seeds, and one budget for all runs. Each run is the
command line of an entry point with a folder of its own under `output_dir`. The same command again runs only what is
missing: after an interruption, after a failure, or when the file asks for more.
"""

import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from training.log_files import read_metrics
from training.parser import parse_settings
from training.results import read_evaluation
from training.stop import STOPPED_STATUS
from training.study_figures import save_study
from training.study_judge import (
    FINETUNE,
    finetuned_accuracy,
    finetuned_evaluation,
    judge_references,
    stored_scores,
)
from training.study_plan import PlannedRun, Planner, StudyPlan
from training.study_report import RESULTS, Record, Scores, read_records, render, varies, write_record
from training.study_runs import Interrupted, is_finished, run_all
from training.study_settings import StudySettings


def run_missing(runs: list[PlannedRun], settings: StudySettings) -> dict[str, str]:
    """Run what is not finished, several at a time; returns why runs failed, by their names."""
    images, failed = settings.judge_images, dict[str, str]()
    missing = [run for run in runs if not is_finished(run, images)]
    say(f"{settings.name}: {len(runs) - len(missing)} of {len(runs)} runs are finished, {len(missing)} to go")
    for number, outcome in enumerate(run_all(missing, images, settings.jobs), 1):
        run = outcome.run
        if outcome.status == 0:
            found = stored_scores(run.folder / "model", run.judged_on, images)
            told = ", ".join(f"kNN {name} {100 * values['knn']:.1f} %" for name, values in found.items())
        elif outcome.status in (STOPPED_STATUS, -15):
            told = "stopped"
        else:
            failed[run.name] = outcome.reason
            told = f"FAILED, see {run.folder / 'log.txt'}: {outcome.reason}"
        say(f"{number}/{len(missing)}  {run.name}: {told}  ({outcome.seconds:.0f} s)")
    return failed


def final_runs(planner: Planner, plan: StudyPlan, record: Record) -> tuple[list[PlannedRun], list[str]]:
    """The best setting, of each method if there are several, with the final seeds; and the points of these."""
    choosing = Scores(record)
    groups = [[cell["point"] for cell in cells] for cells in plan.trials.values()]
    points = [choosing.best(group)[0] for group in groups or [list(record["points"])] if any(map(choosing.of, group))]
    runs = [planner.again(point, seed) for point in points for seed in planner.settings.final_seeds]
    return runs, points


def row(run: PlannedRun, images: int) -> Record:
    """What the record tells of a finished run."""
    training = read_evaluation(run.folder / "model")["training"]
    last = [entry for entry in read_metrics(run.folder / "metrics.jsonl") if "loss" in entry][-1]
    scores = stored_scores(run.folder / "model", run.judged_on, images, run.few_shot)
    told: Record = {
        "point": run.point,
        "seed": run.config.seed,
        "final": run.final,
        "images": training["progress"]["seen"],
        "gigaflop": round(run.gigaflop, 1),
        "seconds": round(training["progress"]["seconds"], 1),
        "loss": round(last["loss"], 4),
        "guessing": run.guessing,
    }
    told |= {name: round(last[name], 4) for name in ("contrastive_accuracy", "negative_cosine") if name in last}
    if run.finetuning and (accuracy := finetuned_accuracy(run.finetuning)) is not None:
        scores["finetuned"] = {"accuracy": accuracy}
    return told | {"scores": {name: {k: round(v, 4) for k, v in values.items()} for name, values in scores.items()}}


def record_of(
    settings: StudySettings, plan: StudyPlan, runs: list[PlannedRun], failed: dict[str, str], final: list[str]
) -> Record:
    """Everything that is known of a study, from the folders of its runs."""
    images = settings.judge_images
    finished = [run for run in runs if is_finished(run, images)]
    sources = [read_evaluation(run.folder / "model")["training"] for run in finished]
    sources += [finetuned_evaluation(run.finetuning)["training"] for run in finished if run.finetuning]
    dataset = settings.dataset_name()
    shown = f"path/to/{Path(dataset).name}" if Path(dataset).exists() else dataset  # nothing of somebody's disk
    machines = {f"{one['hardware']['cpu']}, {one['hardware']['cpu_cores']} cores" for one in sources}
    machines |= {name for one in sources for name in one["hardware"]["accelerators"]}
    return {
        "name": settings.name,
        "question": settings.question,
        "command": shlex.join(["python", "-m", "training.study", *sys.argv[1:]]).replace(dataset, shown),
        "recipe": settings.recipe,
        "dataset": shown,
        "common": settings.mapping("common"),
        "budget": settings.budget(),
        "seeds": settings.seeds,
        "final_seeds": settings.final_seeds,
        "judge_images": images,
        "labels": settings.labels,
        "few_shot": settings.few_shot,
        "finetune": settings.mapping("finetune"),
        "held_out": settings.held_out,
        "hardware": sorted(machines),
        "commits": sorted({str(one["versions"]["commit"]) for one in sources}),
        "centre": plan.centre,
        "values": plan.values,
        "factors": plan.factors,
        "grids": plan.grids,
        "trials": plan.trials,
        "points": {run.point: run.label for run in runs},
        "final": final,
        "references": {},
        "from_scratch": [],
        "failed": [f"{name}: {why}" for name, why in failed.items()],
        "runs": [row(run, images) for run in finished],
    }


def references(settings: StudySettings, plan: StudyPlan) -> dict[str, Any]:
    """How features that learn nothing do, judged once and kept."""
    run, folder = plan.runs[0], Path(settings.output_dir) / "references"
    for split in ("validation", "test") if settings.final_seeds else ("validation",):
        if not stored_scores(folder, split, settings.judge_images):
            judge_references(run, split, settings.judge_images, folder)
    splits = {split: stored_scores(folder, split, settings.judge_images) for split in ("validation", "test")}
    return {split: found for split, found in splits.items() if found}


def from_scratch(planner: Planner, run: PlannedRun) -> list[float]:
    """Accuracies of the fine-tuning of random weights, with each of the final seeds; runs what is missing.

    Args:
        planner: of the study.
        run: any final one, for the architecture.
    """
    found = []
    for seed in planner.settings.final_seeds:
        again = replace(run, config=replace(run.config, seed=seed))
        flags = planner.finetuning(again, Path(planner.settings.output_dir) / "references", random_init=True)
        if finetuned_accuracy(flags) is None:
            subprocess.run([sys.executable, "-m", FINETUNE, *flags], check=True)
        found.append(finetuned_accuracy(flags))
    return [accuracy for accuracy in found if accuracy is not None]


def write_results(folder: Path) -> None:
    """RESULTS.md, and the figure of every study, from the records."""
    records = read_records(folder)
    (folder / RESULTS).write_text(render(records), encoding="utf-8")
    for record in filter(varies, records):
        save_study(folder / f"{record['name']}.png", record)
    say(f"results: {folder / RESULTS}")


def say(text: str) -> None:
    """Print at once."""
    print(text, flush=True)  # noqa: T201


def main(settings: StudySettings) -> bool:
    """Run a study and write down what it has found; returns whether every run was finished."""
    if settings.render:
        write_results(Path(settings.report_dir))
        return True
    planner = Planner(settings)
    plan = planner.plan()
    if settings.plan_only:
        for run in plan.runs:
            say(f"{run.name}: {run.steps} steps, {run.images:,} images, {run.gigaflop:,.0f} GFLOP  {run.folder}")
        return True
    failed, runs = run_missing(plan.runs, settings), plan.runs
    record = record_of(settings, plan, runs, failed, [])
    if settings.final_seeds and record["runs"]:
        last, points = final_runs(planner, plan, record)
        failed |= run_missing(last, settings)
        runs = runs + last
        record = record_of(settings, plan, runs, failed, points)
        if trained := [run for run in last if run.finetuning and is_finished(run, settings.judge_images)]:
            record["from_scratch"] = from_scratch(planner, trained[0])
    if settings.references:
        record["references"] = references(settings, plan)
    folder = Path(settings.report_dir)
    write_record(folder / f"{settings.name}.json", record)
    write_results(folder)
    for name, why in failed.items():
        say(f"FAILED  {name}: {why}")
    return not failed


if __name__ == "__main__":
    try:
        finished = main(parse_settings(StudySettings, "training.study"))
    except Interrupted:
        say("Stopped, all saved: the same command continues from there.")
        sys.exit(STOPPED_STATUS)
    except (ValueError, RuntimeError) as error:
        sys.exit(f"training.study: {error}")
    sys.exit(0 if finished else 1)
