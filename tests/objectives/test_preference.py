"""Pair losses: against loops in float64, values and gradients, and by hand."""

import math

import pytest
import torch

from tests.objectives import loops
from tinyr2.objectives.preference import bradley_terry, dpo_loss


def _pairs(n=6):
    rng = torch.Generator().manual_seed(0)
    return [(3 * torch.randn(n, generator=rng, dtype=torch.float64)).requires_grad_() for _ in range(2)]


def _assert_same(got, expected, inputs):
    assert got.item() == pytest.approx(expected.item(), rel=1e-10)
    for a, b in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs), strict=True):
        assert b.abs().max() > 1e-4
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_dpo_is_that_of_the_loops(beta, label_smoothing):
    chosen, rejected = _pairs()
    got = dpo_loss(chosen, rejected, beta=beta, label_smoothing=label_smoothing, denom=5)
    _assert_same(got, loops.dpo_loss(chosen, rejected, beta, label_smoothing, 5), [chosen, rejected])


@pytest.mark.parametrize("margin", [0.0, 0.5, "each"])
@pytest.mark.parametrize("center", [0.0, 0.01])
def test_bradley_terry_is_that_of_the_loops(margin, center):
    chosen, rejected = _pairs()
    each = [0.1 * i for i in range(6)] if margin == "each" else [margin] * 6
    given = torch.tensor(each, dtype=torch.float64) if margin == "each" else margin
    got = bradley_terry(chosen, rejected, margin=given, center=center, denom=6)
    _assert_same(got, loops.bradley_terry(chosen, rejected, each, center, 6), [chosen, rejected])


def test_dpo_of_two_pairs_by_hand():
    chosen, rejected = torch.tensor([2.0, -1.0], requires_grad=True), torch.tensor([0.0, 0.0])
    loss = dpo_loss(chosen, rejected, beta=0.5, denom=2)
    loss.backward()
    assert loss.item() == pytest.approx((math.log1p(math.exp(-1)) + math.log1p(math.exp(0.5))) / 2, rel=1e-6)
    expected = [-0.25 / (1 + math.exp(1)), -0.25 / (1 + math.exp(-0.5))]
    assert chosen.grad.tolist() == pytest.approx(expected, rel=1e-6)


def test_a_policy_equal_to_its_reference_has_loss_log_two_and_still_learns():
    chosen, rejected = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    loss = dpo_loss(chosen, rejected, beta=0.1, denom=3)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
    assert chosen.grad.tolist() == pytest.approx([-0.05 / 3] * 3, rel=1e-6)
    assert rejected.grad.tolist() == pytest.approx([0.05 / 3] * 3, rel=1e-6)


def test_swapped_pairs_under_full_label_smoothing_are_the_pairs():
    chosen, rejected = _pairs()
    swapped = dpo_loss(rejected, chosen, label_smoothing=1.0, denom=6)
    assert swapped.item() == pytest.approx(dpo_loss(chosen, rejected, denom=6).item(), rel=1e-12)


def test_bradley_terry_by_hand():
    one = torch.tensor([1.0])
    assert bradley_terry(one, 0 * one, denom=1).item() == pytest.approx(math.log1p(math.exp(-1)), rel=1e-6)
    assert bradley_terry(one, 0 * one, margin=1.0, denom=1).item() == pytest.approx(math.log(2), rel=1e-6)
    assert bradley_terry(one, one, center=0.5, denom=1).item() == pytest.approx(math.log(2) + 2, rel=1e-6)


def test_scores_far_apart_in_the_wrong_order_keep_a_finite_loss_and_gradient():
    chosen = torch.tensor([-1e4], requires_grad=True)
    rejected = -chosen.detach()
    for loss in (bradley_terry(chosen, rejected, denom=1), dpo_loss(chosen, rejected, beta=1.0, denom=1)):
        assert loss.item() == pytest.approx(2e4)
        assert torch.autograd.grad(loss, chosen)[0].item() == -1.0


def test_parts_of_a_step_add_up_to_the_whole():
    chosen, rejected = (x.detach() for x in _pairs())
    for loss in (dpo_loss, bradley_terry):
        parts = [loss(chosen[s], rejected[s], denom=6) for s in (slice(0, 1), slice(1, 4), slice(4, 6))]
        assert sum(parts).item() == pytest.approx(loss(chosen, rejected, denom=6).item(), rel=1e-12)
        assert loss(chosen[:0], rejected[:0], denom=6).item() == 0.0
