from math import sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyr2.core.errors import ConfigError, DataError
from tinyr2.eval.intervals import bootstrap_mean, paired_difference, wilson


def _pairs(both, only_a, only_b, neither):
    a = [True] * both + [True] * only_a + [False] * only_b + [False] * neither
    b = [True] * both + [False] * only_a + [True] * only_b + [False] * neither
    return a, b


def test_wilson_of_95_in_100_by_hand():
    # z² = 3.841459; center (95 + 1.920729) / 103.841459; half √(3.841459 · (4.75 + 0.960365)) / 103.841459
    low, high = wilson(95, 100)
    assert (low, high) == pytest.approx((0.888250, 0.978456), abs=1e-6)


def test_wilson_agrees_with_published_figures():
    # Newcombe 1998, Statistics in Medicine 17:857–872, table I, method 3
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


def test_wilson_reaches_0_and_1_exactly_and_no_further():
    z2 = 1.959963984540054**2
    assert wilson(0, 20) == pytest.approx((0.0, z2 / (20 + z2)))
    assert wilson(20, 20) == pytest.approx((20 / (20 + z2), 1.0))
    assert wilson(0, 20)[0] == 0.0
    assert wilson(20, 20)[1] == 1.0


def test_wilson_ends_solve_the_score_equation():
    for end in wilson(37, 90, confidence=0.9):
        assert abs(37 / 90 - end) / sqrt(end * (1 - end) / 90) == pytest.approx(1.6448536269514722)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 0.999))
def test_wilson_holds_the_share_and_mirrors(counts, confidence):
    successes, n = counts
    low, high = wilson(successes, n, confidence)
    assert 0.0 <= low <= successes / n <= high <= 1.0
    assert wilson(n - successes, n, confidence) == pytest.approx((1 - high, 1 - low), abs=1e-12)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_counts_that_are_no_proportion_are_an_error(successes, n):
    with pytest.raises(DataError, match=f"{successes} successes out of {n}"):
        wilson(successes, n)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95])
def test_a_confidence_outside_0_and_1_is_an_error_everywhere(confidence):
    for call in (lambda: wilson(1, 2, confidence), lambda: bootstrap_mean([1.0], 0, confidence),
                 lambda: paired_difference([True], [False], confidence)):
        with pytest.raises(ConfigError, match="take a number between 0 and 1"):
            call()


def test_bootstrap_of_two_values_knows_its_three_means():
    # the mean of two draws from {0, 1} is 0, 1/2 or 1 with chances 1/4, 1/2, 1/4
    assert bootstrap_mean([0.0, 1.0], seed=0) == (0.0, 1.0)
    assert bootstrap_mean([0.0, 1.0], seed=0, confidence=0.4) == (0.5, 0.5)


def test_bootstrap_of_many_values_comes_near_the_normal_interval():
    values = np.random.default_rng(0).normal(2.0, 3.0, 400)
    half = 1.959964 * values.std() / sqrt(len(values))
    low, high = bootstrap_mean(values.tolist(), seed=3)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.15 * half)


def test_bootstrap_repeats_with_its_seed_and_moves_with_another():
    values = [0.0, 0.25, 1.0, 0.5, 0.75, 0.125, 0.3]
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1)
    assert bootstrap_mean(values, seed=1, draws=50) != bootstrap_mean(values, seed=2, draws=50)


def test_bootstrap_of_equal_values_has_no_width_and_of_none_is_an_error():
    assert bootstrap_mean([0.5] * 9, seed=0) == (0.5, 0.5)
    with pytest.raises(DataError, match="no values"):
        bootstrap_mean([], seed=0)


@pytest.mark.parametrize(("cells", "value", "low", "high"), [
    ((36, 12, 2, 0), 0.20, 0.0569, 0.3404),  # φ < 0: no correction
    ((20, 12, 2, 16), 0.20, 0.0562, 0.3292),  # φ > 0, corrected
    ((14, 5, 0, 22), 0.122, 0.011, 0.226),  # Altman et al. 2000, Statistics with Confidence, p. 52
])
def test_paired_difference_agrees_with_published_figures(cells, value, low, high):
    # the first two: Newcombe 1998, Statistics in Medicine 17:2635–2650, method 10
    found = paired_difference(*_pairs(*cells))
    digits = 5e-4 if cells[0] == 14 else 5e-5
    assert (found.value, found.low, found.high) == pytest.approx((value, low, high), abs=digits)
    assert found.n == sum(cells)


def test_paired_difference_by_hand_where_one_side_is_all_wrong():
    # φ = 0; a: 10 of 10, arms 0.277533 below and 0 above; b: 0 of 10, arms 0 below and 0.277533 above
    arm = 1.959963984540054**2 / (10 + 1.959963984540054**2)
    found = paired_difference([True] * 10, [False] * 10)
    assert found.value == 1.0
    assert found.low == pytest.approx(1 - sqrt(2) * arm)
    assert found.high == 1.0


def test_paired_difference_by_hand_with_a_corrected_correlation():
    # 8 both, 3 only a, 1 only b, 8 neither: numerator 64 − 3 − 20/2 = 51, product 11·9·9·11 = 9801, φ = 51/99
    phi, (low_a, high_a), (low_b, high_b) = 51 / 99, wilson(11, 20), wilson(9, 20)
    down, up = (0.55 - low_a, high_b - 0.45), (high_a - 0.55, 0.45 - low_b)
    found = paired_difference(*_pairs(8, 3, 1, 8))
    assert found.low == pytest.approx(0.1 - sqrt(down[0] ** 2 + down[1] ** 2 - 2 * phi * down[0] * down[1]))
    assert found.high == pytest.approx(0.1 + sqrt(up[0] ** 2 + up[1] ** 2 - 2 * phi * up[0] * up[1]))


def test_pairing_narrows_the_interval_of_the_same_two_shares():
    close, far = paired_difference(*_pairs(60, 10, 0, 30)), paired_difference(*_pairs(42, 28, 18, 12))
    assert close.value == far.value == pytest.approx(0.1)
    assert close.high - close.low < 0.7 * (far.high - far.low)
    assert close.low > 0 > far.low


def test_undecided_pairs_leave_on_both_sides():
    a, b = [True, None, True, False, True], [False, True, None, False, True]
    assert paired_difference(a, b) == paired_difference([True, False, True], [False, False, True])
    assert paired_difference(a, b).n == 3


def test_pairs_that_do_not_fit_are_an_error():
    with pytest.raises(DataError, match="2 and 1 problems"):
        paired_difference([True, False], [True])
    with pytest.raises(DataError, match="decided on both sides"):
        paired_difference([None, True], [True, None])


@given(st.tuples(*[st.integers(0, 40)] * 4).filter(lambda cells: sum(cells) > 0))
def test_paired_difference_stays_in_range_and_changes_sign_with_its_sides(cells):
    a, b = _pairs(*cells)
    there, back = paired_difference(a, b), paired_difference(b, a)
    assert -1.0 - 1e-12 <= there.low <= there.value <= there.high <= 1.0 + 1e-12
    assert (-back.high, -back.value, -back.low) == pytest.approx((there.low, there.value, there.high), abs=1e-12)
