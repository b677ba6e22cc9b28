import pytest
import torch

from tests.train.tiny import ROLLOUTS, rollout
from tinyr2.core.packing import pack
from tinyr2.models.head import TokenScores
from tinyr2.objectives.divergence import Divergence
from tinyr2.train.loss import LossConfig, count, importance, sequence_distillation, token_distillation


def test_counts_are_over_all_rollouts_of_a_step():
    counts = count([*ROLLOUTS, rollout((1,), (2, 3), learn_mask=(False, True))])
    assert (counts.tokens, counts.sequences, counts.student_sequences) == (16, 6, 5)


def test_the_kl_weight_goes_linearly_from_start_to_end():
    loss = LossConfig(level="sequence")
    assert [loss.kl_weight_at(p) for p in (0, 0.5, 1)] == pytest.approx([0.2, 0.125, 0.05])


@pytest.mark.parametrize("wrong", [{"level": "sequence"}, {"divergence": Divergence(kind="jsd")}])
def test_the_sampled_estimator_refuses_what_it_does_not_estimate(wrong):
    with pytest.raises(ValueError, match="sampled"):
        LossConfig(estimator="sampled", **wrong)


# Two answers by the student, one by a teacher; the actor was half, a third, and four times as sure as the learner.
WRITTEN = [rollout((1,), (2, 3), actor_logp=(-2.0, -3.0), advantage=1.0), rollout((1,), (4,), actor_logp=(-1.0,),
           advantage=-1.0, sample=1), rollout((1,), (5,), author="teacher", advantage=0.5)]
RATIO = [0.5, 3.0, 0.25, 1.0]


def scored(part: slice = slice(0, 4)) -> TokenScores:
    actor = torch.tensor([-2.0, -3.0, -1.0, -1.0])
    logp = actor + torch.tensor(RATIO).log()
    divergence, teacher_logp = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([-1.0, -2.0, -1.5, -3.0])
    return TokenScores(learner_logp=logp[part].requires_grad_(), divergence=divergence[part],
                       entropy=torch.zeros(4)[part], teacher_logp=teacher_logp[part], part=part)


@pytest.mark.parametrize(("cap", "weights"), [(2.0, [0.5, 2.0, 0.25, 1.0]), (9.0, RATIO)])
def test_each_token_that_another_precision_sampled_is_weighted(cap, weights):
    batch = pack(WRITTEN)
    weigh, counts, s = importance(batch, cap), count(WRITTEN), scored()
    w, logp = torch.tensor(weights), scored().learner_logp.detach()
    full = token_distillation(LossConfig(), batch, counts, weigh)(s)
    assert full.item() == pytest.approx(float((w * s.divergence).sum() / 4))
    sampled = token_distillation(LossConfig(estimator="sampled"), batch, counts, weigh)(s)
    assert sampled.item() == pytest.approx(float(-(w * (s.teacher_logp - logp) * logp).sum() / 4))


def test_of_a_sequences_loss_the_reward_is_weighted_and_the_divergence_is_not():
    batch, counts, s = pack(WRITTEN), count(WRITTEN), scored()
    loss = LossConfig(level="sequence")
    found = sequence_distillation(loss, batch, counts, 0.0, importance(batch, 2.0))(s)
    credit = torch.tensor([1.0, 1.0, -1.0, 0.5]) * torch.tensor([0.5, 2.0, 0.25, 1.0])
    reward = -float((credit * s.learner_logp.detach()).sum()) / 3
    assert found.item() == pytest.approx(0.8 * reward + 0.2 * (0.1 + 0.2 + 0.3) / 2)


def test_the_weights_of_chunks_are_those_of_the_whole():
    batch, counts = pack(WRITTEN), count(WRITTEN)
    objective = token_distillation(LossConfig(), batch, counts, importance(batch, 2.0))
    parts = [objective(scored(part)).item() for part in (slice(0, 1), slice(1, 3), slice(3, 4))]
    assert sum(parts) == pytest.approx(objective(scored()).item())


def test_nothing_is_weighted_in_one_precision_or_where_nobody_sampled():
    assert importance(pack(WRITTEN), None) is None
    assert importance(pack(WRITTEN[2:]), 2.0) is None
