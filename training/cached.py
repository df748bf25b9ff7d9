"""A contrastive batch of any size in the memory of a small one (GradCache; Gao et al. 2021, arXiv 2101.06983).

The loss needs the embeddings of all images at once, but the graphs of a few at a time are enough for its gradient:

1. Embed all micro-batches without graph, remembering the random state before each.
2. Compute the loss of all embeddings, and its gradient at each of them.
3. Embed each micro-batch again with graph, from the same views and the same random state, and pass its rows of that
   gradient backward.

The result is the gradient of the plain loss. It costs one more forward pass.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.checkpoint import get_device_states, set_device_states

from modeling_micl import MiclForPreTraining, MiclForPreTrainingOutput


# Runs the prepared model without loss on these rows of the process's images, with the same views each time.
Embed = Callable[[slice], MiclForPreTrainingOutput]


class RandomState:
    """The state now of all generators that a model's layers draw from."""

    def __init__(self, device: torch.device) -> None:
        self.device_type, self.cpu = device.type, torch.get_rng_state()
        self.devices, self.states = get_device_states(torch.empty(0, device=device))

    def restore(self) -> None:
        """Go back to it."""
        torch.set_rng_state(self.cpu)
        set_device_states(self.devices, self.states, device_type=self.device_type)


def cached_backward(
    accelerator: Accelerator, model: nn.Module, embed: Embed, images: int, images_per_pass: int
) -> MiclForPreTrainingOutput:
    """Add the gradient of the loss of all images to the parameters, with the graph of only one micro-batch at a time.

    Args:
        accelerator: that prepared the model.
        model: a prepared `MiclForPreTraining`.
        embed: runs it on some of the images.
        images: of this process.
        images_per_pass: of a micro-batch; divides `images`.

    Returns:
        Loss, logits, embeddings and views of all images, without graph.
    """
    micro_batches = [slice(first, first + images_per_pass) for first in range(0, images, images_per_pass)]

    # (1) All embeddings, without graph.
    random_states, outputs = [], []
    for rows in micro_batches:
        random_states.append(RandomState(accelerator.device))
        with torch.no_grad():
            outputs.append(embed(rows))
    view_embeds, ids_visible = (
        torch.cat([getattr(output, name) for output in outputs]) for name in ("view_embeds", "ids_visible")
    )

    # (2) Their loss and its gradient at each of them, over all processes if negatives are global.
    unwrapped = accelerator.unwrap_model(model)
    assert isinstance(unwrapped, MiclForPreTraining)
    view_embeds.requires_grad_()
    loss, logits = unwrapped.contrast(view_embeds)
    (gradient,) = torch.autograd.grad(loss, view_embeds)

    # (3) Each micro-batch again, with graph. Processes add up their gradients once, at the end.
    for rows, random_state in zip(micro_batches, random_states, strict=True):
        random_state.restore()
        synchronize = accelerator.sync_gradients and rows is micro_batches[-1]
        with nullcontext() if synchronize else accelerator.no_sync(model):
            again = embed(rows).view_embeds
            assert again is not None
            accelerator.backward((again * gradient[rows]).sum())
    return MiclForPreTrainingOutput(
        loss=loss.detach(), logits=logits.detach(), view_embeds=view_embeds.detach(), ids_visible=ids_visible
    )
