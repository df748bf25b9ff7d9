"""A contrastive batch of any size in the memory of a small one (GradCache; Gao et al. 2021, arXiv 2101.06983).

The loss needs the embeddings of all images at once, but the graph of a few at a time is enough for its gradient:

1. Embed all micro-batches, remembering the random state before each. Only the last one keeps its graph. Without, some
   go through together, which is faster and takes less memory than a graph of one, unless layers are checkpointed; each
   goes alone where layers draw random numbers.
2. Compute the loss of all embeddings, and its gradient at each of them.
3. Pass the last micro-batch's rows of that gradient backward. Embed each other micro-batch again with graph, from the
   same views and the same random state, and do the same.

The result is the gradient of the plain loss. It costs one more forward pass of all micro-batches but the last.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from modeling_micl import MiclConfig, MiclForPreTraining, MiclForPreTrainingOutput


TOGETHER = 4  # micro-batches that go through without graph at once
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
        images_per_pass: of a micro-batch; divides `images`, less than them.

    Returns:
        Loss, logits, embeddings and views of all images, without graph.
    """
    micro_batches = [slice(first, first + images_per_pass) for first in range(0, images, images_per_pass)]
    *others, last = micro_batches
    unwrapped = accelerator.unwrap_model(model, keep_torch_compile=False)
    assert isinstance(unwrapped, MiclForPreTraining)
    alone = unwrapped.is_activation_checkpointing or draws_random_numbers(unwrapped.config)
    together = 1 if alone else TOGETHER
    size = together * images_per_pass
    without_graph = [slice(first, min(first + size, last.start)) for first in range(0, last.start, size)]

    # (1) All embeddings. Processes add up their gradients once, in the last backward pass.
    random_states, outputs = [], []
    with accelerator.no_sync(model):
        for rows in [*without_graph, last]:
            random_states.append(RandomState(accelerator.device))
            with torch.set_grad_enabled(rows is last):
                outputs.append(embed(rows))
    random_state_afterwards = RandomState(accelerator.device)
    view_embeds, ids_visible = (
        torch.cat([getattr(output, name).detach() for output in outputs]) for name in ("view_embeds", "ids_visible")
    )

    # (2) Their loss and its gradient at each of them, over all processes if negatives are global.
    view_embeds.requires_grad_()
    loss, logits = unwrapped.contrast(view_embeds)
    (gradient,) = torch.autograd.grad(loss, view_embeds)

    # (3) Back through the graph that is there, then through that of each other micro-batch, one at a time.
    with accelerator.no_sync(model):
        _pass_backward(accelerator, outputs.pop(), gradient[last])
    for number, rows in enumerate(others):
        random_states[number // together].restore()
        synchronize = accelerator.sync_gradients and rows is others[-1]
        with nullcontext() if synchronize else accelerator.no_sync(model):
            _pass_backward(accelerator, embed(rows), gradient[rows])
    random_state_afterwards.restore()
    return MiclForPreTrainingOutput(
        loss=loss.detach(), logits=logits.detach(), view_embeds=view_embeds.detach(), ids_visible=ids_visible
    )


def draws_random_numbers(config: MiclConfig) -> bool:
    """Whether the layers do; the published pre-training has neither dropout nor drop path."""
    return max(config.hidden_dropout_prob, config.attention_probs_dropout_prob, config.drop_path_rate) > 0


def _pass_backward(accelerator: Accelerator, output: MiclForPreTrainingOutput, gradient: Tensor) -> None:
    assert output.view_embeds is not None
    accelerator.backward((output.view_embeds * gradient).sum())
