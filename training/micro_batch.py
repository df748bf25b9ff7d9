"""How many images fit into memory at once, found by trying."""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn

from training.batch_size import divisors
from training.cached import TOGETHER, RandomState


def largest_micro_batch(accelerator: Accelerator, images: int, attempt: Callable[[int], None]) -> int:
    """The largest micro-batch that every process has the memory for.

    Args:
        accelerator: of the processes; none may wait for another within an attempt.
        images: of each process; the micro-batch divides them.
        attempt: runs a forward and a backward pass on so many images, or fails for want of memory.

    Raises:
        ValueError: if a single image is too much for a process.
    """
    largest = 0
    for size in reversed(divisors(images)):
        clear_device_cache(garbage_collection=True)
        try:
            attempt(size)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
        else:
            largest = size
            break
    sizes = accelerator.gather(torch.tensor([largest], device=accelerator.device))
    if not sizes.all():
        raise ValueError(
            "find_micro_batch: not even one image fits into memory. Set gradient_checkpointing, or shrink the model."
        )
    return int(sizes.min())


def find_micro_batch(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    embed: Callable[[int], Tensor],
    images: int,
) -> int:
    """Search for the largest micro-batch with real passes; leaves weights, gradients and random state as they were.

    Args:
        accelerator: that prepared the model.
        model: in training mode, without gradients.
        optimizer: of its parameters; it makes no step.
        embed: runs the model on so many images and returns the embeddings.
        images: of each process; the micro-batch divides them.

    Raises:
        ValueError: if a single image is too much for a process, or with FSDP.
    """
    if accelerator.distributed_type == DistributedType.FSDP:  # a process out of memory would leave the others waiting
        raise ValueError("find_micro_batch does not work with FSDP: give per_device_micro_batch_size.")
    random_state = RandomState(accelerator.device)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def attempt(size: int) -> None:
        # What AdamW's two moments will take, which come with the first step.
        moments = [torch.empty_like(parameter) for parameter in parameters for _ in range(0 if optimizer.state else 2)]
        for _ in range(2):  # the gradients, which come with the first pass, are there in the second
            with accelerator.no_sync(model):
                accelerator.backward(embed(size).sum())
        with torch.no_grad():  # in a model of few layers this takes more
            embed(min(TOGETHER * size, images))
        del moments

    try:
        return largest_micro_batch(accelerator, images, attempt)
    finally:
        model.zero_grad()
        random_state.restore()
