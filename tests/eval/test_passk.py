from itertools import combinations
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyr2.core.errors import DataError
from tinyr2.eval.passk import maj_at_k, pass_at_k

COUNTS = st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n)))


def test_pass_at_5_of_3_right_in_10_is_one_minus_c75_over_c105():
    assert pass_at_k(10, 3, 5) == pytest.approx(1 - comb(7, 5) / comb(10, 5), rel=1e-15)
    assert pass_at_k(10, 3, 5) == 231 / 252


def test_pass_at_1_is_the_share_of_right_answers():
    assert pass_at_k(10, 3, 1) == 3 / 10
    assert pass_at_k(7, 7, 1) == 1.0


def test_pass_at_n_asks_whether_any_answer_is_right():
    assert [pass_at_k(6, c, 6) for c in (0, 1, 6)] == [0.0, 1.0, 1.0]


def test_more_draws_than_wrong_answers_cannot_miss():
    assert pass_at_k(10, 6, 5) == 1.0
    assert pass_at_k(10, 5, 5) == 1 - 1 / 252


def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_answer():
    for n, c, k in [(6, 2, 3), (7, 1, 4), (8, 3, 2), (5, 5, 5), (5, 0, 2)]:
        right = [True] * c + [False] * (n - c)
        subsets = [any(some) for some in combinations(right, k)]
        assert pass_at_k(n, c, k) == pytest.approx(sum(subsets) / len(subsets), rel=1e-15)


def test_pass_at_k_is_unbiased_for_k_fresh_answers():
    p, n, k = 0.3, 6, 4
    expected = sum(comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
    assert expected == pytest.approx(1 - (1 - p) ** k, abs=1e-14)


def test_large_counts_lose_no_precision():
    assert pass_at_k(20_000, 1, 1) == 1 / 20_000
    assert pass_at_k(2_000, 1, 500) == 0.25


@given(COUNTS)
def test_pass_at_k_grows_with_k_and_with_c(counts):
    n, c, k = counts
    here = pass_at_k(n, c, k)
    assert 0.0 <= here <= 1.0
    if k < n:
        assert pass_at_k(n, c, k + 1) >= here
    if c < n:
        assert pass_at_k(n, c + 1, k) >= here


@pytest.mark.parametrize(("n", "c", "k"), [(3, 1, 4), (3, 1, 0), (0, 0, 1)])
def test_a_k_that_the_answers_cannot_fill_is_an_error_that_names_both(n, c, k):
    with pytest.raises(DataError, match=f"k = {k} with {n} answers"):
        pass_at_k(n, c, k)


@pytest.mark.parametrize("c", [-1, 4])
def test_right_answers_outside_the_answers_are_an_error(c):
    with pytest.raises(DataError, match=f"{c} right answers out of 3"):
        pass_at_k(3, c, 2)


def test_the_most_frequent_answer_wins_the_vote_of_all():
    assert maj_at_k(["4", "5", "4"], [True, False, True], 3, seed=0) == 1.0
    assert maj_at_k(["5", "4", "5"], [False, True, False], 3, seed=0) == 0.0


def test_a_tie_scores_the_share_of_tied_answers_that_are_right():
    assert maj_at_k(["4", "5"], [True, False], 2, seed=0) == 1 / 2
    assert maj_at_k(["4", "5", "6"], [True, False, False], 3, seed=0) == pytest.approx(1 / 3)
    assert maj_at_k(["4", "4", "5", "5", "6"], [True, True, False, False, False], 5, seed=0) == 1 / 2


def test_an_answer_that_came_to_nothing_has_no_vote():
    assert maj_at_k([None, None, "4"], [False, False, True], 3, seed=0) == 1.0
    assert maj_at_k([None, None], [False, False], 2, seed=0) == 0.0


def test_an_answer_with_mixed_verdicts_counts_to_their_share():
    assert maj_at_k(["4", "4", "5"], [True, False, True], 3, seed=0) == 1 / 2


def test_a_vote_of_2_in_3_is_the_mean_over_the_three_pairs():
    # {4, 4'} → 1; {4, 5} → tie, 1/2; {4', 5} → tie, 1/2
    assert maj_at_k(["4", "4", "5"], [True, True, False], 2, seed=0) == pytest.approx(2 / 3)


def test_a_vote_of_3_in_5_agrees_with_the_hypergeometric_count():
    # two answers only: the right one wins where it holds 2 or 3 of the 3 votes
    answers, correct = ["4"] * 3 + ["5"] * 2, [True] * 3 + [False] * 2
    wins = comb(3, 2) * comb(2, 1) + comb(3, 3)
    assert maj_at_k(answers, correct, 3, seed=0) == pytest.approx(wins / comb(5, 3))


def test_a_vote_of_one_is_the_accuracy():
    assert maj_at_k(["1", "2", "3", None], [True, False, True, False], 1, seed=0) == 0.5


def test_the_voters_order_does_not_matter():
    answers, correct = ["4", "5", "4", "6", "5"], [True, False, True, False, False]
    for k in range(1, 6):
        assert maj_at_k(answers, correct, k, seed=0) == pytest.approx(
            maj_at_k(answers[::-1], correct[::-1], k, seed=0), abs=1e-15)


def test_drawn_subsets_repeat_with_the_seed_and_come_near_the_exact_mean():
    answers, correct = ["4"] * 9 + ["5"] * 11, [True] * 9 + [False] * 11
    exact = maj_at_k(answers, correct, 3, seed=0, subsets=comb(20, 3))
    drawn = [maj_at_k(answers, correct, 3, seed=seed, subsets=400) for seed in (0, 0, 1)]
    assert exact == pytest.approx((comb(9, 3) + comb(9, 2) * 11) / comb(20, 3))
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(abs(value - exact) < 4 * 0.5 / 400**0.5 for value in drawn)


def test_a_vote_needs_one_verdict_per_answer_and_enough_answers():
    with pytest.raises(DataError, match="2 answers, 1 verdicts"):
        maj_at_k(["4", "5"], [True], 2, seed=0)
    with pytest.raises(DataError, match="k = 3 with 2 answers"):
        maj_at_k(["4", "5"], [True, False], 3, seed=0)
