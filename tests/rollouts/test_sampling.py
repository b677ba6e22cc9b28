import math

import numpy as np
import pytest
import torch

from tinyr2.core.config import build
from tinyr2.core.errors import ConfigError, RunError
from tinyr2.rollouts.sampling import SamplingConfig, draw_tokens

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0, -50.0]])
INF = float("inf")
NEXT_TO_1 = float(np.nextafter(1.0, 0.0))


def random_logits(rows, vocab, seed=0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def some_uniform(n):
    return torch.from_numpy(np.random.default_rng(0).random(n))


def draw_many(sampling: SamplingConfig, logits: torch.Tensor = LOGITS, n: int = 20000) -> np.ndarray:
    ids, _ = draw_tokens(logits.expand(n, -1), some_uniform(n), sampling)
    return np.bincount(ids.numpy(), minlength=logits.shape[1])


def fit(seen: np.ndarray, p: np.ndarray) -> float:
    """The p-value of Pearson's chi-square test; tokens expected fewer than 5 times share bins."""
    order = np.argsort(p)
    expected, counts = p[order] * seen.sum(), seen[order]
    rare = np.searchsorted(expected, 5.0)
    bins = [(expected[:rare].sum(), counts[:rare].sum()), *zip(expected[rare:], counts[rare:], strict=True)]
    if bins[0][0] < 5.0:
        (e, c), (e2, c2) = bins[:2]
        bins[:2] = [(e + e2, c + c2)]
    chi2 = sum((c - e) ** 2 / e for e, c in bins)
    return float(torch.special.gammaincc(torch.tensor((len(bins) - 1) / 2), torch.tensor(chi2 / 2)))


def truncated(p: np.ndarray, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> np.ndarray:
    """What is left of a distribution without ties, renormalized: one token at a time, from the likeliest down."""
    kept, mass = np.zeros_like(p), 0.0
    order = np.argsort(-p)[:top_k or None]
    for token in order:
        if mass >= top_p * p[order].sum() or p[token] < min_p * p.max():
            break
        mass += p[token]
        kept[token] = p[token]
    return kept / kept.sum()


SETTINGS = [{}, {"temperature": 0.7}, {"temperature": 1.3}, {"top_p": 0.8}, {"top_k": 12}, {"min_p": 0.05},
            {"temperature": 0.7, "top_k": 300, "top_p": 0.9, "min_p": 0.001}]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("vocab", [5, 40, 2000])
def test_draws_follow_the_tempered_truncated_distribution(vocab, setting):
    logits = LOGITS if vocab == 5 else random_logits(1, vocab)
    cut = {k: v for k, v in setting.items() if k != "temperature"}
    p = truncated(torch.softmax(logits[0].double() / setting.get("temperature", 1.0), 0).numpy(), **cut)
    seen = draw_many(SamplingConfig(**setting), logits)
    assert seen[p == 0].sum() == 0
    assert fit(seen, p) > 0.001


def test_the_chi_square_test_tells_a_close_distribution_apart():
    p = torch.softmax(random_logits(1, 2000)[0].double(), 0).numpy()
    assert fit(draw_many(SamplingConfig(temperature=1.02), random_logits(1, 2000)), p) < 0.001


@pytest.mark.parametrize("vocab", [1, 98, 1024, 1025, 1280, 2000])
def test_each_token_is_drawn_between_its_marks_of_the_exact_cumulative_distribution(vocab):
    logits = random_logits(1, vocab, seed=1)
    cdf = torch.softmax(logits[0].double(), 0).cumsum(0)
    cdf /= cdf[-1].clone()
    before = torch.cat([cdf.new_zeros(1), cdf[:-1]])
    wide = (cdf - before) > 4e-7
    assert wide.sum() > 0.7 * vocab
    for u in ((before + 2e-7)[wide], (cdf - 2e-7)[wide]):
        ids, _ = draw_tokens(logits.expand(len(u), -1), u, SamplingConfig())
        assert torch.equal(ids, torch.arange(vocab)[wide])


@pytest.mark.parametrize("vocab", [40, 1024, 3000])
@pytest.mark.parametrize("setting", [{}, {"top_p": 1 - 1e-9}])
def test_a_token_without_mass_is_never_drawn(vocab, setting):
    rng = np.random.default_rng(0)
    u = torch.tensor([0.0, 5e-324, 1e-17, 0.3, 0.5, 1 - 1e-9, NEXT_TO_1], dtype=torch.float64)
    for few in (1, 2, 9):
        for _ in range(20):
            tokens = np.sort(rng.choice(vocab, few, replace=False))
            logits = torch.full((1, vocab), -INF)
            logits[0, tokens] = torch.from_numpy(rng.normal(size=few) * 2).float()
            ids, logp = draw_tokens(logits.expand(len(u), -1), u, SamplingConfig(**setting))
            assert set(ids.tolist()) <= set(tokens.tolist())
            assert (ids[0], ids[-1]) == (tokens[0], tokens[-1])
            assert torch.isfinite(logp).all()


@pytest.mark.parametrize("vocab", [2, 256, 2560, 2561])
def test_the_uniform_numbers_ends_draw_the_first_and_the_last_token(vocab):
    u = torch.tensor([0.0, NEXT_TO_1], dtype=torch.float64)
    ids, logp = draw_tokens(torch.zeros(2, vocab), u, SamplingConfig())
    assert ids.tolist() == [0, vocab - 1]
    assert logp.tolist() == pytest.approx([-math.log(vocab)] * 2, abs=1e-6)


@pytest.mark.parametrize("setting", [{}, {"temperature": 0.7}, {"temperature": 0.0}, {"top_k": 50, "top_p": 0.9},
                                     {"top_p": 0.95}])
@pytest.mark.parametrize("vocab", [30, 98, 1000, 1025, 1300, 5000])
def test_a_row_draws_the_same_bits_whatever_it_travels_with(vocab, setting):
    sampling = SamplingConfig(**setting)
    logits, u = random_logits(64, vocab), some_uniform(64)
    together = draw_tokens(logits, u, sampling)
    alone = [draw_tokens(logits[i:i + 1].clone(), u[i:i + 1], sampling) for i in range(64)]
    three = draw_tokens(logits[5:8], u[5:8], sampling)
    for whole, single, part in zip(together, zip(*alone, strict=True), three, strict=True):
        assert torch.equal(whole, torch.cat(single))
        assert torch.equal(whole[5:8], part)


def test_a_row_draws_the_same_bits_in_a_batch_too_large_to_be_handled_at_once():
    logits, u = random_logits(100, 50257), some_uniform(100)
    ids, logp = draw_tokens(logits, u, SamplingConfig())
    for i in (0, 40, 41, 42, 81, 82, 83, 99):
        alone = draw_tokens(logits[i:i + 1], u[i:i + 1], SamplingConfig())
        assert (ids[i], logp[i]) == (alone[0][0], alone[1][0])


@pytest.mark.parametrize("setting", [{}, {"temperature": 0.7}, {"temperature": 0.0}, {"top_k": 2, "temperature": 0.5}])
@pytest.mark.parametrize("vocab", [98, 50257])
def test_log_probs_are_tempered_and_over_the_whole_vocabulary_even_when_truncated(vocab, setting):
    logits = random_logits(16, vocab)
    ids, logp = draw_tokens(logits, some_uniform(16), SamplingConfig(**setting))
    exact = torch.log_softmax(logits.double() / (setting.get("temperature", 1.0) or 1.0), -1)
    assert logp.dtype == torch.float32
    assert torch.allclose(logp.double(), exact.gather(1, ids[:, None])[:, 0], rtol=0, atol=5e-6)


def test_drawing_leaves_the_logits_as_they_were():
    logits = random_logits(3, 2000)
    before = logits.clone()
    for temperature in (0.0, 0.7, 1.0):
        draw_tokens(logits, some_uniform(3), SamplingConfig(temperature=temperature, top_k=5))
    assert torch.equal(logits, before)


def test_greedy_takes_the_best_token_and_reports_its_log_prob_at_temperature_1():
    ids, logp = draw_tokens(LOGITS, torch.tensor([0.999], dtype=torch.float64), SamplingConfig(temperature=0.0))
    assert ids.tolist() == [0]
    mass = sum(math.exp(x) for x in (2, 1, 0, -1, -50))
    assert float(logp[0]) == pytest.approx(math.log(math.exp(2) / mass), abs=1e-6)


@pytest.mark.parametrize("best", [[0, 2499], [2499], [255, 256], [256, 600], [2303, 2304]])
def test_greedy_takes_the_first_of_equally_good_tokens_in_a_wide_vocabulary(best):
    logits = random_logits(1, 2500)
    logits[0, best] = 40.0
    ids, logp = draw_tokens(logits, torch.zeros(1, dtype=torch.float64), SamplingConfig(temperature=0.0))
    assert ids.tolist() == [best[0]]
    assert float(logp[0]) == pytest.approx(-math.log(len(best)), abs=1e-6)


@pytest.mark.parametrize(("setting", "kept"), [
    ({"top_k": 1}, {0}), ({"top_k": 3}, {0, 1, 2}), ({"top_p": 0.6}, {0}), ({"top_p": 0.7}, {0, 1}),
    ({"min_p": 0.3}, {0, 1}), ({"min_p": 0.1}, {0, 1, 2}), ({"top_k": 5, "top_p": 0.95, "min_p": 0.01}, {0, 1, 2})])
def test_truncation_keeps_exactly_the_tokens_it_should(setting, kept):
    assert set(np.flatnonzero(draw_many(SamplingConfig(**setting)))) == kept


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_top_p_keeps_as_many_of_equally_likely_tokens_as_hold_the_share(share):
    seen = draw_many(SamplingConfig(top_p=share), torch.zeros(1, 1000))
    assert np.count_nonzero(seen) == pytest.approx(1000 * share, abs=1)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("vocab", [40, 3000])
@pytest.mark.parametrize("fault", [math.nan, INF])
def test_logits_that_are_no_numbers_are_an_error(fault, vocab, temperature):
    logits = random_logits(3, vocab)
    logits[1, 7] = fault
    with pytest.raises(RunError, match="NaN"):
        draw_tokens(logits, some_uniform(3), SamplingConfig(temperature=temperature, top_k=3))
    with pytest.raises(RunError, match="nothing but -inf"):
        draw_tokens(torch.full((1, vocab), -INF), some_uniform(1), SamplingConfig(temperature=temperature))


def test_an_empty_stop_string_is_refused():
    assert build(SamplingConfig, {"stop_strings": ["\n\n", "END"]}, "c.yaml").stop_strings == ("\n\n", "END")
    with pytest.raises(ConfigError, match="stop_strings: an empty string is part of every text"):
        build(SamplingConfig, {"stop_strings": ["END", ""]}, "c.yaml")
