"""A whole step's loss and gradient against a loop in float64, for every preset and every choice beside them."""

import math
import random
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from tests.train.reinforced import (
    LIMIT,
    assert_same,
    at_temperature,
    config_of,
    credited,
    looped,
    make_rollouts,
    ours,
    with_old_logp,
)
from tests.train.tiny import VOCAB, qwen3_f64
from tinyr2.core.packing import pack
from tinyr2.models.head import TokenScores
from tinyr2.train.credit import old_logp
from tinyr2.train.policy_loss import ImportanceConfig, PolicyLoss, PolicyLossConfig, StepCounts
from tinyr2.train.presets import PRESETS
from tinyr2.train.step import Learner, Reading, accumulate, score

SPREAD = {"on": 0.0, "off": 0.3}  # nats between actor and learner


def _learner(model):
    return Learner(model=model, vocab=VOCAB, tokens_per_micro_batch=1000)


def _reinforce(batch):
    return lambda s: -(batch.advantage[s.part] * s.learner_logp).sum()


@pytest.mark.parametrize("policy", SPREAD)
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("algorithm", PRESETS)
def test_a_presets_step_has_the_loss_and_gradient_of_the_loop(algorithm, temperature, policy):
    config = at_temperature(config_of(algorithm), temperature)
    rollouts = make_rollouts(temperature, SPREAD[policy])
    assert_same(ours(config, rollouts), looped(config, rollouts))


@pytest.mark.parametrize("algorithm", PRESETS)
def test_a_presets_step_is_the_same_in_micro_batches_of_any_size_and_order(algorithm):
    config, rollouts = config_of(algorithm), make_rollouts(spread=0.3)
    whole = ours(config, rollouts)
    for i, budget in enumerate((1, 16, 1000)):  # one row, about two, all
        shuffled = rollouts[:]
        random.Random(i).shuffle(shuffled)
        found = ours(config, shuffled, budget=budget)
        assert found.loss == pytest.approx(whole.loss, rel=1e-6, abs=1e-8)
        for name, g in whole.gradient.items():
            torch.testing.assert_close(found.gradient[name], g, rtol=1e-6, atol=1e-8 * float(g.abs().max() + 1))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mode", ["truncate", "mask", "auto"])
@pytest.mark.parametrize("updates", ["one", "several"])
@pytest.mark.parametrize("ratio", ["token", "sequence_mean", "sequence"])
def test_an_actor_that_is_not_the_learner_is_corrected_for_as_in_the_loop(ratio, updates, mode, level):
    importance = {"mode": mode, "level": level, "cap": 1.25, "floor": 0.5}
    config = config_of("grpo", loss={"importance": importance, "ratio": ratio})
    rollouts = make_rollouts(spread=0.3)
    rollouts = rollouts if updates == "one" else with_old_logp(rollouts)
    expected = looped(config, rollouts, corrects=True)
    assert_same(ours(config, rollouts, corrects=True), expected)
    assert_same(ours(config, rollouts, corrects=True, budget=16), expected)
    assert abs(looped(config, rollouts).loss - expected.loss) > 1e-3


def test_in_one_update_a_corrected_step_is_reinforce_weighted_by_importance():
    config = config_of("dr_grpo", loss={"importance": {"mode": "truncate", "cap": 1.5}})
    rollouts, model = make_rollouts(spread=0.3), qwen3_f64()
    found = ours(config, rollouts, corrects=True)
    done, weighted = credited(config, rollouts), []
    for r, said in zip(done, score(_learner(model), done), strict=True):
        weight = [min(1.5, math.exp(a - b)) for a, b in zip(said, old_logp(r), strict=True)]
        credit = [w * c / len(done) / LIMIT for w, c in zip(weight, r.credit, strict=True)]
        weighted.append(replace(r, credit=tuple(credit)))
    accumulate(_learner(model), weighted, _reinforce)
    for name, p in model.named_parameters():
        torch.testing.assert_close(found.gradient[name], p.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("estimator, weighed", [("k2", False), ("k3", False), ("k1", True), ("k2", True), ("k3", True)])
def test_a_kl_in_the_loss_is_that_of_the_loop_also_times_the_ratio(estimator, weighed):
    config = config_of("grpo", kl={"estimator": estimator, "ratio": weighed, "beta": 0.5})
    rollouts = make_rollouts(spread=0.3)
    assert_same(ours(config, rollouts), looped(config, rollouts))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("place", ["token_reward", "sequence_reward"])
@pytest.mark.parametrize("baseline", ["none", "group_mean", "leave_one_out", "value"])
def test_a_kl_in_the_reward_is_that_of_the_loop_with_every_baseline(baseline, place, estimator):
    config = config_of(advantage={"baseline": baseline}, kl={"place": place, "estimator": estimator, "beta": 0.5},
                       value={} if baseline == "value" else None)
    rollouts = make_rollouts(spread=0.3)
    assert_same(ours(config, rollouts), looped(config, rollouts))


SCALES = {"none": ("none", "batch_std", "whiten"), "group_mean": ("none", "group_std", "batch_std", "whiten"),
          "leave_one_out": ("none", "group_std", "batch_std", "whiten"), "value": ("none", "whiten")}


@pytest.mark.parametrize("baseline, scale", [(b, s) for b, scales in SCALES.items() for s in scales])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_rewards_with_discounts_of_their_own_are_those_of_the_loop(gamma, baseline, scale):
    config = config_of(advantage={"baseline": baseline, "scale": scale, "gamma": gamma, "lam": 0.9},
                       value={"lam": 1.0} if baseline == "value" else None)
    rewards, rollouts = {"verdict": (1.0, None), "style": (0.5, 0.8)}, make_rollouts(spread=0.3)
    expected = looped(config, rollouts, rewards=rewards)
    assert_same(ours(config, rollouts, rewards=rewards), expected)
    assert abs(looped(config, rollouts).loss - expected.loss) > 1e-5


def test_a_reward_may_be_undiscounted_where_the_others_are_not():
    config = config_of(advantage={"baseline": "leave_one_out", "gamma": 0.9})
    rollouts = make_rollouts(spread=0.3)
    rewards = {"verdict": (1.0, 1.0), "style": (0.5, None)}
    expected = looped(config, rollouts, rewards=rewards)
    assert_same(ours(config, rollouts, rewards=rewards), expected)
    assert abs(looped(config, rollouts).loss - expected.loss) > 1e-5


def test_a_missing_part_counts_as_nothing_and_its_discount_stays_its_own():
    config = config_of("dr_grpo")
    rewards, rollouts = {"verdict": (1.0, None), "style": (0.5, 0.8)}, make_rollouts(spread=0.3)
    rollouts[3] = replace(rollouts[3], reward_parts={"verdict": 1.0, "style": None}, reward=1.0)
    assert_same(ours(config, rollouts, rewards=rewards), looped(config, rollouts, rewards=rewards))


def test_a_teachers_divergence_in_the_loss_is_that_of_the_loop():
    config = config_of("dapo", teacher={"path": "t"}, opd={"place": "loss", "weight": 0.5})
    rollouts = make_rollouts(spread=0.3)
    expected = looped(config, rollouts)
    assert_same(ours(config, rollouts), expected)
    assert_same(ours(config, rollouts, budget=16), expected)
    assert abs(looped(config_of("dapo"), rollouts).loss - expected.loss) > 1e-3


def test_the_likelihood_of_right_answers_is_a_mean_over_their_tokens():
    config = config_of("vapo", loss={"positive_nll": 2.0})
    rollouts = make_rollouts(spread=0.3)
    assert_same(ours(config, rollouts), looped(config, rollouts))
    wrong = [replace(r, right=None if r.sample else False) for r in rollouts]
    assert_same(ours(config, wrong), looped(config_of("vapo", loss={"positive_nll": 0.0}), wrong))


def test_the_dual_clip_is_that_of_the_loop():
    config = config_of("dapo", loss={"delta": 1.1})
    rollouts = make_rollouts(spread=0.5)
    expected = looped(config, rollouts)
    assert_same(ours(config, rollouts), expected)
    assert abs(looped(config_of("dapo"), rollouts).loss - expected.loss) > 1e-3


@pytest.mark.parametrize("algorithm", PRESETS)
def test_cut_answers_that_are_masked_leave_the_loss_and_its_counts_but_not_the_baseline(algorithm):
    config = config_of(algorithm, loss={"mask_truncated_completions": True})
    rollouts = make_rollouts(spread=0.3)
    assert_same(ours(config, rollouts), looped(config, rollouts))
    free = config_of(algorithm, loss={"mask_truncated_completions": False})
    assert abs(ours(free, rollouts).loss - looped(config, rollouts).loss) > 1e-5


@pytest.mark.parametrize("algorithm", PRESETS)
def test_answers_with_an_error_or_without_a_verdict_are_as_good_as_absent(algorithm):
    config, rollouts = config_of(algorithm), make_rollouts(spread=0.3)
    faulty = rollouts[:]
    faulty[1] = replace(rollouts[1], reward=None, error="the grader raised")
    faulty[4] = replace(rollouts[4], reward=None, right=None)
    present = [r for i, r in enumerate(rollouts) if i not in (1, 4)]
    found, expected = ours(config, faulty), ours(config, present)
    assert found.loss == expected.loss
    for name, g in expected.gradient.items():
        assert torch.equal(found.gradient[name], g)
    assert_same(found, looped(config, present))


@pytest.mark.parametrize("algorithm", PRESETS)
def test_a_step_whose_every_answer_failed_has_loss_0_and_no_gradient(algorithm):
    rollouts = [replace(r, reward=None, error="no") for r in make_rollouts()]
    found = ours(config_of(algorithm), rollouts)
    assert found.loss == 0.0
    assert all(g is None for g in found.gradient.values())


@pytest.mark.parametrize("algorithm", [a for a, p in PRESETS.items() if p["advantage"]["baseline"] in
                                       ("group_mean", "leave_one_out")])
def test_groups_of_equal_rewards_have_a_gradient_of_exactly_0_but_for_a_kl_in_the_loss(algorithm):
    config = config_of(algorithm, kl={"place": "none", "beta": 0.0})
    for reward in (0.1, 0.3, 0.7, 0.95, 1.1):
        rollouts = [replace(r, reward=reward, reward_parts={"verdict": reward, "style": 0.0}) for r in make_rollouts()]
        assert all(set(r.credit) == {0.0} for r in credited(config, rollouts))
        assert not any(g.any() for g in ours(config, rollouts).gradient.values())
    pulled = config_of(algorithm, kl={"place": "loss", "estimator": "k3", "beta": 0.04})
    assert any(g.any() for g in ours(pulled, rollouts).gradient.values())


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.3])
@pytest.mark.parametrize("algorithm", PRESETS)
def test_on_policy_every_ratio_is_one_and_the_gradient_that_of_reinforce(algorithm, temperature):
    config = at_temperature(config_of(algorithm, kl={"place": "none", "beta": 0.0}, loss={"positive_nll": 0.0}),
                            temperature)
    rollouts, model = make_rollouts(temperature), qwen3_f64()
    masks = config.loss.mask_truncated_completions
    kept = [r for r in credited(config, rollouts) if not (masks and r.finish == "length")]
    n, tokens = len(kept), sum(r.learned for r in kept)
    share = {"token": lambda r: tokens, "sequence": lambda r: n * (1 if config.loss.ratio == "sequence" else r.learned),
             "constant": lambda r: n * LIMIT}[config.loss.aggregation]
    weighted = [replace(r, credit=tuple(c / share(r) for c in r.credit)) for r in kept]
    accumulate(_learner(model), weighted, _reinforce, Reading(temperature=temperature))
    found = ours(config, rollouts).gradient
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-5, atol=2e-6 * float(p.grad.abs().max() + 0.1))


def test_the_constant_of_dr_grpo_reads_no_length_of_the_batch():
    config, rollouts = config_of("dr_grpo"), make_rollouts()
    done = credited(config, rollouts)
    weights = []
    for some in (done, done[:3]):
        loss = PolicyLoss(config=config.loss, kl=config.kl, counts=StepCounts.of(done), constant=LIMIT)
        weights += loss._weight(pack(some)).unique().tolist()
    assert weights == pytest.approx([1 / len(rollouts) / LIMIT] * 2)


def test_counts_are_over_the_step_and_leave_out_what_is_not_learned():
    rollouts = make_rollouts()
    lengths = [3, 2, 3, 5, 1, 3, 4, 2, 6]  # of the third, two of five tokens are read alone
    assert StepCounts.of(rollouts) == StepCounts(tokens=sum(lengths), sequences=9, right_tokens=3 + 5 + 1 + 2)


def test_whole_answers_are_scored_first_where_a_term_reads_them():
    def reads(corrects, **loss):
        return PolicyLoss(config=PolicyLossConfig(**loss), kl=config_of().kl, counts=StepCounts(1, 1, 1), constant=1,
                          corrects=corrects).score_first
    assert not reads(False) and not reads(True)
    assert reads(False, ratio="sequence") and reads(False, ratio="sequence_mean")
    assert reads(True, importance={"level": "sequence"}) and not reads(False, importance={"level": "sequence"})


def test_masked_tokens_change_neither_loss_nor_gradient():
    config, rollouts = config_of("ppo"), make_rollouts(spread=0.3)
    plain = ours(config, rollouts)
    masked = rollouts[2]
    assert masked.learn_mask == (True, False, False, True, True)
    other = list(masked.actor_logp)
    other[1] = other[2] = -50.0
    rollouts[2] = replace(masked, actor_logp=tuple(other))
    assert ours(config, rollouts).loss == plain.loss


def test_a_chunk_of_tokens_reads_its_own_part_of_every_stream():
    config = config_of("grpo", loss={"importance": {"cap": 1.2}}, kl={"ratio": True})
    done = with_old_logp(credited(config, make_rollouts(spread=0.3)))
    batch = pack(done)
    loss = PolicyLoss(config=config.loss, kl=config.kl, counts=StepCounts.of(done), constant=LIMIT, corrects=True)
    logp = batch.old_logp + 0.1
    parts = [slice(0, 4), slice(4, 11), slice(11, len(logp))]

    def of(part):
        return float(loss.on(batch)(TokenScores(part=part, learner_logp=logp[part], entropy=logp[part],
                                                divergence=None, teacher_logp=None)))
    assert math.fsum(of(p) for p in parts) == pytest.approx(of(slice(0, len(logp))), rel=1e-6)


def test_bounds_of_the_correction_in_the_wrong_order_are_refused():
    with pytest.raises(ValidationError, match="floor 2.0 is not below cap 1.0"):
        ImportanceConfig(cap=1.0, floor=2.0)
