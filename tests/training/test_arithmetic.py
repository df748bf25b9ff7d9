"""Operations are those of the step, however attention is computed; a projection says what it says."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from training.arithmetic import count_gigaflop, large_matmul, projected_hours


def test_a_product_and_its_two_gradients_are_counted() -> None:
    left, right = torch.randn(10, 20, requires_grad=True), torch.randn(20, 30, requires_grad=True)
    assert count_gigaflop(lambda: (left @ right).sum()) == pytest.approx(3 * 2 * 10 * 20 * 30 / 1e9)
    assert left.grad is not None


def test_fused_attention_is_counted() -> None:
    q, k, v = (torch.randn(2, 3, 5, 8, requires_grad=True) for _ in "qkv")
    products = 2 * 2 * 3 * 5 * 5 * 8 * 2
    assert count_gigaflop(lambda: scaled_dot_product_attention(q, k, v).sum()) == pytest.approx(3 * products / 1e9)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_matmul_does_what_it_says(precision: str) -> None:
    multiply, gigaflop = large_matmul(torch.device("cpu"), precision, width=64)
    multiply()
    assert gigaflop == 2 * 64**3 / 1e9


def test_projected_hours() -> None:
    # 36.3 GFLOP at half of 312 TFLOP/s is 0.2327 ms on one GPU; 1,281,167 · 800 images on four: 16.56 h.
    assert projected_hours(36.3, 0.5) == pytest.approx(16.56, abs=0.005)
    assert projected_hours(36.3, 0.25, gpus=8) == projected_hours(36.3, 0.5)
    assert projected_hours(36.3, 0.5, epochs=1, images=3600, gpus=1, teraflop_per_second=1) == pytest.approx(0.0726)
