"""Policy-gradient losses and what weighs them: by hand, and against loops in float64, values and gradients."""

import math

import pytest
import torch

from tests.objectives import loops
from tinyr2.objectives.policy import (
    Ratio,
    clipped,
    clipped_surrogate,
    importance_weight,
    sampled_reverse_kl,
    sequence_ratio,
    token_weight,
    truncated_importance,
    weighted_nll,
)

LENGTHS = [3, 1, 0, 6, 2]
NAN = float("nan")


def _random(seed=0, scale=1.0):
    return scale * torch.randn(12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _assert_same(got, expected, leaf):
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)
    slopes = [torch.autograd.grad(y, leaf)[0] for y in (got, expected)]
    assert slopes[1].abs().max() > 1e-3
    torch.testing.assert_close(*slopes, rtol=1e-10, atol=1e-14)


def test_sampled_reverse_kl_pulls_up_what_the_teacher_likes_more():
    learner = torch.tensor([-1.0, -2.0], requires_grad=True)
    sampled_reverse_kl(learner, torch.tensor([-0.5, -4.0]), denom=2).backward()
    assert learner.grad.tolist() == [-0.25, 1.0]


def test_weight_one_is_the_mean_negative_log_likelihood():
    logp = torch.tensor([-1.0, -2.0, -6.0], requires_grad=True)
    loss = weighted_nll(logp, denom=3)
    loss.backward()
    assert loss.item() == 3.0
    assert logp.grad.tolist() == pytest.approx([-1 / 3] * 3)


def test_the_gradient_is_minus_the_weight_over_the_denominator():
    logp = torch.zeros(3, requires_grad=True)
    weighted_nll(logp, torch.tensor([1.0, 0.0, -1.0]), denom=4).backward()
    assert logp.grad.tolist() == [-0.25, 0.0, 0.25]


def test_a_weight_that_was_computed_from_the_learner_is_held_constant():
    logp = torch.tensor([-1.0, -3.0], requires_grad=True)
    weighted_nll(logp, 2 * logp, denom=1).backward()
    assert logp.grad.tolist() == [2.0, 6.0]


def test_parts_of_a_step_add_up_to_the_whole():
    logp, weight = torch.linspace(-3, -0.1, 7, dtype=torch.float64), torch.linspace(-1, 2, 7, dtype=torch.float64)
    parts = [weighted_nll(logp[s], weight[s], denom=7) for s in (slice(4, 7), slice(0, 1), slice(1, 4))]
    assert sum(parts).item() == pytest.approx(weighted_nll(logp, weight, denom=7).item(), abs=1e-15)


def test_no_tokens_give_loss_zero():
    empty = torch.zeros(0, requires_grad=True)
    assert weighted_nll(empty, torch.zeros(0), denom=5).item() == 0.0
    assert sampled_reverse_kl(empty, torch.zeros(0), denom=5).item() == 0.0


def test_importance_weights_by_hand():
    learner = torch.tensor([0.9, 0.2, 0.5, 0.25]).log()
    actor = torch.tensor([0.3, 0.4, 0.5, float("nan")]).log()
    assert truncated_importance(learner, actor, 2.0).tolist() == pytest.approx([2.0, 0.5, 1.0, 1.0])
    assert truncated_importance(learner, actor, 5.0).tolist() == pytest.approx([3.0, 0.5, 1.0, 1.0])
    assert truncated_importance(learner, actor, 0.4).tolist() == pytest.approx([0.4, 0.4, 0.4, 1.0])


def test_an_importance_weight_is_held_constant():
    logp = torch.tensor([-1.0, -2.0], requires_grad=True)
    weight = truncated_importance(logp, torch.tensor([-2.0, -1.0]), 2.0)
    assert not weight.requires_grad
    weighted_nll(logp, weight, denom=1).backward()
    assert logp.grad.tolist() == pytest.approx([-2.0, -math.exp(-1.0)])


def test_a_weighted_sampled_reverse_kl_weighs_each_token_and_weight_one_is_none():
    learner, teacher = torch.tensor([-1.0, -2.0], requires_grad=True), torch.tensor([-0.5, -4.0])
    sampled_reverse_kl(learner, teacher, torch.tensor([0.5, 2.0]), denom=2).backward()
    assert learner.grad.tolist() == [-0.125, 2.0]
    plain, weighed = (sampled_reverse_kl(learner, teacher, w, denom=2) for w in (None, torch.ones(2)))
    assert plain.item() == weighed.item()


def test_the_likelihood_losses_are_those_of_the_loops():
    logp, teacher, weight = _random(0).requires_grad_(), _random(1), _random(2)
    _assert_same(weighted_nll(logp, weight, denom=7), loops.weighted_nll(logp, weight, 7), logp)
    _assert_same(sampled_reverse_kl(logp, teacher, weight, denom=7),
                 loops.sampled_reverse_kl(logp, teacher, weight, 7), logp)


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.2, 0.28), (3e-4, 4e-4), (10.0, 10.0)])
@pytest.mark.parametrize("dual", [None, 1.1, 3.0])
def test_the_clipped_surrogate_is_that_of_the_loops(low, high, dual):
    log_ratio, advantage = _random(3, 0.6).requires_grad_(), _random(4)
    got = clipped_surrogate(log_ratio, advantage, low=low, high=high, dual=dual)
    expected = [loops.clipped_surrogate(x, a, low, high, dual) for x, a in zip(log_ratio, advantage, strict=True)]
    assert got.tolist() == pytest.approx([x.item() for x in expected], rel=1e-10)
    _assert_same(got.sum(), sum(expected), log_ratio)


@pytest.mark.parametrize(("ratio", "advantage", "loss", "slope"), [
    (1.5, -1.0, 1.5, 1.5), (0.5, -1.0, 0.8, 0.0),   # with A outside of the min they would be 1.2 and 0.5
    (1.5, 1.0, -1.2, 0.0), (0.5, 1.0, -0.5, -0.5), (1.0, 2.0, -2.0, -2.0), (1.0, -2.0, 2.0, 2.0), (7.0, 0.0, 0.0, 0.0)])
def test_the_clipped_surrogate_by_hand(ratio, advantage, loss, slope):
    log_ratio = torch.tensor([ratio], dtype=torch.float64).log().requires_grad_()
    got = clipped_surrogate(log_ratio, torch.tensor([advantage], dtype=torch.float64), low=0.2, high=0.2)
    got.sum().backward()
    assert got.item() == pytest.approx(loss, rel=1e-12)
    assert log_ratio.grad.item() == pytest.approx(slope, rel=1e-12)


def test_the_dual_clip_bounds_what_a_bad_token_costs_and_leaves_good_ones():
    log_ratio = torch.tensor([5.0, 2.0, 5.0]).log().requires_grad_()
    got = clipped_surrogate(log_ratio, torch.tensor([-1.0, -1.0, 1.0]), low=0.2, high=0.2, dual=3.0)
    got.sum().backward()
    assert got.tolist() == pytest.approx([3.0, 2.0, -1.2])
    assert log_ratio.grad.tolist() == pytest.approx([0.0, 2.0, 0.0])
    with pytest.raises(AssertionError, match="above 1"):
        clipped_surrogate(log_ratio, torch.ones(3), low=0.2, high=0.2, dual=0.5)


def test_the_advantage_of_the_surrogate_is_held_constant():
    log_ratio, advantage = torch.zeros(2, requires_grad=True), torch.ones(2, requires_grad=True)
    clipped_surrogate(log_ratio, advantage, low=0.2, high=0.2).sum().backward()
    assert advantage.grad is None


def test_on_policy_the_gradient_is_minus_the_advantage():
    log_ratio, advantage = torch.zeros(12, dtype=torch.float64, requires_grad=True), _random(4)
    clipped_surrogate(log_ratio, advantage, low=0.2, high=0.28, dual=3.0).sum().backward()
    assert torch.equal(log_ratio.grad, -advantage)


@pytest.mark.parametrize("advantage", [1.0, 0.0])
def test_a_clipped_ratio_beyond_float32_has_gradient_zero(advantage):
    log_ratio = torch.tensor([200.0], requires_grad=True)
    clipped_surrogate(log_ratio, torch.tensor([advantage]), low=0.2, high=0.2).sum().backward()
    assert log_ratio.grad.item() == 0.0


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.2, 0.28), (10.0, 10.0)])
def test_clipped_marks_the_tokens_whose_gradient_the_clip_removed(low, high):
    log_ratio, advantage = _random(3, 0.6).requires_grad_(), _random(4)
    below, above = clipped(log_ratio, advantage, low, high)
    expected = [loops.clipped(x.item(), a.item(), low, high) for x, a in zip(log_ratio, advantage, strict=True)]
    assert list(zip(below.tolist(), above.tolist(), strict=True)) == expected
    clipped_surrogate(log_ratio, advantage, low=low, high=high).sum().backward()
    assert torch.equal(below | above, log_ratio.grad == 0)
    assert low > 1 or (below.any() and above.any())


def test_where_the_advantage_is_zero_nothing_was_clipped():
    below, above = clipped(torch.tensor([3.0, -3.0]), torch.zeros(2), 0.2, 0.2)
    assert not below.any() and not above.any()


@pytest.mark.parametrize("level", ["sequence_mean", "sequence"])
def test_a_sequence_ratio_in_chunks_has_the_value_and_gradient_of_whole_answers(level):
    learner, old = _random(5, 0.3).requires_grad_(), _random(6, 0.3)
    credit = [0.7, -1.2, 5.0, 0.4, -0.3]
    advantage = torch.tensor([a for a, n in zip(credit, LENGTHS, strict=True) for _ in range(n)], dtype=torch.float64)
    ratio = sequence_ratio(learner.detach(), old, LENGTHS, level=level)
    weight = token_weight(LENGTHS, aggregation="sequence", tokens=12, sequences=5, dtype=torch.float64)
    got = 0.0
    for part in (slice(0, 5), slice(5, 6), slice(6, 12)):
        log_ratio = ratio.log_ratio(learner[part], part)
        got = got + (weight[part] * clipped_surrogate(log_ratio, advantage[part], low=0.2, high=0.2)).sum()
    rows = zip(loops.split(learner, LENGTHS), loops.split(old, LENGTHS), credit, strict=True)
    expected = sum(loops.clipped_surrogate(loops.sequence_log_ratio(a, b, level), x, 0.2, 0.2) for a, b, x in rows
                   if a) / 5
    _assert_same(got, expected, learner)


def test_sequence_ratios_by_hand():
    learner, old = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.5, -2.25, -2.0])
    mean, whole = (sequence_ratio(learner, old, [2, 1], level=x) for x in ("sequence_mean", "sequence"))
    assert (mean.base.tolist(), mean.gain.tolist()) == ([0.375, 0.375, -1.0], [1.0, 1.0, 1.0])
    assert (whole.base.tolist(), whole.gain.tolist()) == ([0.75, 0.75, -1.0], [2.0, 2.0, 1.0])


def test_a_ratio_is_equal_to_its_base_and_moves_with_its_gain():
    logp = torch.tensor([-1.0, -2.0], requires_grad=True)
    got = Ratio(torch.tensor([9.0, 0.3, 0.3]), torch.tensor([1.0, 2.0, 2.0])).log_ratio(logp, slice(1, 3))
    got.sum().backward()
    assert got.tolist() == pytest.approx([0.3, 0.3])
    assert logp.grad.tolist() == [2.0, 2.0]


def test_on_policy_gspo_has_the_gradient_of_grpo_with_sequence_aggregation():
    logp, advantage = _random(5).requires_grad_(), _random(4)
    weight = token_weight(LENGTHS, aggregation="sequence", tokens=12, sequences=5, dtype=torch.float64)
    token = logp - logp.detach()
    sequence = sequence_ratio(logp, logp, LENGTHS, level="sequence_mean").log_ratio(logp, slice(0, 12))
    slopes = [torch.autograd.grad((weight * clipped_surrogate(x, advantage, low=lo, high=hi)).sum(), logp)[0]
              for x, lo, hi in ((token, 0.2, 0.2), (sequence, 3e-4, 4e-4))]
    assert slopes[0].abs().min() > 1e-4
    torch.testing.assert_close(*slopes, rtol=1e-14, atol=0)


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_token_weights_are_those_of_the_loops(aggregation):
    got = token_weight(LENGTHS, aggregation=aggregation, tokens=40, sequences=9, constant=16, dtype=torch.float64)
    kept = [n for n in LENGTHS if n]
    assert got.tolist() == pytest.approx(loops.token_weight(kept, aggregation, 40, 9, 16), rel=1e-10)


def test_token_weights_by_hand():
    def weights(aggregation):
        return token_weight([2, 1], aggregation=aggregation, tokens=4, sequences=2, constant=8).tolist()

    assert (weights("token"), weights("sequence"), weights("constant")) == (
        [0.25] * 3, [0.25, 0.25, 0.5], [0.0625] * 3)


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_the_weights_of_a_step_do_not_depend_on_how_it_was_split(aggregation):
    def weights(lengths):
        return token_weight(lengths, aggregation=aggregation, tokens=12, sequences=5, constant=8)

    parts = torch.cat([weights(LENGTHS[s]) for s in (slice(0, 2), slice(2, 3), slice(3, 5))])
    assert torch.equal(parts, weights(LENGTHS))


def test_the_constant_aggregation_does_not_read_the_lengths():
    short, long = ([token_weight([n], aggregation="constant", tokens=n, sequences=2, constant=64)[0]] for n in (3, 60))
    assert short == long == [1 / 128]


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize(("floor", "cap"), [(0.0, 2.0), (0.5, 1.2), (0.0, math.inf)])
def test_importance_weights_are_those_of_the_loops(level, mode, floor, cap):
    log_ratio = _random(7, 0.3)
    log_ratio[3] = log_ratio[6] = NAN
    expected = [w for row in loops.split(log_ratio.tolist(), LENGTHS)
                for w in loops.importance_weight(row, level, mode, cap, floor)]
    got = importance_weight(log_ratio, LENGTHS, level=level, mode=mode, cap=cap, floor=floor)
    assert got.tolist() == pytest.approx(expected, rel=1e-10)
    assert len(set(expected)) > 2


def test_a_sequences_importance_weight_is_the_product_of_its_tokens():
    log_ratio = torch.tensor([0.5, 0.8, 2.0]).log()
    got = importance_weight(log_ratio, [2, 1], level="sequence", mode="truncate", cap=1.5)
    assert got.tolist() == pytest.approx([0.4, 0.4, 1.5])
    masked = importance_weight(log_ratio, [2, 1], level="sequence", mode="mask", cap=1.5, floor=0.4)
    assert masked.tolist() == pytest.approx([0.4, 0.4, 0.0])


def test_importance_weights_are_held_constant_and_one_where_no_policy_of_ours_sampled():
    log_ratio = torch.tensor([NAN, 3.0, -200.0, 200.0], requires_grad=True)
    for level, lengths in (("token", [4]), ("sequence", [1, 1, 1, 1])):
        got = importance_weight(log_ratio, lengths, level=level, mode="truncate", cap=0.5, floor=0.25)
        assert got.tolist() == [1.0, 0.5, 0.25, 0.5]
        assert not got.requires_grad
        masked = importance_weight(log_ratio, lengths, level=level, mode="mask", cap=0.5, floor=0.25)
        assert masked.tolist() == [1.0, 0.0, 0.0, 0.0]


def test_truncating_each_token_is_the_older_truncated_importance():
    learner, actor = _random(1), _random(2)
    got = importance_weight(learner - actor, LENGTHS, level="token", mode="truncate", cap=2.0)
    torch.testing.assert_close(got, truncated_importance(learner, actor, 2.0), rtol=1e-14, atol=0)


def test_float32_stays_float32():
    x = _random().float()
    made = [clipped_surrogate(x, x, low=0.2, high=0.28, dual=3.0),
            sequence_ratio(x, 0 * x, LENGTHS, level="sequence").base,
            importance_weight(x, LENGTHS, level="sequence", mode="mask", cap=2.0),
            token_weight(LENGTHS, aggregation="sequence", tokens=12, sequences=5)]
    assert {y.dtype for y in made} == {torch.float32}
