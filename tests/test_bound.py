"""Identities of the bound against dense closed forms, in float64."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

from hf_uib import divergence, objective, schedule


def orthonormal(k, d, generator):
    return torch.linalg.qr(torch.randn(d, k, generator=generator, dtype=torch.float64)).Q.T


def new(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("empty_rows", [0, 1])
@pytest.mark.parametrize("free", [True, False])
def test_the_kl_of_a_layer_is_that_of_dense_gaussians(empty_rows, free):
    """Outside V both have the variance floor^2 around their mean; along V nothing is counted."""
    g = torch.Generator().manual_seed(0)
    out, d, k, r, floor = 4, 6, 2, 3, 0.3
    a, b, a0, b0 = new(g, r, d), new(g, out, r), new(g, r, d), new(g, out, r)
    basis = orthonormal(d, d, g)  # V, and what is orthogonal to it
    v, counted = basis[:k], basis[k:] if free else basis
    gaussian = lambda m: MultivariateNormal(m.flatten(), floor**2 * torch.eye(m.numel(), dtype=torch.float64))
    expected = kl_divergence(gaussian(2 * b @ a @ counted.T), gaussian(2 * b0 @ a0 @ counted.T))

    def mine(subspace):
        padded = torch.cat([subspace, subspace.new_zeros(empty_rows, d)]) if free else None
        return divergence.outside(a, b, a0, b0, padded, 2.0) / (2 * floor**2)

    torch.testing.assert_close(mine(v), expected, rtol=1e-10, atol=1e-10)
    assert not free or abs(mine(orthonormal(k, d, g)) - expected) > 1e-3  # the subspace matters


def test_outside_is_that_of_the_dense_displacement_in_any_gauge():
    g = torch.Generator().manual_seed(1)
    a, b, a0, b0, r, v = new(g, 3, 6), new(g, 4, 3), new(g, 3, 6), new(g, 4, 3), new(g, 3, 3), orthonormal(2, 6, g)
    moved = 2 * (b @ a - b0 @ a0)
    dense = (moved - moved @ v.T @ v).square().sum()
    torch.testing.assert_close(divergence.outside(a, b, a0, b0, v, 2.0), dense, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        divergence.outside(r @ a, b @ torch.linalg.inv(r), a0, b0, v, 2.0), dense, rtol=1e-9, atol=0
    )
    assert divergence.outside(new(g, 3, 2) @ v, b, new(g, 3, 2) @ v, b0, v).abs() < 1e-12 * b.square().sum()
    many = [torch.stack([x, 2 * x]) for x in (a, b, a0, b0)]
    one_by_one = [divergence.outside(*(x[i] for x in many), v, s) for i, s in enumerate((2.0, 3.0))]
    together = divergence.outside(*many, torch.stack([v, v]), torch.tensor([2.0, 3.0]))
    torch.testing.assert_close(together, torch.stack(one_by_one), rtol=1e-12, atol=0)


@pytest.mark.parametrize("free", [True, False])
def test_the_gradient_of_outside(free):
    g = torch.Generator().manual_seed(3)
    factors = [new(g, 2, 3, 6), new(g, 2, 4, 3), new(g, 2, 3, 6), new(g, 2, 4, 3)]
    v = torch.stack([orthonormal(2, 6, g), orthonormal(2, 6, g)]) if free else None
    scaling = torch.tensor([2.0, 3.0], dtype=torch.float64)
    moving = [x.requires_grad_() for x in factors[:2]]
    assert torch.autograd.gradcheck(lambda a, b: divergence.outside(a, b, *factors[2:], v, scaling), moving)


def test_outside_keeps_its_digits_near_the_mean():
    g = torch.Generator().manual_seed(5)
    a0, b0, v = new(g, 3, 6).float(), new(g, 4, 3).float(), orthonormal(2, 6, g).float()
    a, b = a0 + 1e-4 * new(g, 3, 6).float(), b0 + 1e-4 * new(g, 4, 3).float()
    expected = divergence.outside(*(x.double() for x in (a, b, a0, b0, v)))
    torch.testing.assert_close(divergence.outside(a, b, a0, b0, v).double(), expected, rtol=1e-3, atol=0)


def test_margin_is_the_log_odds():
    logits = torch.randn(7, 4, dtype=torch.float64)
    labels = torch.randint(0, 4, (7,))
    p = logits.softmax(-1).gather(1, labels[:, None]).squeeze(1)
    torch.testing.assert_close(objective.margin(logits, labels), p.log() - (1 - p).log())
    assert torch.isfinite(objective.margin(torch.tensor([[80.0, -80.0]]), torch.tensor([0]))).all()


def test_other_classes_kl():
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 4, (5,))
    assert objective.other_classes_kl(logits, logits.detach(), labels).abs() < 1e-12
    moved = logits.detach().clone()
    moved[torch.arange(5), labels] -= 3.0  # forgetting the own class costs nothing
    assert objective.other_classes_kl(moved, logits.detach(), labels).abs() < 1e-12
    moved[torch.arange(5), (labels + 1) % 4] += 1.0
    assert objective.other_classes_kl(moved, logits.detach(), labels) > 1e-3
    p = torch.tensor([0.0, 0.2, 0.8]), torch.tensor([0.0, 0.5, 0.5])
    by_hand = 0.2 * math.log(0.2 / 0.5) + 0.8 * math.log(0.8 / 0.5)
    value = objective.other_classes_kl(p[1][None].log(), p[0][None].log(), torch.tensor([0]))
    assert value.item() == pytest.approx(by_hand, abs=1e-6)


def test_the_noise_falls_with_the_root():
    assert [schedule.noise_scale(t, 4) for t in (0, 1, 4, 9)] == [1.0, 0.75**0.5, 0.0, 0.0]


def test_rank_z_is_mann_and_whitney_s():
    from scipy.stats import mannwhitneyu

    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(40, generator=generator) - 0.5, torch.randn(70, generator=generator)
    found = objective.rank_z(first, second)
    expected = mannwhitneyu(first.numpy(), second.numpy(), method="asymptotic", use_continuity=False)
    assert (
        found < 0
        and abs(2 * (1 - torch.distributions.Normal(0, 1).cdf(torch.tensor(-found))).item() - expected.pvalue) < 1e-5
    )
    assert abs(found + objective.rank_z(second, first)) < 1e-9 and objective.rank_z(first, first) == 0
