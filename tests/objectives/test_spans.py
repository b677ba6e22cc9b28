"""Credit per span: numbers by hand, loops, and the expected gradient by enumerating a tiny language."""

import math
from itertools import product

import pytest
import torch

from tinyr2.objectives.policy import sampled_reverse_kl, weighted_nll
from tinyr2.objectives.spans import position_weight, span_gap, span_known

NAN, INF = math.nan, math.inf


def test_every_token_of_a_span_carries_the_whole_log_ratio_by_hand():
    logp = torch.tensor([-1.0, -0.5, -2.0, -0.25], requires_grad=True)
    gap = span_gap(logp, torch.tensor([0, 0, 1, -1]), torch.tensor([-1.0, -3.0]))
    assert gap.tolist() == [0.5, 0.5, -1.0, 0.0] and not gap.requires_grad
    assert gap.dtype == torch.float32


def test_spans_may_lie_in_any_order_and_their_gaps_add_up_to_the_log_ratio_of_the_answer():
    logp = torch.randn(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    span, teacher = torch.tensor([2, 0, 0, 1, 1, 1]), torch.tensor([-0.5, -4.0, -1.5], dtype=torch.float64)
    gap = span_gap(logp, span, teacher)
    for t in range(6):
        own = sum(logp[i].item() for i in range(6) if span[i] == span[t])
        assert gap[t].item() == pytest.approx(teacher[span[t]].item() - own, abs=1e-12)
    once = sum(gap[span == c][0].item() for c in range(3))
    assert once == pytest.approx((teacher.sum() - logp.sum()).item(), abs=1e-12)


@pytest.mark.parametrize("unknown", [NAN, INF, -INF])
def test_an_unknown_log_prob_gives_no_credit_and_is_counted(unknown):
    logp = torch.tensor([-1.0, -0.5, -2.0], requires_grad=True)
    span, teacher = torch.tensor([0, 0, 1]), torch.tensor([unknown, -3.0])
    gap = span_gap(logp, span, teacher)
    assert gap.tolist() == [0.0, 0.0, -1.0]
    assert span_known(span, teacher).tolist() == [False, False, True]
    weighted_nll(logp, gap, denom=1).backward()
    assert logp.grad.tolist() == [0.0, 0.0, 1.0]


def test_a_teacher_that_says_nothing_gives_zeros():
    span, nothing = torch.tensor([-1, -1]), torch.zeros(0)
    assert span_gap(torch.tensor([-1.0, -2.0]), span, nothing).tolist() == [0.0, 0.0]
    assert span_known(span, nothing).tolist() == [False, False]
    assert span_gap(torch.zeros(0), torch.zeros(0, dtype=torch.int64), nothing).shape == (0,)


def test_spans_of_one_token_are_the_sampled_reverse_kl_bit_for_bit():
    rng = torch.Generator().manual_seed(1)
    logp, teacher = (-torch.rand(5, generator=rng) for _ in range(2))
    logp.requires_grad_()
    loss = weighted_nll(logp, span_gap(logp, torch.arange(5), teacher), denom=5)
    expected = sampled_reverse_kl(logp, teacher, denom=5)
    assert torch.equal(loss, expected)
    assert torch.equal(torch.autograd.grad(loss, logp)[0], torch.autograd.grad(expected, logp)[0])


def _position_weight(gap, lengths, gamma, eps):
    out, start = [], 0
    for n in lengths:
        sizes = [abs(a) for a in gap[start:start + n]]
        out += [1 + gamma * (1 - sum(sizes[:t]) / (sum(sizes) + eps)) for t in range(n)]
        start += n
    return out


@pytest.mark.parametrize("gamma", [0.5, 1.5])
@pytest.mark.parametrize("lengths", [[5], [2, 0, 3], [1, 1, 3]])
def test_position_weights_are_those_of_the_loop(gamma, lengths):
    gap = torch.tensor([0.5, -1.0, 0.0, 2.0, -0.25], dtype=torch.float64)
    got = position_weight(gap, lengths, gamma)
    assert got.tolist() == pytest.approx(_position_weight(gap.tolist(), lengths, gamma, 1e-8), abs=1e-12)


def test_position_weights_of_no_gap_no_tokens_and_gamma_zero():
    assert position_weight(torch.zeros(3), [3], 0.5).tolist() == [1.5, 1.5, 1.5]
    assert position_weight(torch.zeros(0), [], 0.5).shape == position_weight(torch.zeros(0), [0, 0], 0.5).shape == (0,)
    gap = torch.tensor([1.0, -3.0], requires_grad=True)
    assert position_weight(gap, [2], 0.0).tolist() == [1.0, 1.0]
    assert position_weight(gap, [2], 0.5).tolist() == pytest.approx([1.5, 1.375])
    assert not position_weight(gap, [2], 0.5).requires_grad


# A language of two letters and an end (2): answers end with it, or after three tokens.
ANSWERS = [a for n in (1, 2, 3) for a in product(range(3), repeat=n)
           if 2 not in a[:-1] and (a[-1] == 2 or n == 3)]


def _prefixes():
    return sorted({a[:i] for a in ANSWERS for i in range(len(a))})


def _student():
    """Logits of the next token after every prefix."""
    rng = torch.Generator().manual_seed(4)
    return {x: torch.randn(3, generator=rng, dtype=torch.float64).requires_grad_() for x in _prefixes()}


def _logps(student, prefix, tokens):
    """The log-prob of each of `tokens` after the prefix."""
    return torch.stack([student[prefix + tokens[:i]].log_softmax(-1)[y] for i, y in enumerate(tokens)])


def _pairs_from_0(answer):
    """0 takes the next token with it: what a span is, is settled at its last token."""
    cuts, i = [], 0
    while i < len(answer):
        n = min(2, len(answer) - i) if answer[i] == 0 else 1
        cuts.append((i, i + n))
        i += n
    return cuts


def _merged_01(answer):
    """0 and 1 are one where they meet: whether 0 is a span is settled by the token after it."""
    cuts, i = [], 0
    while i < len(answer):
        n = 2 if answer[i:i + 2] == (0, 1) else 1
        cuts.append((i, i + n))
        i += n
    return cuts


def _merged_triple(answer):
    """All of an answer of three is one span, and the tokens of a shorter one are spans."""
    return [(0, 3)] if len(answer) == 3 else [(i, i + 1) for i in range(len(answer))]


def _merged_01_alone(answer):
    """The pairs that are merged, and nothing of the other tokens."""
    return [(i, j) for i, j in _merged_01(answer) if j - i == 2 or answer[i] == 2]


TILINGS = [_pairs_from_0, _merged_01, _merged_triple]


def _teacher(prefix, tokens):
    """A made-up log-prob of a span after a prefix."""
    return math.log(0.05 + 0.9 * ((7 * sum((y + 1) * 4**i for i, y in enumerate(prefix + (3,) + tokens))) % 13) / 13)


def _chance(student, answer):
    return _logps(student, (), answer).sum().exp().item()


def _expected_gradient(student, split):
    """The sum over answers of their chance times the gradient of the loss of that answer."""
    total = torch.zeros((), dtype=torch.float64)
    for answer in ANSWERS:
        logp, cuts = _logps(student, (), answer), split(answer)
        span = torch.full((len(answer),), -1)
        for c, (i, j) in enumerate(cuts):
            span[i:j] = c
        said = torch.tensor([_teacher(answer[:i], answer[i:j]) for i, j in cuts], dtype=torch.float64)
        total = total + _chance(student, answer) * weighted_nll(logp, span_gap(logp, span, said), denom=1)
    return torch.autograd.grad(total, list(student.values()))


def _visits(student, split):
    """The chance that tokens c after x are a span, of every (x, c) that some answer is cut into."""
    chances = {}
    for answer in ANSWERS:
        for i, j in split(answer):
            key = answer[:i], answer[i:j]
            chances[key] = chances.get(key, 0.0) + _chance(student, answer)
    return chances


def _kl_gradient(student, split, *, corrected):
    """The gradient of the spans' reverse KL, p(x) k(x, c) held constant."""
    total = torch.zeros((), dtype=torch.float64)
    for (x, c), chance in _visits(student, split).items():
        logp, said = _logps(student, x, c).sum(), _teacher(x, c)
        prob = logp.exp()
        total = total + chance / prob.item() * (prob * (logp - said) - corrected * (prob - math.exp(said)))
    return torch.autograd.grad(total, list(student.values()))


def _assert_equal(got, expected):
    assert max(g.abs().max().item() for g in expected) > 1e-2
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("split", TILINGS)
def test_the_expected_gradient_is_that_of_the_reverse_kl_of_each_span(split, corrected):
    student = _student()
    _assert_equal(_expected_gradient(student, split), _kl_gradient(student, split, corrected=corrected))


def test_where_tokens_are_left_out_by_what_follows_them_it_is_that_of_the_corrected_kl():
    student = _student()
    got = _expected_gradient(student, _merged_01_alone)
    _assert_equal(got, _kl_gradient(student, _merged_01_alone, corrected=True))
    plain = _kl_gradient(student, _merged_01_alone, corrected=False)
    assert max((a - b).abs().max().item() for a, b in zip(got, plain, strict=True)) > 1e-2


def test_where_a_span_settles_its_own_end_it_is_the_kl_of_the_next_span():
    student, total = _student(), torch.zeros((), dtype=torch.float64)
    visits = _visits(student, _pairs_from_0)
    for x in {x for x, _ in visits}:
        arrives = math.exp(sum(_logps(student, (), x).tolist())) if x else 1.0
        spans = {c: _logps(student, x, c).sum() for y, c in visits if y == x}
        assert sum(logp.exp().item() for logp in spans.values()) == pytest.approx(1.0)
        total = total + arrives * sum(logp.exp() * (logp - _teacher(x, c)) for c, logp in spans.items())
    _assert_equal(_expected_gradient(student, _pairs_from_0), torch.autograd.grad(total, list(student.values())))
