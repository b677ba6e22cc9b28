import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyr2.core.config import build
from tinyr2.core.errors import ConfigError
from tinyr2.data.adaptation import AdaptConfig, choose, quotas, update, weights

NAN = float("nan")
CONFIG = AdaptConfig()


def test_the_weight_is_the_variance_of_the_reward_and_a_floor():
    found = weights(np.array([0.0, 0.25, 0.5, 1.0, NAN]), CONFIG)
    np.testing.assert_allclose(found, [0.02, 0.2075, 0.27, 0.02, 0.27], rtol=1e-12)


def test_a_problem_never_asked_takes_the_prior():
    np.testing.assert_allclose(weights(np.array([NAN]), AdaptConfig(prior=0.1, floor=0.01)), [0.1], rtol=1e-12)


def test_pools_weigh_by_difficulty_and_their_borders_are_medium():
    found = weights(np.array([0.0, 0.24, 0.25, 0.75, 0.76, 1.0, NAN]), AdaptConfig(rule="pools"))
    np.testing.assert_allclose(found, [0.22, 0.22, 1.02, 1.02, 0.22, 0.22, 1.02], rtol=1e-12)


def test_first_draws_follow_the_weights():
    p = np.array([0.0, 0.1, 0.5, 0.9, 1.0, NAN])
    w = weights(p, CONFIG)
    counts = np.zeros(6)
    for step in range(6000):
        counts[choose(w, 1, ["a"] * 6, CONFIG, seed=3, path=(step,))] += 1
    expected = 6000 * w / w.sum()
    assert ((counts - expected) ** 2 / expected).sum() < 15.1  # chi-square, 5 degrees of freedom, 99%
    assert counts[0] > 0 and counts[4] > 0


def test_later_draws_follow_the_weights_of_those_left():
    w = np.array([1.0, 2.0, 4.0])
    # the pair {0, 1} comes as 0 then 1, or as 1 then 0
    expected = {(0, 1): 1 / 7 * 2 / 6 + 2 / 7 * 1 / 5, (0, 2): 1 / 7 * 4 / 6 + 4 / 7 * 1 / 3,
                (1, 2): 2 / 7 * 4 / 5 + 4 / 7 * 2 / 3}
    counts = dict.fromkeys(expected, 0)
    for step in range(6000):
        counts[tuple(sorted(choose(w, 2, ["a"] * 3, CONFIG, seed=0, path=(step,))))] += 1
    assert sum((counts[k] - 6000 * e) ** 2 / (6000 * e) for k, e in expected.items()) < 9.2  # 2 degrees, 99%


@given(size=st.integers(1, 30), n=st.integers(0, 70), seed=st.integers(0, 9))
def test_no_problem_comes_twice_before_all_came_once(size, n, seed):
    chosen = choose(np.linspace(0.1, 1, size), n, ["a"] * size, CONFIG, seed=seed, path=())
    assert len(chosen) == n
    counts = np.bincount(chosen, minlength=size) if n else np.zeros(size)
    assert counts.max() - counts.min() <= 1


@given(shares=st.lists(st.integers(0, 50), min_size=1, max_size=6).filter(any), n=st.integers(0, 300))
def test_quotas_add_up_and_miss_no_share_by_one(shares, n):
    mix = {str(i): share / sum(shares) for i, share in enumerate(shares)}
    found = quotas(mix, n)
    assert sum(found.values()) == n
    assert all(abs(found[name] - n * share) < 1 for name, share in mix.items())


def test_quotas_by_hand():
    assert quotas({"a": 0.5, "b": 0.3, "c": 0.2}, 10) == {"a": 5, "b": 3, "c": 2}
    assert quotas({"a": 0.5, "b": 0.3, "c": 0.2}, 7) == {"a": 4, "b": 2, "c": 1}  # 3.5, 2.1, 1.4
    assert quotas({"a": 0.29, "b": 0.71}, 100) == {"a": 29, "b": 71}  # 0.29 · 100 < 29 in floating point
    assert quotas({"a": 0.5, "b": 0.5}, 3) == {"a": 2, "b": 1}


def test_a_mix_gives_each_domain_its_quota_whatever_the_weights():
    domains = ["a"] * 40 + ["b"] * 40 + ["c"] * 5
    w = np.array([1.0] * 40 + [0.001] * 40 + [50.0] * 5)
    config = AdaptConfig(mix={"a": 0.5, "b": 0.5, "c": 0.0})
    chosen = choose(w, 16, domains, config, seed=0, path=(1,))
    assert sum(i < 40 for i in chosen) == 8 and sum(40 <= i < 80 for i in chosen) == 8
    assert len(set(chosen)) == 16
    assert [i < 40 for i in chosen] != [True] * 8 + [False] * 8  # not one domain after the other


def test_choices_depend_on_seed_and_path_alone():
    w, domains = np.full(50, 0.2), ["a"] * 50
    first = choose(w, 8, domains, CONFIG, seed=0, path=(4, 0))
    assert first == choose(w, 8, domains, CONFIG, seed=0, path=(4, 0))
    assert first != choose(w, 8, domains, CONFIG, seed=1, path=(4, 0))
    assert first != choose(w, 8, domains, CONFIG, seed=0, path=(4, 1))


@pytest.mark.parametrize(("mix", "said"), [
    ({"gsm8k": 0.5, "count": 0.5}, "mix: no problem is of 'count'; did you mean 'countdown'[?] the data has countdown"),
    ({"gsm8k": 1.0}, "mix: no share for countdown; give one, 0 to leave it out"),
])
def test_a_mix_that_does_not_fit_the_data_is_named(mix, said):
    with pytest.raises(ConfigError, match=said):
        choose(np.ones(2), 1, ["gsm8k", "countdown"], AdaptConfig(mix=mix), seed=0, path=())


def test_the_first_rate_is_taken_whole_and_later_ones_by_their_share():
    before = np.array([NAN, 0.5, 0.5, NAN])
    after = update(before, [0, 1, 3, 1], [1.0, 0.0, NAN, 1.0], 0.3)
    np.testing.assert_allclose(after[:3], [1.0, 0.35 + 0.3 * 0.65, 0.5], rtol=1e-12)
    assert math.isnan(after[3])
    np.testing.assert_array_equal(before, [NAN, 0.5, 0.5, NAN])


def test_a_problem_that_became_easy_is_drawn_less():
    rates = np.full(20, 0.5)
    for _ in range(20):
        rates = update(rates, [0], [1.0], CONFIG.ema)
    w = weights(rates, CONFIG)
    assert w[0] < 0.1 * w[1]


@pytest.mark.parametrize(("raw", "said"), [
    ({"mix": {"a": 0.5, "b": 0.6}}, "add up to 1"),
    ({"mix": {"a": 1.5, "b": -0.5}}, "shares of a mix are 0 or more"),
    ({"mix": {}}, "shares of a mix"),
    ({"floor": 0}, "floor: .*greater than 0"),
    ({"thresholds": [0.8, 0.2]}, "thresholds 0.8 and 0.2: .*swap them"),
    ({"pool_weights": [1, -1, 1]}, "pool_weights are 0 or more"),
    ({"rule": "variances"}, "rule: "),
])
def test_settings_that_cannot_work_are_refused(raw, said):
    with pytest.raises(ConfigError, match=said):
        build(AdaptConfig, raw, "here")
