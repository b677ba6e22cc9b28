"""Baselines, scales and discounts: by hand, and against loops in float64."""

import math

import pytest
import torch

from tests.objectives import loops
from tinyr2.objectives.advantage import discounted_outcome, group_mean, leave_one_out, scaled, spread, whiten


def test_each_reward_is_measured_against_the_mean_of_the_others():
    assert leave_one_out([1.0, 0.0, 0.5]) == pytest.approx([0.75, -0.75, 0.0])
    assert leave_one_out([3.0, 1.0]) == [2.0, -2.0]


def test_a_missing_reward_leaves_the_baseline_and_stays_missing():
    assert leave_one_out([1.0, None, 0.0]) == [1.0, None, -1.0]


def test_a_lone_valid_reward_has_no_baseline_and_so_no_advantage():
    assert leave_one_out([None, 1.0, None]) == [None, None, None]
    assert leave_one_out([1.0]) == [None]
    assert leave_one_out([None, None]) == [None, None]
    assert leave_one_out([]) == []


@pytest.mark.parametrize("reward", [0.1, 0.3, -0.7, 1 / 3, 1e-300, 1e300, 0.0])
@pytest.mark.parametrize("size", [2, 3, 7, 10])
def test_equal_rewards_give_exactly_zero(reward, size):
    assert leave_one_out([reward] * size) == [0.0] * size
    assert leave_one_out([reward, None] * size)[::2] == [0.0] * size


def test_rewards_that_differ_by_rounding_are_different():
    low, high = leave_one_out([0.1 + 0.2, 0.3])
    assert low == 0.1 + 0.2 - 0.3 > 0 > high


def test_advantages_sum_to_zero_and_do_not_depend_on_a_common_offset():
    rewards = [0.25, 1.5, -2.0, 0.5]
    assert sum(leave_one_out(rewards)) == pytest.approx(0.0, abs=1e-12)
    assert leave_one_out([r + 8.0 for r in rewards]) == pytest.approx(leave_one_out(rewards))


def test_a_reward_that_is_no_number_is_our_fault_and_stops():
    with pytest.raises(AssertionError, match="finite or None"):
        leave_one_out([1.0, float("nan")])


@pytest.mark.parametrize("reward", [0.1, 0.3, 0.7, 0.95, 1.1, -0.7, 1 / 3, 1e-300, 1e300])
@pytest.mark.parametrize("size", [2, 3, 7, 16])
def test_equal_rewards_have_no_advantage_and_no_spread_whatever_eps_is(reward, size):
    group = [reward] * size
    assert group_mean(group) == leave_one_out(group) == [0.0] * size
    assert spread(group) == 0.0
    assert scaled(group_mean(group), spread(group), eps=0.0) == [0.0] * size
    assert scaled(group_mean([*group, None]), spread([*group, None]), eps=1e-9) == [0.0] * size + [None]
    for dtype in (torch.float32, torch.float64):
        same = torch.full((size,), reward if reward < 1e30 else 1e30, dtype=dtype)
        assert whiten(same, eps=0.0).tolist() == [0.0] * size


def test_group_mean_measures_against_the_mean_of_all_its_own_included():
    assert group_mean([1.0, 0.0, 0.5]) == pytest.approx([0.5, -0.5, 0.0])
    assert group_mean([1.0, None, 0.0]) == [0.5, None, -0.5]


@pytest.mark.parametrize("rewards", [[], [1.0], [None, 1.0, None], [None, None]])
def test_a_group_with_fewer_than_two_verdicts_has_no_advantages_and_no_spread(rewards):
    assert group_mean(rewards) == leave_one_out(rewards) == [None] * len(rewards)
    assert spread(rewards) == 0.0


def test_the_spread_is_the_unbiased_standard_deviation():
    assert spread([1.0, 0.0]) == pytest.approx(math.sqrt(0.5), rel=1e-15)
    assert spread([2.0, None, 4.0, 6.0]) == 2.0


def test_rewards_that_differ_by_rounding_have_a_spread():
    assert 0 < spread([0.1 + 0.2, 0.3]) < 1e-16


def test_scaling_divides_by_the_spread_and_eps_and_leaves_what_is_missing():
    assert scaled([1.0, None, -1.0], 0.5, eps=0.5) == [1.0, None, -1.0]
    assert scaled([1.0, -1.0], 0.4999, eps=1e-4) == pytest.approx([2.0, -2.0], rel=1e-15)


groups = pytest.mark.parametrize("rewards", [
    [0.25, 1.5, -2.0, 0.5], [1.0, 0.0], [0.3, None, 0.7, None, 0.1], [1.0, 1.0, 1.0, 0.0], [None, 3.5, -1e3]])


@groups
def test_advantages_of_a_group_are_those_of_the_loops(rewards):
    def close(got, expected):
        assert [x is None for x in got] == [x is None for x in expected]
        assert [x for x in got if x is not None] == pytest.approx([x for x in expected if x is not None], rel=1e-10,
                                                                  abs=1e-13)

    assert spread(rewards) == pytest.approx(loops.spread(rewards), rel=1e-10)
    for ours, reference in ((leave_one_out, loops.leave_one_out), (group_mean, loops.group_mean)):
        close(ours(rewards), reference(rewards))
        close(scaled(ours(rewards), spread(rewards), eps=1e-4),
              loops.scaled(reference(rewards), loops.spread(rewards), 1e-4))


@groups
def test_leave_one_out_is_g_over_g_minus_one_times_the_group_mean(rewards):
    g = sum(r is not None for r in rewards)
    expected = [None if a is None else g / (g - 1) * a for a in group_mean(rewards)]
    assert [a is None for a in leave_one_out(rewards)] == [a is None for a in expected]
    assert [a or 0.0 for a in leave_one_out(rewards)] == pytest.approx([a or 0.0 for a in expected], rel=1e-12)


@pytest.mark.parametrize("eps", [1e-8, 0.1])
def test_whitened_values_are_those_of_the_loops(eps):
    x = torch.randn(23, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3 + 1
    assert whiten(x, eps=eps).tolist() == pytest.approx(loops.whiten(x.tolist(), eps), rel=1e-10)
    assert whiten(torch.tensor([1.0, 3.0]), eps=0.0).tolist() == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)])


def test_whitening_keeps_the_digits_of_values_with_a_common_offset():
    x = torch.arange(6, dtype=torch.float32) / 8
    torch.testing.assert_close(whiten(x + 4096.0), whiten(x), rtol=1e-6, atol=0)


def test_fewer_than_two_values_are_whitened_to_zero():
    assert whiten(torch.tensor([3.0])).tolist() == [0.0]
    assert whiten(torch.zeros(0)).tolist() == []


@pytest.mark.parametrize("gamma", [1.0, 0.99, 0.5, 0.0])
def test_a_discounted_outcome_is_that_of_the_loops(gamma):
    outcome, lengths = [1.0, -0.5, 2.0, 0.25], [3, 1, 0, 5]
    got = discounted_outcome(torch.tensor(outcome, dtype=torch.float64), lengths, gamma=gamma)
    assert got.dtype == torch.float64
    assert got.tolist() == pytest.approx(loops.discounted_outcome(outcome, lengths, gamma), rel=1e-10)


def test_an_outcome_is_whole_at_the_last_token_and_smaller_before_it():
    assert discounted_outcome(torch.tensor([8.0, 1.0]), [3, 1], gamma=0.5).tolist() == [2.0, 4.0, 8.0, 1.0]
