"""What a training step costs in time and memory: the model, optimiser and losses of training, on random images.

Peak memory is measured for every way to make the step, over two steps (the first makes the gradients and AdamW's
moments, the second has them from its start):

- on a CUDA GPU it is `torch.cuda.max_memory_allocated()`: all that PyTorch holds for it, weights included;
- on the CPU, in a process of its own, it is the growth of the process's peak resident set,
  `getrusage(RUSAGE_SELF).ru_maxrss` after the steps minus before the first: gradients, moments and activations, and
  some code that is loaded then, but neither weights nor images, which are there before. There glibc is told to give
  back the memory of each freed tensor at once; by itself it keeps a changing part of it, which blurs what is compared.

So the ratios of one device can be compared, not the numbers of the two.
"""

import resource
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch.nn.functional import normalize

from modeling_micl import MiclConfig, MiclForPreTrainingOutput
from training.allocator import give_back_freed_memory
from training.cached import cached_backward
from training.features import normalize_pixels
from training.plain_step import micl_model, pretraining_optimizer, random_pixels
from training.processes import use_all_cores
from training.timing import Step


@dataclass(frozen=True)
class Way:
    """How a contrastive batch becomes a training step.

    Args:
        images: contrasted together.
        micro_batch: images that go through the model at once; fewer than all of them means the cached loss.
        gradient_checkpointing: whether each layer is recomputed in the backward pass.
    """

    images: int
    micro_batch: int
    gradient_checkpointing: bool = False

    @property
    def name(self) -> str:
        """In words, without the size of the batch."""
        loss = "plain" if self.micro_batch == self.images else f"cached, {self.micro_batch} at once"
        return f"{loss}, checkpointing" if self.gradient_checkpointing else loss


class Learner:
    """A model in training, with random weights and random images that are on the CPU as if they had been decoded.

    Args:
        accelerator: device and precision.
        config: of the model.
        most_images: of the largest batch.
    """

    def __init__(self, accelerator: Accelerator, config: MiclConfig, most_images: int) -> None:
        use_all_cores(accelerator)
        self.accelerator, device = accelerator, accelerator.device
        self.pixels = random_pixels(most_images, config)
        self.view_embeds = normalize(torch.randn(most_images, config.num_views, config.hidden_size), dim=-1).to(device)
        self.unwrapped = micl_model(config, device)
        self.model, self.optimizer = accelerator.prepare(self.unwrapped, pretraining_optimizer(self.unwrapped))

    def step(self, way: Way) -> None:
        """Forward, backward and optimiser."""
        if way.gradient_checkpointing:
            self.unwrapped.activation_checkpointing_enable()
        else:
            self.unwrapped.activation_checkpointing_disable()
        noise = torch.rand(way.images, self.unwrapped.config.num_patches, device=self.accelerator.device)

        def embed(rows: slice, return_loss: bool = False) -> MiclForPreTrainingOutput:
            pixels = normalize_pixels(self.pixels[rows].to(self.accelerator.device, non_blocking=True))
            output: MiclForPreTrainingOutput = self.model(pixels, noise=noise[rows], return_loss=return_loss)
            return output

        if way.micro_batch == way.images:
            self.accelerator.backward(embed(slice(way.images), return_loss=True).loss)
        else:
            cached_backward(self.accelerator, self.model, embed, way.images, way.micro_batch)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def contrast(self, images: int) -> None:
        """The similarity matrix and the loss of so many embedded images alone, forward and backward."""
        view_embeds = self.view_embeds[:images].requires_grad_()
        loss, _ = self.unwrapped.contrast(view_embeds)
        torch.autograd.grad(loss, view_embeds)


def peak_memories(device: torch.device, builds: Sequence[Callable[[], Step]]) -> list[int | None]:
    """Peak memory of each step in bytes, as defined above; None where the memory does not suffice.

    Args:
        device: that they run on.
        builds: each makes a step, on the CPU in a process of its own, so that it must be picklable.

    Raises:
        RuntimeError: if a process is ended for want of memory, as systems do on the CPU.
    """
    if device.type == "cuda":
        return [_peak_of_gpu(build) for build in builds]
    # A process that is started by another takes over its ru_maxrss, one that the fork server makes does not.
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(max_workers=1, mp_context=context, max_tasks_per_child=1) as processes:
        try:
            return [processes.submit(_peak_of_process, build).result() for build in builds]
        except BrokenProcessPool as error:
            raise RuntimeError(
                "A process was ended from outside, most likely for want of memory: measure fewer images at once."
            ) from error


def way_step(mixed_precision: str, config: MiclConfig, way: Way) -> Step:
    """A step of a new learner, for `peak_memories`."""
    return partial(Learner(Accelerator(mixed_precision=mixed_precision), config, way.images).step, way)


def _peak_of_gpu(build: Callable[[], Step]) -> int | None:
    clear_device_cache(garbage_collection=True)  # of the step before
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fits = _fits(build())
    return torch.cuda.max_memory_allocated() - held if fits else None


def _peak_of_process(build: Callable[[], Step]) -> int | None:
    give_back_freed_memory()
    step = build()
    before = _peak_resident_set()
    return _peak_resident_set() - before if _fits(step) else None


def _fits(step: Step) -> bool:
    """Make two steps; returns whether the memory sufficed."""
    try:
        for _ in range(2):
            step()
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        return False
    return True


def _peak_resident_set() -> int:
    """In bytes; the system call counts in KiB, but in bytes on macOS."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
