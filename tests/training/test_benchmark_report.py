"""The page of measured numbers is what the files say, and says nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest

from training.arithmetic import projected_hours
from training.benchmark_parts import PARTS
from training.benchmark_report import MEASURED, REPORT, report


STEP = {"size": "large", "mask_ratio": 0.9, "precision": "bf16", "images": 256, "compiled": False}
STEP |= {"gigaflop_per_image": 35.0, "matmul_share": 0.4}


def write(folder: Path, name: str = "step.json", device: str = "cuda", **changes: Any) -> None:
    """A file of a measured step."""
    measured = {
        "part": "step",
        "command": f"python -m training.benchmark --part step --output {name}",
        "settings": {"image_size": 224, "patch_size": 16},
        "device": device,
        "threads": 2,
        "results": [STEP | {"mask_ratio": 0.8}, STEP | changes],
        "hardware": {"cpu": "Some CPU", "cpu_cores": 2, "accelerators": ["Some GPU"] if device == "cuda" else []},
        "versions": {"torch": "2.14.1", "transformers": "5.23.0", "commit": "abc"},
    }
    (folder / name).write_text(json.dumps(measured))


def test_the_page_is_written_from_the_files() -> None:
    assert report(MEASURED) == REPORT.read_text(encoding="utf-8"), "run python -m training.benchmark_report"


def test_every_file_has_its_place(tmp_path: Path) -> None:
    write(tmp_path, "step_b.json", device="cpu")
    write(tmp_path, "step_a.json")
    text = report(tmp_path)
    assert text.count(f"## {PARTS['step'].title}") == 1
    assert "Some GPU; torch 2.14.1, transformers 5.23.0; commit abc; [step_a.json](benchmarks/step_a.json)" in text
    assert "Some CPU, 2 threads; torch 2.14.1, transformers 5.23.0; commit abc; [step_b.json]" in text
    assert text.index("step_a.json") < text.index("step_b.json")
    assert text.count("| large | 0.9 | bf16 | no | – | 256 | 40% |") == 2
    assert not any(part.title in text for name, part in PARTS.items() if name != "step")


def test_hours_are_projected_from_a_gpu(tmp_path: Path) -> None:
    write(tmp_path)
    text = report(tmp_path)
    assert f"{projected_hours(35.0, 0.4):.0f} hours for 800 epochs of 1.28 M images on 4 A100, as a lower" in text
    assert "{" not in text
    assert "40% of a large matmul's rate that the step above reaches on one Some GPU" in text.replace("\n", " ")


@pytest.mark.parametrize(
    "changes", [{"device": "cpu"}, {"size": "base"}, {"precision": "fp32"}, {"mask_ratio": 0.75}], ids=str
)
def test_nothing_is_projected_without_evidence(tmp_path: Path, changes: dict[str, Any]) -> None:
    write(tmp_path, **changes)
    assert "hours" not in report(tmp_path)


def test_no_number_is_shown_that_was_not_measured(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"command": "python -m another.program"}')
    assert "##" not in report(tmp_path)
