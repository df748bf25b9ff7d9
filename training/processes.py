"""The processes of a run: how they start, what they share out, and what is said when one of them is lost."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs

from training.allocator import keep_freed_memory
from training.config import TrainingSettings
from training.monitor import usable_cores
from training.peers import Peers
from training.run import Run


def start_accelerator(config: TrainingSettings) -> Accelerator:
    """Processes, precision and trackers.

    Raises:
        ValueError: if a tracker is not installed, or fp16 is asked for without a GPU (accelerate itself would pass
            over both in silence); if the batch cannot be shared out to the processes; or if the model would be wrapped
            in a way that checkpoints cannot be written from.
    """
    missing = set(config.trackers()) - {str(tracker) for tracker in get_available_trackers()}
    if missing:
        raise ValueError(
            f"report_to={config.report_to!r}: {sorted(missing)} not installed (or unknown to accelerate)."
        )
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=config.trackers() or None,
        project_dir=config.output_dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=config.process_timeout))],
    )
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("mixed_precision='fp16' needs a GPU, for its loss scaling: use 'bf16' or 'no' on the CPU.")
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM) or (
        kind == DistributedType.FSDP and not accelerator.is_fsdp2
    ):
        raise ValueError(f"accelerate is set up for {kind.value}: use plain processes or FSDP with fsdp_version: 2.")
    if accelerator.is_fsdp2:
        # The package's own list names the embeddings, too, which accelerate cannot shard after their projection.
        accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = ["MiclLayer"]
    config.contrasted_images(accelerator.num_processes)  # refuses an impossible batch before anything is loaded
    use_all_cores(accelerator)
    keep_freed_memory()
    return accelerator


def use_all_cores(accelerator: Accelerator) -> None:
    """On the CPU share out the cores: launchers leave a process one thread, however many there are."""
    if accelerator.device.type == "cpu" and torch.get_num_threads() == 1:
        torch.set_num_threads(max(1, usable_cores() // accelerator.num_processes))


def cores_without_process(num_workers: int) -> int:
    """Usable cores beyond one for each of the run's processes on this machine and each of their workers."""
    return usable_cores() - int(os.environ.get("LOCAL_WORLD_SIZE", "1")) * (1 + num_workers)


@contextmanager
def lost_processes(run: Run) -> Iterator[None]:
    """Say which other process of the run is gone or did not answer in `process_timeout` seconds, and what to do.

    Raises:
        RuntimeError: in place of torch's own.
    """
    accelerator = run.accelerator
    with Peers(accelerator.process_index, accelerator.num_processes) as peers:
        try:
            yield
        except RuntimeError as error:
            # torch has classes for NCCL's failures; gloo's are told only by the source file that they name.
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise
            raise RuntimeError(
                f"Process {accelerator.process_index} lost {peers.lost()} at step {run.progress.step}, having waited "
                f"for up to process_timeout={run.config.process_timeout} seconds. What is "
                f"in {run.folder / 'checkpoints'} is good: the same command goes on from there. ({error})"
            ) from error
