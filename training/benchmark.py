"""What a contrastive batch and resuming cost: `python -m training.benchmark --part memory`, and other parts.

- memory: time and peak memory of a training step with the plain loss, with gradient checkpointing and with the cached
  loss at several micro-batches, for growing contrastive batches;
- growth: time per image as the contrastive batch grows, and the share of the similarity matrix and the loss in it;
- views: time of more views of the same number of patches each;
- resume: time to the first batch where training resumes, at several places of data as large as ImageNet-1k;
- prepared: images per second of decoding and cropping on one core, as stored and as `training.prepare` stores them;
- input: images per second and core of reading, decoding and cropping, against a plain loop; the time of each stage.

A step is forward, backward and optimiser; its images are random, so nothing is read or decoded. Times are medians of
repetitions, those of steps interleaved. What memory means, `training/step_cost.py` tells. Each part prints a table and
writes all numbers to `--output`. Nothing else should run on the machine.
"""

import json
import shlex
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from accelerate import Accelerator

from training.batch_cost import (
    Entry,
    GrowthSettings,
    MemorySettings,
    StepSettings,
    ViewsSettings,
    measure_growth,
    measure_memory,
    measure_views,
)
from training.input_cost import InputSettings, measure_input
from training.monitor import provenance
from training.parser import parse_settings
from training.prepared_cost import PreparedSettings, measure_prepared
from training.resume_cost import ResumeSettings, measure_resume


PROGRAM = "training.benchmark"
Settings = StepSettings | ResumeSettings | PreparedSettings | InputSettings
Kind = TypeVar("Kind", bound=Settings)


@dataclass(frozen=True)
class Part(Generic[Kind]):
    """What can be measured: its settings, how, and the columns of its table, (key of an entry, format) by title."""

    settings: type[Kind]
    measure: Callable[[Accelerator, Kind], list[Entry]]
    columns: dict[str, tuple[str, str]]


TIME = {"ms per image": ("ms_per_image", ".2f"), "interquartile range": ("ms_per_image_iqr", ".2f")}
BATCH = {"contrastive batch": ("images", "")}
PARTS: dict[str, Part[Any]] = {
    "memory": Part(
        MemorySettings,
        measure_memory,
        BATCH
        | {"loss": ("name", ""), "time / plain": ("time_ratio", ".2f"), "memory / plain": ("memory_ratio", ".2f")}
        | TIME
        | {"peak MiB": ("peak_memory_mib", ".0f")},
    ),
    "growth": Part(
        GrowthSettings,
        measure_growth,
        BATCH
        | {"loss": ("name", ""), "time / smallest": ("time_ratio", ".2f"), "share of the loss": ("loss_share", ".1%")}
        | TIME,
    ),
    "views": Part(
        ViewsSettings,
        measure_views,
        BATCH
        | {"views": ("num_views", ""), "patches per view": ("patches_per_view", "")}
        | {"time / first": ("time_ratio", ".2f"), "views / first": ("views_ratio", ".2f")}
        | TIME,
    ),
    "resume": Part(
        ResumeSettings,
        measure_resume,
        {"epochs done": ("epochs", ""), "seconds to the first batch": ("median_seconds", ".2f")}
        | {"seconds to open the data": ("opening_seconds", ".2f")},
    ),
    "prepared": Part(
        PreparedSettings,
        measure_prepared,
        {"images": ("name", ""), "images per second": ("images_per_second", ".0f"), "speed": ("speed_ratio", ".2f")}
        | {"bytes": ("bytes_ratio", ".2f")},
    ),
    "input": Part(
        InputSettings,
        measure_input,
        {"speed / plain loop": ("speed_ratio", ".2f"), "what": ("name", "")}
        | {"images/s per core": ("images_per_second", ".0f"), "ms per image": ("ms_per_image", ".3f")}
        | {"interquartile range": ("ms_per_image_iqr", ".3f")},
    ),
}


def markdown(columns: dict[str, tuple[str, str]], entries: list[Entry]) -> str:
    """A table of the entries; what could not be measured is a dash."""
    rows = [list(columns), ["---"] * len(columns)]
    for entry in entries:
        values = [(entry.get(key), form) for key, form in columns.values()]
        rows.append(["–" if value is None else format(value, form) for value, form in values])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(part: str, config: Settings) -> None:
    """Measure, write and print."""
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    if accelerator.num_processes > 1:
        raise ValueError(f"{PROGRAM} measures one process: start it with python, not with accelerate or torchrun.")
    entries, device = PARTS[part].measure(accelerator, config), accelerator.device.type
    report = {
        "part": part,
        "command": shlex.join(["python", "-m", PROGRAM, *sys.argv[1:]]),
        "settings": asdict(config),
        "device": device,
        "threads": torch.get_num_threads(),
        "results": entries,
        **provenance(),
    }
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")
    hardware = report["hardware"]["accelerators"][0] if device == "cuda" else report["hardware"]["cpu"]
    print(f"{part} on {device} ({hardware}), {config.mixed_precision}: {output}")  # noqa: T201
    print(markdown(PARTS[part].columns, entries))  # noqa: T201


def parse(argv: Sequence[str]) -> tuple[str, Settings]:
    """The part and its settings; ends the program with status 2 if one of them is impossible."""
    parser = ArgumentParser(prog=PROGRAM, add_help=False, allow_abbrev=False)
    parser.add_argument("--part", choices=list(PARTS), required=True)
    chosen, flags = parser.parse_known_args(argv)
    return chosen.part, parse_settings(PARTS[chosen.part].settings, f"{PROGRAM} --part {chosen.part}", flags)


if __name__ == "__main__":
    try:
        main(*parse(sys.argv[1:]))
    except (ValueError, RuntimeError) as error:
        sys.exit(f"{PROGRAM}: {error}")
