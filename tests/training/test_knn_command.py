"""The command that judges by nearest neighbours."""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import forks
import test_knn


folder = test_knn.folder


def run_command(folder: Path, **settings: Any) -> forks.Done:
    knn = forks.command("training.knn", model=folder / "model", dataset=folder / "data", **settings)
    return forks.run(knn, folder / "home")


def test_the_command_prints_a_table_and_writes_itself_down(folder: Path) -> None:
    flags = [f"--model={folder / 'model'}", f"--dataset={folder / 'data'}", "--few_shot", "0.1", "0.5"]
    done = run_command(folder, few_shot=[0.1, 0.5])
    assert done.status == 0, done.complaints[-3000:]
    entries = json.loads((folder / "model" / "eval.json").read_text())["results"]
    assert {entry["command"] for entry in entries} == {shlex.join(["python", "-m", "training.knn", *flags])}
    assert "kNN accuracy of cls of the encoder on 30 images" in done.printed
    for entry in entries:
        votes = entry["protocol"].split(", ")[3]
        assert f"  {100 * entry['label_share']:g} % of the labels, {votes}" in done.printed
        assert f"{entry['value']:.1%}\n" in done.printed


def test_the_command_says_in_one_line_what_is_wrong(folder: Path) -> None:
    shutil.rmtree(folder / "model")
    (folder / "model").mkdir()
    done = run_command(folder)
    assert done.status == 1
    assert "Traceback" not in done.complaints
    assert done.complaints.splitlines()[-1].startswith(
        f"training.knn: --model {str(folder / 'model')!r} is no model: it has no config"
    )
