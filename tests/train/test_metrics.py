import pytest
import torch

from tests.train.tiny import ROLLOUTS, rollout
from tinyr2.train.metrics import completion_metrics, reward_metrics, score_metrics
from tinyr2.train.step import Scores


def scores(**more) -> Scores:
    nan = float("nan")
    return Scores(**({"rollouts": [], "row": torch.zeros(3, dtype=torch.long), "loss": 0.25,
                      "learner_logp": torch.tensor([-1.0, -2.0, -3.0]), "entropy": torch.tensor([0.5, 1.0, 1.5]),
                      "actor_logp": torch.tensor([-1.5, -2.0, nan]), "divergence": None,
                      "teacher_logp": torch.tensor([-0.5, -3.0, -3.0])} | more))


def test_score_metrics_by_hand():
    found = score_metrics(scores())
    assert found == pytest.approx({
        "loss": 0.25, "entropy": 1.0, "kl": (-0.5 + 1.0 + 0.0) / 3,
        "sampling/sampling_logp_difference/mean": 0.25, "sampling/sampling_logp_difference/max": 0.5})


def test_importance_ratios_are_those_of_sampled_tokens_capped_and_reported_where_they_were_used():
    found = score_metrics(scores(actor_logp=torch.tensor([-2.0, -1.5, float("nan")])), 2.0)
    ratios = {name.rpartition("/")[2]: value for name, value in found.items() if "importance_sampling_ratio" in name}
    low = 2.718281828 ** -0.5
    assert ratios == pytest.approx({"min": low, "mean": (low + 2.0) / 2, "max": 2.0})
    assert not [name for name in score_metrics(scores()) if "importance" in name]
    nobody = score_metrics(scores(actor_logp=torch.full((3,), float("nan"))), 2.0)
    assert not [name for name in nobody if name.startswith("sampling/")]


def test_the_divergence_is_the_kl_where_it_was_computed():
    assert score_metrics(scores(divergence=torch.tensor([0.0, 0.3, 0.6])))["kl"] == pytest.approx(0.3)


def test_what_was_not_measured_is_absent():
    found = score_metrics(scores(teacher_logp=None, actor_logp=torch.full((3,), float("nan"))))
    assert set(found) == {"loss", "entropy"}
    assert completion_metrics([rollout((1,), (2,), author="dataset")]) == {}
    assert reward_metrics([]) == {}


def test_completion_metrics_by_hand():
    found = completion_metrics(ROLLOUTS)
    assert found == pytest.approx({
        "completions/mean_length": 3.0, "completions/min_length": 1.0, "completions/max_length": 5.0,
        "completions/clipped_ratio": 0.2, "completions/mean_terminated_length": 3.5})


def test_reward_metrics_by_hand():
    rows = [rollout((1,), (2,), reward=0.3, reward_parts={"a": 0.3, "b": None}, group=0),
            rollout((1,), (2,), reward=0.3, reward_parts={"a": 0.3, "b": 1.0}, group=0),
            rollout((1,), (2,), reward=0.0, reward_parts={"a": 0.0, "b": 0.0}, group=1),
            rollout((1,), (2,), reward=1.0, reward_parts={"a": 1.0, "b": 0.0}, group=1),
            rollout((1,), (2,), error="score raised", group=1)]
    found = reward_metrics(rows)
    assert found["reward"] == pytest.approx(0.4)
    assert found["frac_reward_zero_std"] == 0.5
    assert found["rewards/a/mean"] == pytest.approx(0.4)
    assert found["rewards/b/mean"] == pytest.approx(1 / 3)
    assert found["rollouts/errored_ratio"] == 0.2
