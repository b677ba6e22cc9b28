"""Soft and hard targets, and hidden states: numbers by hand, and loops."""

import math

import pytest
import torch

from tinyr2.objectives.distillation import by_entropy, hidden_gap, linear, soft_hard


def _normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_soft_and_hard_terms_by_hand():
    divergence, nll = torch.tensor([0.5, 1.0]), torch.tensor([2.0, 4.0])
    loss = soft_hard(divergence, nll, temperature=2.0, soft_weight=0.25, hard_weight=0.5, denom=10)
    assert loss.item() == pytest.approx((0.25 * 4 * 1.5 + 0.5 * 6.0) / 10)
    each = soft_hard(divergence, nll, temperature=2.0, soft_weight=torch.tensor([1.0, 0.0]),
                     hard_weight=torch.tensor([0.0, 1.0]), denom=2)
    assert each.item() == pytest.approx((4 * 0.5 + 4.0) / 2)


def test_the_gradient_reaches_both_terms_and_no_weight():
    divergence, nll, weight = (_normal(5, seed=i).requires_grad_() for i in range(3))
    loss = soft_hard(divergence, nll, temperature=3.0, soft_weight=weight, hard_weight=1 - weight, denom=7)
    loss.backward()
    torch.testing.assert_close(divergence.grad, 9 * weight.detach() / 7, rtol=0, atol=1e-12)
    torch.testing.assert_close(nll.grad, (1 - weight.detach()) / 7, rtol=0, atol=1e-12)
    assert weight.grad is None


def test_with_t_squared_the_gradient_of_soft_targets_hardly_depends_on_a_high_temperature():
    student, teacher, sizes = _normal(1, 6).requires_grad_(), _normal(1, 6, seed=1), []
    for temperature in (50.0, 100.0):
        s, t = ((x / temperature).log_softmax(-1) for x in (student, teacher))
        divergence = (t.exp() * (t - s)).sum(-1)
        loss = soft_hard(divergence, torch.zeros(1), temperature=temperature, soft_weight=1.0, hard_weight=0.0, denom=1)
        sizes.append(torch.autograd.grad(loss, student)[0].norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


def test_an_unsure_teacher_leaves_the_token_to_the_data():
    entropy = torch.tensor([0.0, math.log(8) / 2, math.log(8), math.log(8) + 1e-6], requires_grad=True)
    share = by_entropy(entropy, 0.6, 8)
    assert share.tolist() == pytest.approx([0.6, 0.3, 0.0, 0.0], abs=1e-6)
    assert share.min().item() >= 0.0 and not share.requires_grad


def test_a_linear_weight_begins_and_ends_where_it_should():
    assert [linear(0.2, 0.05, p) for p in (0.0, 0.5, 1.0)] == pytest.approx([0.2, 0.125, 0.05])


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_the_distance_of_states_is_that_of_the_loop_and_moves_the_student_alone(kind):
    student, teacher = _normal(4, 3).requires_grad_(), _normal(4, 3, seed=1).requires_grad_()
    got = hidden_gap(student, teacher, kind)
    for i in range(4):
        s, t = student[i].tolist(), teacher[i].tolist()
        expected = sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / 3
        if kind == "cosine":
            expected = 1 - sum(a * b for a, b in zip(s, t, strict=True)) / (math.hypot(*s) * math.hypot(*t))
        assert got[i].item() == pytest.approx(expected, abs=1e-12)
    got.sum().backward()
    assert teacher.grad is None and student.grad.abs().max() > 0


def test_cosine_is_0_for_the_same_direction_and_2_for_the_opposite_one():
    state = _normal(1, 5)
    assert hidden_gap(3 * state, state, "cosine").item() == pytest.approx(0.0, abs=1e-12)
    assert hidden_gap(-state, 2 * state, "cosine").item() == pytest.approx(2.0)


def test_a_state_of_zeros_stays_finite():
    student = torch.zeros(1, 3, requires_grad=True)
    gap = hidden_gap(student, torch.ones(1, 3), "cosine")
    gap.sum().backward()
    assert gap.isfinite().all() and student.grad.isfinite().all()
