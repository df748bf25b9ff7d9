"""Write `training/BENCHMARKS.md` from the measured numbers: `python -m training.benchmark_report`.

They are in `training/benchmarks/*.json`, as `training.benchmark` writes them. What was not measured is not there.
"""

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

from training.arithmetic import projected_hours
from training.benchmark_parts import PARTS, markdown


TRAINING = Path(__file__).parent
MEASURED, REPORT = TRAINING / "benchmarks", TRAINING / "BENCHMARKS.md"
TOP = """\
# What training costs

Written by `python -m training.benchmark_report` from `training/benchmarks/*.json`, which have the spread, the settings
and the versions of every number. A part is measured again, on a machine with nothing else to do, by

`python -m training.benchmark --part NAME --output training/benchmarks/NAME.json`

A CUDA GPU is used if there is one; name the file after it. Times are medians of repetitions that take turns.
"""
PROJECTION = """\
### ViT-L/16 on ImageNet-1k, projected

{hours:.0f} hours for 800 epochs of 1.28 M images on 4 A100, as a lower bound; the paper reports 133 for its program.
They are computed, not measured: from the {share:.0%} of a large matmul's rate that the step above reaches on one
{hardware} (mask ratio 0.9, bf16, {images} images, {gigaflop:.1f} GFLOP per image), if an A100 reaches
that share of the 312 TFLOP/s of its data sheet, four are four times faster, and they never wait for images,
checkpoints or evaluations.
"""
WIDTH = 119
Measured = dict[str, Any]


def read_measured(folder: Path) -> dict[str, list[tuple[str, Measured]]]:
    """Name and content of every file, by part."""
    by_part: dict[str, list[tuple[str, Measured]]] = {part: [] for part in PARTS}
    for file in sorted(folder.glob("*.json")):
        measured = json.loads(file.read_text(encoding="utf-8"))
        if "part" in measured:  # other programs keep their numbers there, too
            by_part[measured["part"]].append((file.name, measured))
    return by_part


def hardware(measured: Measured) -> str:
    """What was measured on."""
    if measured["device"] == "cuda":
        return str(measured["hardware"]["accelerators"][0])
    threads = measured["threads"]
    return f"{measured['hardware']['cpu']}, {threads} thread{'s' if threads > 1 else ''}"


def provenance(name: str, measured: Measured) -> str:
    """Where a table comes from."""
    libraries = ", ".join(f"{name} {measured['versions'][name]}" for name in ("torch", "transformers"))
    commit = measured["versions"]["commit"]
    return (
        f"{hardware(measured)}; {libraries}; commit {commit}; [{name}](benchmarks/{name})\n\n`{measured['command']}`"
    )


def projection(measured: Measured) -> str | None:
    """The hours of the large training, if its step was measured on a GPU."""
    wanted = {"size": "large", "mask_ratio": 0.9, "precision": "bf16"}
    steps = [entry for entry in measured["results"] if all(entry[key] == value for key, value in wanted.items())]
    settings = measured["settings"]
    if measured["device"] != "cuda" or not steps or (settings["image_size"], settings["patch_size"]) != (224, 16):
        return None
    best = max(steps, key=lambda entry: float(entry["matmul_share"]))
    return PROJECTION.format(
        hours=projected_hours(best["gigaflop_per_image"], best["matmul_share"]),
        share=best["matmul_share"],
        hardware=hardware(measured),
        images=best["images"],
        gigaflop=best["gigaflop_per_image"],
    )


def report(folder: Path) -> str:
    """The whole page."""
    blocks = [TOP]
    for part, files in read_measured(folder).items():
        if not files:
            continue
        about = textwrap.fill(f"{PARTS[part].about} (`--part {part}`)", WIDTH, break_on_hyphens=False)
        blocks.append(f"## {PARTS[part].title}\n\n{about}\n")
        for name, measured in files:
            table = markdown(PARTS[part].columns, measured["results"])
            blocks.append(f"{provenance(name, measured)}\n\n{table}\n")
            if part == "step" and (text := projection(measured)):
                blocks.append(text)
    return "\n".join(blocks)


def main() -> None:
    """Write the page."""
    REPORT.write_text(report(MEASURED), encoding="utf-8")
    print(REPORT)  # noqa: T201


if __name__ == "__main__":
    try:
        main()
    except (ValueError, RuntimeError) as error:
        sys.exit(f"training.benchmark_report: {error}")
