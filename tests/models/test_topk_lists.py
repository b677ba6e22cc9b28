"""Lists of a teacher's likeliest tokens that are cut short: without a tail, or with entries that are absent."""

import math

import pytest
import torch

from tests.models.full_logits import HEADS, KINDS, N, V, make_case
from tinyr2.core.errors import ConfigError, DataError
from tinyr2.models import sweep
from tinyr2.models.head import Head, TopK, run
from tinyr2.objectives.policy import weighted_nll

BLOCKS = ((1, 4), (3 * V + 4, 2**19), (2**23, 3 * N))  # elements of a chunk and of a block
both_kls = pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl"])
every_kind = pytest.mark.parametrize("kind", KINDS)


def _topk(case, k, temperature=1.0, **kwargs):
    logp, ids = (case.teacher_hidden @ case.teacher_weight.T / temperature).log_softmax(-1).topk(k)
    return TopK(ids, logp, **kwargs)


def _with_gaps(topk):
    """The same list with every third entry absent: -inf, and an id that is a copy, or far out, or negative."""
    ids, logp = topk.ids.clone(), topk.logp.clone()
    for i in range(ids.numel()):
        if i % 3 == 1:
            ids.view(-1)[i] = (int(ids[i // ids.shape[1], 0]), 10**6, -5)[i % 9 // 3]
            logp.view(-1)[i] = -math.inf
    return TopK(ids, logp, topk.tail)


def _objective(case):
    def objective(scores):
        nll = weighted_nll(scores.learner_logp, case.credit[scores.part], denom=N)
        return nll + (case.share[scores.part] * scores.divergence).sum()

    return objective


def _ours(case, spec, topk, *, extra=None, objective=None, **kwargs):
    return run(case.hidden, Head(case.weight, case.bias, **(extra or {})), case.targets, objective or _objective(case),
               divergence=spec, teacher_topk=topk, **kwargs)


def _term(spec, s, t, *, corrected):
    m = spec.beta * t + (1 - spec.beta) * s
    plain = {"reverse_kl": s * (s / t).log(), "forward_kl": t * (t / s).log(),
             "jsd": spec.beta * t * (t / m).log() + (1 - spec.beta) * s * (s / m).log()}[spec.kind]
    return plain + corrected * {"reverse_kl": t - s, "forward_kl": s - t, "jsd": 0.0}[spec.kind]


def _naive(case, spec, topk, *, extra=None, temperature=1.0):
    """Loss and divergence: token by token, entry by entry."""
    extra, values, logps = {"scale": 1.0, "softcap": None} | (extra or {}), [], []
    for i, target in enumerate(case.targets.tolist()):
        logits = extra["scale"] * (case.weight @ case.hidden[i] + case.bias)
        if extra["softcap"] is not None:
            logits = extra["softcap"] * torch.tanh(logits / extra["softcap"])
        prob = (logits / temperature).softmax(-1)
        logps.append(prob[target].log())
        named = {j: p.exp() for j, p in zip(topk.ids[i].tolist(), topk.logp[i], strict=True) if p > -math.inf}
        total = sum(_term(spec, prob[j], t, corrected=topk.tail == "none") for j, t in named.items())
        others = [prob[j] for j in range(V) if j not in named]
        if others and topk.tail == "bucket":
            total = total + _term(spec, torch.stack(others).sum(), 1 - sum(named.values()), corrected=False)
        values.append(total)
    value = torch.stack(values)
    return -(case.credit * torch.stack(logps)).sum() / N + (case.share * value).sum(), value


def _assert_same(case, spec, topk, exact, tolerance, *, extra=None, temperature=1.0, **kwargs):
    result = _ours(case, spec, topk, extra=extra, temperature=temperature, **kwargs)
    loss, value = _naive(exact, spec, topk, extra=extra, temperature=temperature)
    pairs = [(result.loss.detach(), loss.detach()), (result.divergence, value.detach())]
    pairs += zip(torch.autograd.grad(result.loss, case.learned), torch.autograd.grad(loss, exact.learned), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance)


@both_kls
@pytest.mark.parametrize("k", [1, 4, V])
@pytest.mark.parametrize("extra", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("temperature", [0.6, 1.3])
def test_without_a_tail_values_and_gradients_are_those_of_the_corrected_kl(kind, k, extra, temperature, monkeypatch):
    case = make_case()
    topk = _topk(case, k, temperature, tail="none")
    for chunk, block in BLOCKS:
        monkeypatch.setattr(sweep, "CPU_BLOCK", block)
        _assert_same(case, KINDS[kind], topk, case, 1e-10, extra=extra, temperature=temperature, chunk_elements=chunk)


@every_kind
@pytest.mark.parametrize("k", [4, V])
@pytest.mark.parametrize("extra", HEADS.values(), ids=HEADS)
def test_entries_of_minus_infinity_are_absent_whatever_their_ids(kind, k, extra, monkeypatch):
    case = make_case()
    topk = _with_gaps(_topk(case, k))
    for chunk, block in BLOCKS:
        monkeypatch.setattr(sweep, "CPU_BLOCK", block)
        _assert_same(case, KINDS[kind], topk, case, 1e-10, extra=extra, chunk_elements=chunk)


@both_kls
def test_without_a_tail_entries_may_be_absent_too(kind):
    case = make_case()
    _assert_same(case, KINDS[kind], _with_gaps(_topk(case, 5, tail="none")), case, 1e-10)


@every_kind
@pytest.mark.parametrize("tail", ["bucket", "none"])
def test_float32_stays_within_1e_5_of_float64(kind, tail):
    if (kind, tail) == ("jsd", "none"):
        pytest.skip("refused")
    case = make_case().to(torch.float32)
    exact = case.to(torch.float64)
    topk = _with_gaps(_topk(exact, 5, tail=tail))
    _assert_same(case, KINDS[kind], topk, exact, 1e-5)


@both_kls
def test_without_a_tail_the_divergence_is_never_negative_and_the_plain_sum_is(kind):
    case = make_case(n=500)
    topk = _topk(case, 2, tail="none")
    value = _ours(case, KINDS[kind], topk, objective=lambda s: s.divergence.sum()).divergence
    assert value.min().item() >= 0.0
    student = (case.hidden @ case.weight.T + case.bias).log_softmax(-1).gather(1, topk.ids)
    first, second = (student, topk.logp) if kind == "reverse_kl" else (topk.logp, student)
    assert (first.exp() * (first - second)).sum(-1).min() < -0.01


@both_kls
def test_a_student_that_is_its_teacher_on_the_list_gives_no_signal(kind):
    case = make_case()
    logp, ids = (case.hidden @ case.weight.T + case.bias).log_softmax(-1).detach().topk(3)
    result = _ours(case, KINDS[kind], TopK(ids, logp, "none"), objective=lambda s: s.divergence.sum())
    assert result.divergence.abs().max().item() <= 1e-12
    for gradient in torch.autograd.grad(result.loss, case.learned):
        assert gradient.abs().max().item() <= 1e-12


@every_kind
def test_a_list_of_which_nothing_is_there_says_nothing(kind):
    case = make_case()
    empty = TopK(torch.zeros(N, 3, dtype=torch.int64), torch.full((N, 3), -math.inf, dtype=torch.float64))
    result = _ours(case, KINDS[kind], empty, objective=lambda s: s.divergence.sum())
    assert result.divergence.abs().max().item() <= 1e-12 and result.teacher_logp.isnan().all()
    for gradient in torch.autograd.grad(result.loss, case.learned):
        assert gradient.abs().max().item() <= 1e-12


def test_the_log_prob_of_an_absent_entry_is_unknown():
    case = make_case()
    topk = _with_gaps(_topk(case, 3))
    case.targets = torch.where(torch.arange(N) % 2 == 0, topk.ids[:, 0], topk.ids[:, 1]).clamp(0, V - 1)
    result = _ours(case, None, topk, objective=lambda s: s.learner_logp.sum())
    for i, target in enumerate(case.targets.tolist()):
        named = {j: p for j, p in zip(topk.ids[i].tolist(), topk.logp[i].tolist(), strict=True) if p > -math.inf}
        assert result.teacher_logp[i].item() == pytest.approx(named.get(target, math.nan), nan_ok=True)


def test_the_jsd_needs_a_tail():
    case = make_case()
    with pytest.raises(ConfigError, match="no JSD; set the divergence to reverse_kl or forward_kl, or the tail to"):
        _ours(case, KINDS["jsd"], _topk(case, 3, tail="none"))


def test_a_nan_among_absent_entries_is_still_refused():
    case = make_case(n=1)
    with pytest.raises(DataError, match="add up to nan"):
        _ours(case, KINDS["reverse_kl"], TopK(torch.tensor([[1, 0, 1]]), torch.tensor([[-math.inf, math.nan, -3.0]])))
