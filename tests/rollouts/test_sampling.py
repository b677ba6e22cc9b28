import math

import numpy as np
import pytest
import torch

from tinyr2.rollouts.sampling import SamplingConfig, draw_tokens

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0, -50.0]])


def draw_many(sampling: SamplingConfig, n: int = 20000) -> np.ndarray:
    uniform = torch.from_numpy(np.random.default_rng(0).random(n))
    ids, _ = draw_tokens(LOGITS.expand(n, -1), uniform, sampling)
    return np.bincount(ids.numpy(), minlength=5)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.3])
def test_samples_follow_the_tempered_distribution(temperature):
    seen = draw_many(SamplingConfig(temperature=temperature))
    p = torch.softmax(LOGITS[0].double() / temperature, 0).numpy()
    expected = 20000 * p[:4]
    chi2 = float(((seen[:4] - expected) ** 2 / expected).sum())
    assert chi2 < 16.27  # 0.999 quantile of chi-square with 3 degrees of freedom
    assert seen[4] == 0


def test_log_probs_are_tempered_and_over_the_whole_vocabulary_even_when_truncated():
    ids, logp = draw_tokens(LOGITS, torch.tensor([0.3], dtype=torch.float64),
                            SamplingConfig(temperature=0.5, top_k=2))
    expected = torch.log_softmax(LOGITS / 0.5, -1)[0, ids[0]]
    assert float(logp[0]) == pytest.approx(float(expected), abs=1e-6)


def test_greedy_takes_the_best_token_and_reports_its_log_prob_at_temperature_1():
    ids, logp = draw_tokens(LOGITS, torch.tensor([0.999], dtype=torch.float64), SamplingConfig(temperature=0.0))
    assert ids.tolist() == [0]
    mass = sum(math.exp(x) for x in (2, 1, 0, -1, -50))
    assert float(logp[0]) == pytest.approx(math.log(math.exp(2) / mass), abs=1e-6)


@pytest.mark.parametrize(("setting", "kept"), [
    ({"top_k": 1}, {0}), ({"top_k": 3}, {0, 1, 2}), ({"top_p": 0.6}, {0}), ({"top_p": 0.7}, {0, 1}),
    ({"min_p": 0.3}, {0, 1}), ({"min_p": 0.1}, {0, 1, 2}), ({"top_k": 5, "top_p": 0.95, "min_p": 0.01}, {0, 1, 2})])
def test_truncation_keeps_exactly_the_tokens_it_should(setting, kept):
    assert set(np.flatnonzero(draw_many(SamplingConfig(**setting)))) == kept


def test_a_uniform_number_next_to_1_draws_the_last_token_with_mass():
    logits = torch.tensor([[0.0, 0.0, float("-inf"), float("-inf")]])
    ids, _ = draw_tokens(logits, torch.tensor([np.nextafter(1.0, 0.0)]), SamplingConfig())
    assert ids.tolist() == [1]
    ids, _ = draw_tokens(logits.flip(-1), torch.tensor([0.0], dtype=torch.float64), SamplingConfig())
    assert ids.tolist() == [2]
