"""Identities of the bound against dense closed forms, in float64."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

from hf_uib import bound


def orthonormal(k, d, generator):
    return torch.linalg.qr(torch.randn(d, k, generator=generator, dtype=torch.float64)).Q.T


@pytest.mark.parametrize("rank_a", [3, 5])
@pytest.mark.parametrize("width", [0.0, 0.7])
def test_layer_kl_is_the_kl_of_dense_gaussians(rank_a, width):
    g = torch.Generator().manual_seed(0)
    out, d, k, floor = 4, 6, 2, 0.3
    new = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    v = orthonormal(k, d, g)
    a, b, a0, b0 = new(rank_a, d), new(out, rank_a), new(rank_a, d), new(out, rank_a)
    covariance = torch.kron(
        torch.eye(out, dtype=torch.float64), width**2 * v.T @ v + floor**2 * torch.eye(d, dtype=torch.float64)
    )
    q = MultivariateNormal(2.0 * (b @ a).flatten(), covariance)
    p = MultivariateNormal(2.0 * (b0 @ a0).flatten(), covariance)
    mine = bound.layer_kl(*bound.displacement(a, b, a0, b0, 2.0), v, width, floor)
    torch.testing.assert_close(mine, kl_divergence(q, p), rtol=1e-12, atol=1e-12)
    wrong = bound.layer_kl(*bound.displacement(a, b, a0, b0, 2.0), orthonormal(k, d, g), width, floor)
    assert width == 0 or abs(wrong - mine) > 1e-3  # the subspace matters


def test_layer_kl_does_not_depend_on_the_gauge():
    g = torch.Generator().manual_seed(1)
    new = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    a, b, a0, b0, r, v = new(3, 6), new(4, 3), new(3, 6), new(4, 3), new(3, 3), orthonormal(2, 6, g)
    first = bound.layer_kl(*bound.displacement(a, b, a0, b0), v, 0.5, 0.1)
    second = bound.layer_kl(*bound.displacement(r @ a, b @ torch.linalg.inv(r), a0, b0), v, 0.5, 0.1)
    torch.testing.assert_close(first, second, rtol=1e-9, atol=0)


def test_layer_kl_is_never_negative_near_the_mean():
    g = torch.Generator().manual_seed(2)
    v = orthonormal(3, 8, g).float()
    b = torch.randn(5, 3, generator=g)
    b0 = b + 1e-6 * torch.randn(5, 3, generator=g)
    nats = bound.layer_kl(*bound.displacement(v, b, v, b0), v, 0.5, 0.01)
    expected = (b.double() - b0.double()).square().sum() / (2 * (0.5**2 + 0.01**2))
    assert nats >= 0
    torch.testing.assert_close(nats.double(), expected, rtol=1e-3, atol=0)


def test_margin_is_the_log_odds():
    logits = torch.randn(7, 4, dtype=torch.float64)
    labels = torch.randint(0, 4, (7,))
    p = logits.softmax(-1).gather(1, labels[:, None]).squeeze(1)
    torch.testing.assert_close(bound.margin(logits, labels), p.log() - (1 - p).log())
    assert torch.isfinite(bound.margin(torch.tensor([[80.0, -80.0]]), torch.tensor([0]))).all()


def test_other_classes_kl():
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 4, (5,))
    assert bound.other_classes_kl(logits, logits.detach(), labels).abs() < 1e-12
    moved = logits.detach().clone()
    moved[torch.arange(5), labels] -= 3.0  # forgetting the own class costs nothing
    assert bound.other_classes_kl(moved, logits.detach(), labels).abs() < 1e-12
    moved[torch.arange(5), (labels + 1) % 4] += 1.0
    assert bound.other_classes_kl(moved, logits.detach(), labels) > 1e-3
    p = torch.tensor([0.0, 0.2, 0.8]), torch.tensor([0.0, 0.5, 0.5])
    by_hand = 0.2 * math.log(0.2 / 0.5) + 0.8 * math.log(0.8 / 0.5)
    value = bound.other_classes_kl(p[1][None].log(), p[0][None].log(), torch.tensor([0]))
    assert value.item() == pytest.approx(by_hand, abs=1e-6)


def test_capacity_and_annealing():
    assert bound.capacity(1.0) == pytest.approx(0.5 * math.log(2))
    assert bound.capacity(0.0) == math.inf
    assert [bound.anneal(t, 4) for t in (0, 1, 4, 9)] == [1.0, 0.75, 0.0, 0.0]
