"""KL estimates: against loops, by hand, and in expectation over a vocabulary of three."""

import math

import pytest
import torch

from tests.objectives import loops
from tinyr2.objectives.kl import estimate

ALL = ("k1", "k2", "k3")


def _logits():
    rng = torch.Generator().manual_seed(4)
    learner, reference = (torch.randn(3, generator=rng, dtype=torch.float64) for _ in range(2))
    return learner.requires_grad_(), reference.log_softmax(-1)


def _true_kl(learner, reference):
    return (learner.exp() * (learner - reference)).sum()


def _expected_gradient(estimator):
    """The gradient of sg[p(y)] * estimate(y), summed over the vocabulary, beside that of the KL."""
    logits, reference = _logits()
    logp = logits.log_softmax(-1)
    (got,) = torch.autograd.grad((logp.exp().detach() * estimate(estimator, logp, reference)).sum(), logits,
                                 retain_graph=True)
    (exact,) = torch.autograd.grad(_true_kl(logp, reference), logits)
    return got, exact


@pytest.mark.parametrize("estimator", ALL)
def test_values_and_gradients_are_those_of_the_loops(estimator):
    rng = torch.Generator().manual_seed(0)
    learner, reference = (-3 * torch.rand(9, generator=rng, dtype=torch.float64) for _ in range(2))
    learner.requires_grad_()
    got = estimate(estimator, learner, reference)
    expected = [loops.estimate(estimator, a, b) for a, b in zip(learner, reference, strict=True)]
    assert got.tolist() == pytest.approx([x.item() for x in expected], rel=1e-10)
    slopes = [torch.autograd.grad(y, learner)[0] for y in (got.sum(), sum(expected))]
    torch.testing.assert_close(*slopes, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("estimator", "up", "down"), [
    ("k1", math.log(2), -math.log(2)), ("k2", math.log(2) ** 2 / 2, math.log(2) ** 2 / 2),
    ("k3", math.log(2) - 0.5, 1 - math.log(2))])
def test_estimates_of_twice_and_half_the_probability_by_hand(estimator, up, down):
    learner, reference = torch.tensor([0.5, 0.25]).log(), torch.tensor([0.25, 0.5]).log()
    assert estimate(estimator, learner, reference).tolist() == pytest.approx([up, down], rel=1e-6)


def test_a_policy_equal_to_its_reference_has_estimates_of_exactly_zero():
    logp = torch.tensor([-0.1, -7.3])
    assert all(estimate(e, logp, logp.clone()).tolist() == [0.0, 0.0] for e in ALL)


def test_k3_keeps_its_digits_for_small_gaps_in_float32():
    gap = torch.tensor([1e-3])
    assert estimate("k3", gap, torch.zeros(1)).item() == pytest.approx(1e-6 / 2 - 1e-9 / 6, rel=1e-3)


@pytest.mark.parametrize(("estimator", "unbiased"), [("k1", True), ("k2", False), ("k3", True)])
def test_in_value_k1_and_k3_are_unbiased_and_k2_is_not(estimator, unbiased):
    logits, reference = _logits()
    logp = logits.detach().log_softmax(-1)
    mean = (logp.exp() * estimate(estimator, logp, reference)).sum().item()
    exact = _true_kl(logp, reference).item()
    assert (abs(mean - exact) < 1e-12) == unbiased
    assert unbiased or abs(mean - exact) > 1e-2


def test_k1_as_a_loss_has_expected_gradient_zero():
    got, exact = _expected_gradient("k1")
    assert got.abs().max().item() <= 1e-15
    assert exact.abs().max().item() > 1e-2


def test_k2_as_a_loss_has_the_expected_gradient_of_the_kl():
    torch.testing.assert_close(*_expected_gradient("k2"), rtol=0, atol=1e-14)


def test_k3_as_a_loss_has_another_expected_gradient_than_the_kl():
    got, exact = _expected_gradient("k3")
    assert (got - exact).abs().max().item() > 1e-2
    # it is that of the forward KL, KL(reference || learner): p - q
    logits, reference = _logits()
    torch.testing.assert_close(got, (logits.softmax(-1) - reference.exp()).detach(), rtol=0, atol=1e-14)


def test_an_unknown_estimator_is_our_fault_and_stops():
    with pytest.raises(AssertionError, match="k1, k2 or k3"):
        estimate("k4", torch.zeros(1), torch.zeros(1))
