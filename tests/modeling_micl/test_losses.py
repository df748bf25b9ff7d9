import math
from itertools import permutations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from modeling_micl import micl_loss, t_sp_similarity


def unit_vectors(batch_size: int = 5, num_views: int = 2, width: int = 8, seed: int = 0) -> Tensor:
    numbers = torch.randn(
        batch_size, num_views, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    return normalize(numbers, dim=-1)


@pytest.mark.parametrize(
    ("cosine", "kappa", "expected"),
    [
        (1.0, 0.3, 1.0),
        (-1.0, 0.3, 0.0),
        (0.0, 1 / 64, 0.5 / (1 + 1 / 64)),
        (0.0, 1.0, 0.25),
        (0.5, 2.0, 0.375),
        (0.5, -0.25, 0.75 / 0.875),
    ],
)
def test_t_sp_similarity_has_its_closed_form(cosine: float, kappa: float, expected: float) -> None:
    assert t_sp_similarity(torch.tensor(cosine), kappa).item() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("kappa", [-0.49, 0.0, 1 / 64, 10.0])
def test_t_sp_similarity_maps_cosines_onto_0_to_1_increasingly(kappa: float) -> None:
    similarity = t_sp_similarity(torch.linspace(-1, 1, 1001, dtype=torch.float64), kappa)
    assert (similarity.diff() > 0).all()
    assert similarity[[0, -1]].tolist() == pytest.approx([0, 1])


def test_t_sp_similarity_without_kappa_is_the_rescaled_cosine() -> None:
    cosine = torch.linspace(-1, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(t_sp_similarity(cosine, 1e-15), (1 + cosine) / 2)


def test_a_larger_kappa_separates_near_neighbours_more() -> None:
    near = torch.tensor([0.9, 1.0])
    gaps = [t_sp_similarity(near, kappa).diff().item() for kappa in (0, 1 / 64, 1, 10)]
    assert gaps == sorted(set(gaps))


@pytest.mark.parametrize("kappa", [1 / 64, 2.0])
def test_the_loss_of_two_views_is_the_mean_of_both_directions(kappa: float) -> None:
    views = unit_vectors()
    loss, logits = micl_loss(views, temperature=0.1, kappa=kappa)
    cosine = torch.einsum("id,jd->ij", views[:, 0], views[:, 1])
    expected = 0.5 * (1 + cosine) / (1 + kappa * (1 - cosine)) / 0.1
    own = torch.arange(5)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(loss, 0.5 * (cross_entropy(expected, own) + cross_entropy(expected.T, own)))


def test_cosine_similarity_leaves_the_cosines_as_they_are() -> None:
    views = unit_vectors()
    _, logits = micl_loss(views, temperature=0.25, kappa=5.0, similarity="cosine")
    torch.testing.assert_close(logits, views[:, 0] @ views[:, 1].T * 4)


def test_plain_cosine_at_double_temperature_is_t_sp_without_kappa() -> None:
    views = unit_vectors()
    t_sp, _ = micl_loss(views, temperature=0.07, kappa=0)
    cosine, _ = micl_loss(views, temperature=0.14, similarity="cosine")
    torch.testing.assert_close(t_sp, cosine)


@pytest.mark.parametrize("num_views", [2, 3])
def test_one_image_has_no_negatives_and_no_loss(num_views: int) -> None:
    views = unit_vectors(1, num_views).requires_grad_()
    loss, _ = micl_loss(views)
    loss.backward()
    assert loss == 0
    assert not views.grad.any()


@pytest.mark.parametrize("num_views", [2, 3])
def test_views_without_information_cost_the_logarithm_of_the_batch(num_views: int) -> None:
    loss, _ = micl_loss(torch.ones(6, num_views, 4) / 2)
    assert loss.item() == pytest.approx(math.log(6))


def test_more_than_two_views_are_averaged_over_their_ordered_pairs() -> None:
    views = unit_vectors(num_views=4)
    loss, logits = micl_loss(views)
    pairs = list(permutations(range(4), 2))
    two_views = [micl_loss(views[:, [a, b]]) for a, b in pairs]
    torch.testing.assert_close(loss, torch.stack([pair_loss for pair_loss, _ in two_views]).mean())
    torch.testing.assert_close(logits, torch.stack([pair_logits for _, pair_logits in two_views]))


@pytest.mark.parametrize(("similarity", "num_views"), [("t-sp", 2), ("t-sp", 3), ("cosine", 2)])
def test_the_gradient_is_the_finite_difference(similarity: str, num_views: int) -> None:
    views = unit_vectors(4, num_views).requires_grad_()
    assert torch.autograd.gradcheck(lambda embeds: micl_loss(embeds, 0.5, 0.3, similarity)[0], views)


def test_a_rotation_of_all_embeddings_changes_nothing() -> None:
    views = unit_vectors()
    rotation, _ = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))
    assert not torch.allclose(views @ rotation, views)
    torch.testing.assert_close(micl_loss(views @ rotation), micl_loss(views))


def test_the_order_of_the_images_changes_nothing() -> None:
    views = unit_vectors()
    torch.testing.assert_close(micl_loss(views.flip(0))[0], micl_loss(views)[0])


def test_in_a_single_process_global_negatives_are_the_local_ones() -> None:
    views = unit_vectors()
    torch.testing.assert_close(micl_loss(views, negatives="global"), micl_loss(views), rtol=0, atol=0)


def test_bf16_autocast_does_not_touch_the_similarities() -> None:
    views = unit_vectors(32, width=64).float()
    loss, logits = micl_loss(views)
    with torch.autocast("cpu", torch.bfloat16):
        loss_under_autocast, logits_under_autocast = micl_loss(views)
    assert logits_under_autocast.dtype == loss_under_autocast.dtype == torch.float32
    torch.testing.assert_close((loss_under_autocast, logits_under_autocast), (loss, logits), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"similarity": "dot"}, "similarity must be 't-sp' or 'cosine', got 'dot'"),
        ({"negatives": "all"}, "negatives must be 'local' or 'global', got 'all'"),
    ],
)
def test_an_unknown_option_names_the_known_ones(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        micl_loss(unit_vectors(), **arguments)
