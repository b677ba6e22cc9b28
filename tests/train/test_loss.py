import pytest

from tests.train.tiny import ROLLOUTS, rollout
from tinyr2.objectives.divergence import Divergence
from tinyr2.train.loss import LossConfig, count


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
