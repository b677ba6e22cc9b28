"""The leave-one-out baseline, by hand."""

import pytest

from tinyr2.objectives.advantage import leave_one_out


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
