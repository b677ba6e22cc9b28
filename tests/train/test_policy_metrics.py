"""Numbers of an update and of a collection, by hand."""

from dataclasses import replace

import pytest
import torch

from tests.train.reinforced import config_of
from tests.train.tiny import rollout
from tinyr2.train.collect import Collection
from tinyr2.train.policy_loss import PolicyLoss, StepCounts
from tinyr2.train.policy_metrics import UpdateMetrics, collection_metrics
from tinyr2.train.step import Scores


def loss_of(corrects=False, **loss):
    config = config_of(loss=loss)
    return PolicyLoss(config=config.loss, kl=config.kl, counts=StepCounts(1, 1, 1), constant=1, corrects=corrects)


def scores_of(rollouts, logp):
    logp = torch.tensor(logp, dtype=torch.float64)
    row = torch.tensor([i for i, r in enumerate(rollouts) for _ in range(r.learned)])
    return Scores(rollouts=list(rollouts), row=row, learner_logp=logp, entropy=logp, actor_logp=logp, divergence=None,
                  teacher_logp=None, loss=0.0)


def answer(credit, **more):
    return rollout((3,), tuple(range(4, 4 + len(credit))), credit=credit, actor_logp=(-1.0,) * len(credit), **more)


UP, DOWN = -1.0 + 0.3, -1.0 - 0.3  # ratios 1.35 and 0.74


def test_what_the_clip_removed_is_a_share_of_tokens_at_each_side():
    pair = [answer((1.0, 1.0, 1.0)), answer((-1.0,))]
    metrics = UpdateMetrics()
    metrics.add(scores_of(pair, [UP, UP, DOWN, DOWN]), loss_of())
    assert metrics.means() == {"clip_ratio/low_mean": 0.25, "clip_ratio/high_mean": 0.5,
                               "clip_ratio/region_mean": 0.75}


def test_means_are_over_the_tokens_of_all_updates_and_not_over_the_updates():
    metrics = UpdateMetrics()
    metrics.add(scores_of([answer((1.0,) * 9)], [-1.0] * 9), loss_of())
    metrics.add(scores_of([answer((1.0,))], [UP]), loss_of())
    assert metrics.means()["clip_ratio/high_mean"] == pytest.approx(0.1)


def test_the_kl_to_the_reference_is_a_mean_over_the_tokens_of_all_updates():
    metrics = UpdateMetrics()
    metrics.add(scores_of([answer((1.0,) * 3, reference_logp=(-1.0,) * 3)], [-1.0] * 3), loss_of())
    metrics.add(scores_of([answer((1.0,), reference_logp=(-2.0,))], [-1.0]), loss_of())
    assert metrics.means()["kl"] == pytest.approx((2.718281828 ** -1 - 1 + 1) / 4)


def test_without_a_reference_there_is_no_kl():
    metrics = UpdateMetrics()
    metrics.add(scores_of([answer((1.0,))], [-1.0]), loss_of())
    assert "kl" not in metrics.means() and UpdateMetrics().means() == {}


def test_a_clip_that_reads_whole_answers_is_reported_so():
    one = answer((1.0, 1.0))
    for level, share in (("sequence_mean", 0.0), ("sequence", 1.0)):  # ratios exp(0.15) and exp(0.3)
        metrics = UpdateMetrics()
        metrics.add(scores_of([one], [-0.85, -0.85]), loss_of(ratio=level))
        assert metrics.means()["clip_ratio/high_mean"] == share


def test_in_a_single_corrected_update_the_learner_is_its_own_old_policy():
    one, metrics = answer((1.0, 1.0)), UpdateMetrics()
    metrics.add(scores_of([one], [UP, UP]), loss_of(corrects=True))
    assert metrics.means()["clip_ratio/region_mean"] == 0.0
    metrics = UpdateMetrics()
    metrics.add(scores_of([replace(one, old_logp=(-1.0, -1.0))], [UP, UP]), loss_of(corrects=True))
    assert metrics.means()["clip_ratio/high_mean"] == 1.0


def test_a_collection_is_told_by_its_rounds_and_shares():
    written = [answer((1.0,), group=g, reward=x, error=e) for g, x, e in (
        (0, 1.0, None), (0, 0.0, None), (1, 1.0, None), (1, 1.0, None), (2, None, "no"), (2, 1.0, None),
        (3, None, None), (3, 0.0, None))]
    found = Collection(kept=written[:2], written=written, rounds=2, groups=4, equal=3)
    assert collection_metrics(found, 2) == {
        "sampling/rounds": 2.0, "sampling/equal_groups_ratio": 0.75, "sampling/kept_groups_ratio": 0.25,
        "rollouts/dropped_ratio": 0.25, "rollouts/learned": 2.0}
