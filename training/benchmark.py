"""What training costs: `python -m training.benchmark --part step`, and other parts.

- peers: time, operations and memory of a step beside other programs and methods on the same encoder and images;
- step: forward, backward and optimiser of the known ViT sizes, and how well they compute; also with `--compile`;
- loop: what the training loop adds to the bare step, and how much it waits for images;
- scale: time per image against visible patches, images, pixels and processes;
- memory: time and peak memory of a training step with the plain loss, with gradient checkpointing and with the cached
  loss at several micro-batches, for growing contrastive batches;
- growth: time per image as the contrastive batch grows, and the share of the similarity matrix and the loss in it;
- views: time of more views of the same number of patches each;
- resume: time to the first batch where training resumes, at several places of data as large as ImageNet-1k;
- prepared: images per second of decoding and cropping on one core, as stored and as `training.prepare` stores them;
- input: images per second and core of reading, decoding and cropping, against a plain loop; the time of each stage.

A step is forward, backward and optimiser; its images are random, so nothing is read or decoded. Times are medians of
repetitions, those of steps interleaved (`training/timing.py`). What memory means, `training/step_cost.py` tells. A
CUDA GPU is used where there is one. Each part prints a table and writes all numbers to `--output`; with those files in
`training/benchmarks/`, `python -m training.benchmark_report` writes `training/BENCHMARKS.md`. Nothing else should run
on the machine.
"""

import json
import shlex
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator

from training.allocator import keep_freed_memory
from training.benchmark_parts import PARTS, Settings, markdown
from training.monitor import provenance
from training.parser import parse_settings


PROGRAM = "training.benchmark"


def main(part: str, config: Settings) -> None:
    """Measure, write and print."""
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    if accelerator.num_processes > 1:
        raise ValueError(f"{PROGRAM} measures one process: start it with python, not with accelerate or torchrun.")
    keep_freed_memory()  # as training does
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
    print(f"{part} on {device} ({hardware}): {output}")  # noqa: T201
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
