"""Credit by hand, and what must not change it. Whole steps of every choice are compared in `test_policy_loss.py`."""

import math
from dataclasses import replace

import pytest

from tests.train.reinforced import REWARDS, config_of, credited, looped_credit, make_rollouts
from tests.train.tiny import rollout
from tinyr2.train.credit import AdvantageConfig, KlConfig, assign_credit, groups_of, old_logp

ONE = {"verdict": (1.0, None)}


def answer(reward, length=2, **more):
    parts = {"verdict": reward}
    return rollout((3,), tuple(range(4, 4 + length)), **({"reward": reward, "reward_parts": parts,
                                                         "actor_logp": (-1.0,) * length} | more))


def credit_of(rollouts, rewards=ONE, kl=None, ends=None, critic_lam=1.0, **advantage):
    found = assign_credit(rollouts, AdvantageConfig(**advantage), kl or KlConfig(), rewards, last_values=ends,
                          critic_lam=critic_lam)
    return [r.credit for r in found]


def test_an_answers_advantage_stands_at_each_of_its_tokens():
    assert credit_of([answer(1.0), answer(0.0, 3)]) == [(0.5, 0.5), (-0.5, -0.5, -0.5)]
    assert credit_of([answer(1.0), answer(0.0, 3)], baseline="leave_one_out") == [(1.0, 1.0), (-1.0, -1.0, -1.0)]
    assert credit_of([answer(1.0), answer(0.25, 1)], baseline="none") == [(1.0, 1.0), (0.25,)]


def test_groups_have_means_of_their_own_wherever_their_answers_stand():
    mixed = [answer(1.0, 1, group=4), answer(8.0, 1, group=1), answer(0.0, 1, group=4), answer(4.0, 1, group=1)]
    assert groups_of(mixed) == [[0, 2], [1, 3]]
    assert credit_of(mixed) == [(0.5,), (2.0,), (-0.5,), (-2.0,)]


def test_the_spread_of_a_group_or_of_the_batch_is_the_unit():
    several = [answer(r, 1, group=g) for g, r in ((0, 1.0), (0, 0.0), (1, 4.0), (1, 0.0))]
    root = math.sqrt(0.5)
    found = credit_of(several, scale="group_std", eps=0.0)
    assert [c for (c,) in found] == pytest.approx([0.5 / root, -0.5 / root, 2 / (4 * root), -2 / (4 * root)])
    std = math.sqrt(sum((r - 1.25) ** 2 for r in (1, 0, 4, 0)) / 3)
    found = credit_of(several, scale="batch_std", eps=0.0)
    assert [c for (c,) in found] == pytest.approx([0.5 / std, -0.5 / std, 2 / std, -2 / std])


def test_whitening_is_over_the_tokens_of_the_step_and_not_over_its_answers():
    (a, *more), (b, *_) = credit_of([answer(1.0, 3), answer(0.0, 1)], scale="whiten")
    assert more == [a, a]
    assert 3 * a + b == pytest.approx(0.0)
    assert 3 * a * a + b * b == pytest.approx(3.0, rel=1e-6)  # unbiased: four tokens, three degrees


@pytest.mark.parametrize("baseline", ["group_mean", "leave_one_out", "value", "none"])
@pytest.mark.parametrize("scale", ["none", "whiten"])
def test_equal_rewards_without_a_critics_word_give_exactly_0_once_they_are_centered(baseline, scale):
    if baseline == "none" and scale == "none":
        return
    for reward in (0.1, 0.3, 0.7, 0.95, 1.1):
        more = {"values": (reward, reward)} if baseline == "value" else {}
        assert credit_of([answer(reward, **more) for _ in range(16)], baseline=baseline, scale=scale) == [(0, 0)] * 16


def test_a_lone_verdict_of_a_group_has_no_baseline_and_leaves_the_step():
    several = [answer(1.0), answer(None), answer(None, error="no"), answer(0.0, group=1), answer(1.0, group=1)]
    found = assign_credit(several, AdvantageConfig(), KlConfig(), ONE)
    assert [(r.group, r.credit) for r in found] == [(1, (-0.5, -0.5)), (1, (0.5, 0.5))]
    assert credit_of([answer(None)]) == []
    assert credit_of([]) == []


def test_an_error_outweighs_a_reward_that_stands_beside_it():
    assert credit_of([answer(1.0), answer(0.0), answer(9.0, error="late")]) == [(0.5, 0.5), (-0.5, -0.5)]


def test_an_answer_without_a_learned_token_teaches_nothing():
    silent = answer(5.0, learn_mask=(False, False))
    assert credit_of([answer(1.0), answer(0.0), silent]) == [(0.5, 0.5), (-0.5, -0.5)]


def test_a_discount_counts_back_from_the_last_token():
    assert credit_of([answer(1.0, 3), answer(0.0, 1)], baseline="none", gamma=0.5) == [(0.25, 0.5, 1.0), (0.0,)]


def test_each_reward_has_its_own_discount():
    both = {"verdict": (1.0, None), "style": (2.0, 0.5)}
    pair = [answer(5.0, 3, reward_parts={"verdict": 1.0, "style": 2.0}),
            answer(0.0, 2, reward_parts={"verdict": 0.0, "style": 0.0})]
    assert credit_of(pair, both, baseline="none") == [(2.0, 3.0, 5.0), (0.0, 0.0)]
    assert credit_of(pair, both) == [(1.0, 1.5, 2.5), (-1.5, -2.5)]


@pytest.mark.parametrize("place, expected", [
    ("token_reward", [(1.0 - 0.1 * 3, 1.0 - 0.1 * 2), (-1.0, -1.0)]),  # each token pays for itself and those after it
    ("sequence_reward", [(1.0 - 0.15, 1.0 - 0.15), (-1.0 + 0.15, -1.0 + 0.15)])])  # the answer pays, and is centered
def test_a_kl_in_the_reward_is_paid_by_the_token_or_by_the_answer(place, expected):
    pair = [answer(2.0, reference_logp=(-2.0, -3.0)), answer(0.0, reference_logp=(-1.0, -1.0))]
    found = credit_of(pair, kl=KlConfig(place=place, estimator="k1", beta=0.1))
    assert found == [pytest.approx(e) for e in expected]


def test_a_kl_in_the_loss_is_not_in_the_reward_too():
    pair = [answer(2.0, reference_logp=(-2.0, -3.0)), answer(0.0, reference_logp=(-9.0, -1.0))]
    assert credit_of(pair, kl=KlConfig(place="loss", estimator="k2", beta=0.5)) == credit_of(pair)


def test_a_kl_in_the_reward_is_that_of_the_weights_before_the_first_update():
    pair = [answer(2.0, reference_logp=(-2.0, -3.0), old_logp=(-2.0, -3.0)), answer(0.0, reference_logp=(-1.0, -1.0))]
    kl = KlConfig(place="token_reward", estimator="k1", beta=0.5)
    assert credit_of(pair, kl=kl) == [(1.0, 1.0), (-1.0, -1.0)]


def test_the_reward_stands_at_the_last_learned_token_and_the_value_after_it_is_nothing():
    r = answer(1.0, 3, values=(0.5, 0.25, 0.75))
    (found,) = assign_credit([r], AdvantageConfig(baseline="value", lam=0.0), KlConfig(), ONE, critic_lam=1.0)
    assert found.credit == (-0.25, 0.5, 0.25)
    assert found.returns == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_what_a_critic_says_after_the_end_of_an_answer_changes_nothing(lam):
    ended = [answer(1.0, 3, values=(0.5, 0.25, 0.75), finish="stop"), answer(0.0, 1, values=(0.5,), finish="stop")]
    for bootstrap in (False, True):
        assert (credit_of(ended, ends=[7.0, -3.0], baseline="value", lam=lam, bootstrap_truncated=bootstrap)
                == credit_of(ended, ends=[0.0, 0.0], baseline="value", lam=lam, bootstrap_truncated=bootstrap))


def test_an_answer_that_was_cut_off_goes_on_at_the_critics_value_where_that_is_asked_for():
    cut = [answer(1.0, 2, values=(0.5, 0.25), finish="length")]
    assert credit_of(cut, ends=[0.5], baseline="value") == [(0.5, 0.75)]  # truncation as an end
    assert credit_of(cut, ends=[0.5], baseline="value", bootstrap_truncated=True) == [(1.0, 1.25)]


def test_policy_and_critic_have_lambdas_of_their_own():
    r = answer(1.0, 2, values=(0.5, 0.25))
    (found,) = assign_credit([r], AdvantageConfig(baseline="value", lam=0.0), KlConfig(), ONE, critic_lam=0.5)
    assert found.credit == (-0.25, 0.75)
    assert found.returns == (0.5 - 0.25 + 0.5 * 0.75, 1.0)


def test_a_short_answer_has_the_lambda_of_its_length_and_never_less_than_the_floor():
    r = answer(1.0, 2, values=(0.5, 0.25))
    for alpha, floor, lam in ((0.05, 0.95, 0.95), (0.05, 0.0, 0.0), (2.0, 0.0, 0.75)):
        found = credit_of([r], baseline="value", lam=0.1, lam_alpha=alpha, lam_floor=floor)
        assert found == [pytest.approx((-0.25 + lam * 0.75, 0.75))]


@pytest.mark.parametrize("algorithm", ["ppo", "vapo", "reinforce_pp", "rloo", "grpo"])
def test_tokens_that_are_read_and_not_learned_are_as_good_as_taken_out(algorithm):
    config, mixed = config_of(algorithm), make_rollouts(spread=0.3)
    where = next(i for i, r in enumerate(mixed) if r.learn_mask)
    r = mixed[where]
    keep = [t for t, m in enumerate(r.learn_mask) if m]
    compact = mixed[:]
    compact[where] = replace(r, learn_mask=None, response_ids=tuple(r.response_ids[t] for t in keep),
                             actor_logp=tuple(r.actor_logp[t] for t in keep))
    assert [c.credit for c in credited(config, mixed)] == [c.credit for c in credited(config, compact)]
    assert [c.returns for c in credited(config, mixed)] == [c.returns for c in credited(config, compact)]


@pytest.mark.parametrize("algorithm", ["ppo", "orz", "vapo"])
def test_the_critics_targets_are_those_of_the_loop(algorithm):
    config = config_of(algorithm, value={"lam": 0.9}, advantage={"bootstrap_truncated": True, "gamma": 0.95})
    rollouts = make_rollouts(spread=0.3)
    _, expected = looped_credit(config, rollouts, REWARDS)
    found = credited(config, rollouts)
    for r, targets in zip(found, expected, strict=True):
        assert r.returns == pytest.approx(targets, rel=1e-9, abs=1e-12)


def test_old_log_probs_are_the_actors_of_the_learned_tokens_until_the_learner_scored_them():
    r = answer(1.0, 3, actor_logp=(-1.0, -2.0, -3.0), learn_mask=(True, False, True))
    assert old_logp(r) == (-1.0, -3.0)
    assert old_logp(replace(r, old_logp=(-0.5, -0.25))) == (-0.5, -0.25)
