"""The parts of `training.benchmark`: what each measures and how it is shown. A new one is a row of `PARTS`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from accelerate import Accelerator

from training.batch_cost import (
    BatchSettings,
    GrowthSettings,
    MemorySettings,
    ViewsSettings,
    measure_growth,
    measure_memory,
    measure_views,
)
from training.cost_settings import Entry, VitSettings
from training.input_cost import InputSettings, measure_input
from training.loop_cost import LoopSettings, measure_loop
from training.markdown import markdown_table
from training.peer_cost import PeerSettings, measure_peers
from training.phase_cost import PhaseSettings, measure_phases
from training.prepared_cost import PreparedSettings, measure_prepared
from training.resume_cost import ResumeSettings, measure_resume
from training.scale_cost import ScaleSettings, measure_scale


Settings = BatchSettings | VitSettings | PhaseSettings | InputSettings | ResumeSettings | PreparedSettings
Kind = TypeVar("Kind", bound=Settings)
Columns = dict[str, tuple[str, str]]


@dataclass(frozen=True)
class Part(Generic[Kind]):
    """What can be measured.

    Args:
        title: of its tables.
        about: how its numbers come about, in a few sentences.
        settings: its dataclass.
        measure: gives the entries of its results.
        columns: of its table, (key of an entry, format) by title.
    """

    title: str
    about: str
    settings: type[Kind]
    measure: Callable[[Accelerator, Kind], list[Entry]]
    columns: Columns


TIME: Columns = {"ms per image": ("ms_per_image", ".4g"), "interquartile range": ("ms_per_image_iqr", ".2g")}
BATCH: Columns = {"contrastive batch": ("images", "")}
MEMORY: Columns = {"peak MiB": ("peak_memory_mib", ".0f")}
PARTS: dict[str, Part[Any]] = {
    "peers": Part(
        "Beside other programs and methods",
        "One training step of the same encoder on as many images of the same size: forward, backward and optimiser. "
        "Ratios are to the first row of the same precision. MAE masks 75 % and has the paper's decoder; SimCLR "
        "encodes two whole images, supervised training one; `training/other_methods.py` has them all. What a method "
        "learns from a step is another question.",
        PeerSettings,
        measure_peers,
        {"method": ("name", ""), "program": ("program", ""), "precision": ("precision", "")}
        | {"time / ours": ("time_ratio", ".2f"), "GFLOP / ours": ("gigaflop_ratio", ".2f")}
        | {"memory / ours": ("memory_ratio", ".2f"), "GFLOP per image": ("gigaflop_per_image", ".1f")}
        | TIME
        | MEMORY,
    ),
    "step": Part(
        "The training step",
        "The step of the known sizes. The operations are counted while it runs; their rate is set against that of a "
        "large matrix product in the same precision on the same device and threads, measured in turn with the steps. "
        "Forward, backward and optimiser are milliseconds of a whole step. Attention without a name is as a run has "
        "it: explicit on the CPU, by torch's fused kernels on a GPU.",
        PhaseSettings,
        measure_phases,
        {"ViT": ("size", ""), "mask ratio": ("mask_ratio", ""), "precision": ("precision", "")}
        | {"compiled": ("compiled", ""), "attention": ("attention", ""), "images": ("images", "")}
        | {"share of the matmul's rate": ("matmul_share", ".0%"), "images/s": ("images_per_second", ",.1f")}
        | {"GFLOP per image": ("gigaflop_per_image", ".1f"), "GFLOP/s": ("gigaflop_per_second", ".0f")}
        | {"forward": ("forward_ms", ".0f"), "backward": ("backward_ms", ".0f"), "optimiser": ("optimizer_ms", ".0f")}
        | TIME
        | MEMORY,
    ),
    "loop": Part(
        "The training loop",
        "`training.pretrain` from the images to the log, against the bare step of the same batch on images in memory, "
        "which is timed before and after it. Waiting is the share of the loop's time in which it has no images; "
        "overhead is what is left beside waiting and the bare step, in bare steps.",
        LoopSettings,
        measure_loop,
        BATCH
        | {"decoding processes": ("num_workers", ""), "loop / bare step": ("time_ratio", ".2f")}
        | {"waiting": ("data_wait", ".1%"), "overhead": ("overhead", ".1%")}
        | TIME
        | {"bare step": ("step_ms_per_image", ".4g")},
    ),
    "input": Part(
        "The input pipeline",
        "Reading, decoding and cropping alone, without a model, against a plain loop on one core that decodes, crops "
        "and resizes images in memory. Ratios come first; rates are those of one core; the other rows are the stages.",
        InputSettings,
        measure_input,
        {"speed / plain loop": ("speed_ratio", ".2f"), "what": ("name", "")}
        | {"images/s per core": ("images_per_second", ".0f"), "ms per image": ("ms_per_image", ".3f")}
        | {"interquartile range": ("ms_per_image_iqr", ".3f")},
    ),
    "scale": Part(
        "Visible patches, images, pixels, processes",
        "One thing is varied at a time, the rest stays; ratios are to the first row of a kind. More processes share "
        "out the same contrastive batch with global negatives, one thread each on the CPU.",
        ScaleSettings,
        measure_scale,
        {"varied": ("varied", ""), "value": ("value", ""), "patches per view": ("patches_per_view", "")}
        | {"time / first": ("time_ratio", ".2f"), "GFLOP / first": ("gigaflop_ratio", ".2f")}
        | {"GFLOP per image": ("gigaflop_per_image", ".2f")}
        | TIME,
    ),
    "memory": Part(
        "The loss of a contrastive batch: plain, checkpointed, cached",
        "Time and peak memory of the same step, made in different ways; ratios are to the plain loss of the same "
        "batch. On the CPU the memory is what a step adds to the process, gradients and AdamW's moments included.",
        MemorySettings,
        measure_memory,
        BATCH
        | {"loss": ("name", ""), "time / plain": ("time_ratio", ".2f"), "memory / plain": ("memory_ratio", ".2f")}
        | TIME
        | MEMORY,
    ),
    "growth": Part(
        "Large contrastive batches",
        "Small images, so that the similarity matrix and the loss are a large part of the step.",
        GrowthSettings,
        measure_growth,
        BATCH
        | {"loss": ("name", ""), "time / smallest": ("time_ratio", ".2f"), "share of the loss": ("loss_share", ".1%")}
        | TIME,
    ),
    "views": Part(
        "More views",
        "Each view has as many patches as when there are two.",
        ViewsSettings,
        measure_views,
        BATCH
        | {"views": ("num_views", ""), "patches per view": ("patches_per_view", "")}
        | {"time / first": ("time_ratio", ".2f"), "views / first": ("views_ratio", ".2f")}
        | TIME,
    ),
    "resume": Part(
        "Resuming",
        "Time to the first batch where training resumes, in data with as many rows and files as ImageNet-1k.",
        ResumeSettings,
        measure_resume,
        {"epochs done": ("epochs", ""), "seconds to the first batch": ("median_seconds", ".2f")}
        | {"seconds to open the data": ("opening_seconds", ".2f")},
    ),
    "prepared": Part(
        "Images made small once",
        "The same images, as they are stored and as `training.prepare` stores them, are decoded and cropped on one "
        "core, in turns; files are in memory.",
        PreparedSettings,
        measure_prepared,
        {"images": ("name", ""), "images per second": ("images_per_second", ".0f"), "speed": ("speed_ratio", ".2f")}
        | {"bytes": ("bytes_ratio", ".2f")},
    ),
}


def markdown(columns: Columns, entries: list[Entry]) -> str:
    """A table of the entries; what could not be measured is a dash."""
    rows = [[_cell(entry.get(key), form) for key, form in columns.values()] for entry in entries]
    return markdown_table(list(columns), rows)


def _cell(value: Any, form: str) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "–" if value is None else format(value, form)
