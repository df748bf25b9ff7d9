"""What a step computes and how fast this machine could: operations counted, and the rate of a large matmul."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from training.timing import Step


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MATMUL_WIDTH = {"cpu": 2048, "cuda": 8192}


def count_gigaflop(loss: Callable[[], Tensor]) -> float:
    """GFLOP of matrix multiplications and convolutions in a loss and its gradient, counted while they run.

    A multiplication and an addition are two operations. Attention is computed without fused kernels here, as torch
    does not count that of the CPU.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss().backward()
    return float(counter.get_total_flops() / 1e9)


def large_matmul(device: torch.device, precision: str, width: int | None = None) -> tuple[Step, float]:
    """A product of two square matrices, and its GFLOP; what it takes shows how fast the device multiplies at best."""
    width = width or MATMUL_WIDTH[device.type]
    left, right, product = (torch.randn(width, width, device=device, dtype=DTYPES[precision]) for _ in range(3))

    def multiply() -> None:
        torch.mm(left, right, out=product)

    return multiply, 2 * width**3 / 1e9


def projected_hours(
    gigaflop_per_image: float,
    matmul_share: float,
    *,
    images: int = 1_281_167,
    epochs: int = 800,
    gpus: int = 4,
    teraflop_per_second: float = 312,
) -> float:
    """Hours of a training on other GPUs, if they compute with the same share of their matmul's rate as one measured.

    It is a lower bound. Assumed are that the GPUs multiply matrices as fast as their data sheet says, that several of
    them are as many times faster, and that they never wait for images, checkpoints or evaluations.

    Args:
        gigaflop_per_image: of a training step.
        matmul_share: the step's rate over that of a large matmul on the GPU measured, in (0, 1].
        images: of an epoch; by default those of ImageNet-1k.
        epochs: passes over them.
        gpus: how many.
        teraflop_per_second: of one GPU in bf16; by default the dense rate of NVIDIA's data sheet of the A100.
    """
    seconds = epochs * images * gigaflop_per_image / (gpus * matmul_share * teraflop_per_second * 1000)
    return seconds / 3600
