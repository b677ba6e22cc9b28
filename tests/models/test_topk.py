"""A teacher's top k and one bucket for the rest, against loops over full logits that autograd differentiates."""

import math

import pytest
import torch

from tests.models.full_logits import HEADS, KINDS, D, N, V, make_case
from tests.models.test_head_cost import Spy
from tinyr2.core.errors import DataError
from tinyr2.models import sweep
from tinyr2.models.head import Head, TopK, run
from tinyr2.objectives.policy import weighted_nll

every_kind = pytest.mark.parametrize("kind", KINDS)
every_k = pytest.mark.parametrize("k", [1, 4, V - 1, V])


def _teacher(case, temperature=1.0):
    return (case.teacher_hidden @ case.teacher_weight.T / temperature).log_softmax(-1)


def _topk(case, k, temperature=1.0):
    logp, ids = _teacher(case, temperature).topk(k)
    return TopK(ids, logp)


def _objective(case):
    def objective(scores):
        nll = weighted_nll(scores.learner_logp, case.credit[scores.part], denom=N)
        return nll + (case.share[scores.part] * scores.divergence).sum()

    return objective


def _naive(case, spec, topk, *, extra=None, temperature=1.0):
    """Loss and divergence: token by token, bucket by bucket."""
    extra, values, logps = {"scale": 1.0, "softcap": None} | (extra or {}), [], []
    for i in range(len(case.targets)):
        logits = extra["scale"] * (case.weight @ case.hidden[i] + case.bias)
        if extra["softcap"] is not None:
            logits = extra["softcap"] * torch.tanh(logits / extra["softcap"])
        prob = (logits / temperature).softmax(-1)
        logps.append(prob[case.targets[i]].log())
        ids = topk.ids[i].tolist()
        student, teacher = [prob[j] for j in ids], [p.exp() for p in topk.logp[i]]
        others = [prob[j] for j in range(len(prob)) if j not in ids]
        if others:
            student.append(torch.stack(others).sum())
            teacher.append(1 - torch.stack(teacher).sum())
        total = torch.zeros((), dtype=torch.float64)
        for s, t in zip(student, teacher, strict=True):
            m = spec.beta * t + (1 - spec.beta) * s
            total = total + {
                "reverse_kl": s * (s / t).log(), "forward_kl": t * (t / s).log(),
                "jsd": spec.beta * t * (t / m).log() + (1 - spec.beta) * s * (s / m).log()}[spec.kind]
        values.append(total)
    value = torch.stack(values)
    return -(case.credit * torch.stack(logps)).sum() / N + (case.share * value).sum(), value


def _ours(case, spec, topk, *, extra=None, objective=None, **kwargs):
    return run(case.hidden, Head(case.weight, case.bias, **(extra or {})), case.targets, objective or _objective(case),
               divergence=spec, teacher_topk=topk, **kwargs)


@every_kind
@every_k
@pytest.mark.parametrize("extra", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("temperature", [0.6, 1.3])
def test_values_and_gradients_are_those_of_the_buckets_whatever_the_chunk(kind, k, extra, temperature, monkeypatch):
    case = make_case()
    topk = _topk(case, k, temperature)
    loss, value = _naive(case, KINDS[kind], topk, extra=extra, temperature=temperature)
    expected = torch.autograd.grad(loss, case.learned)
    for chunk, block in ((1, 4), (3 * V + 4, 2**19), (2**23, 3 * N)):
        monkeypatch.setattr(sweep, "CPU_BLOCK", block)
        result = _ours(case, KINDS[kind], topk, extra=extra, temperature=temperature, chunk_elements=chunk)
        torch.testing.assert_close(result.loss.detach(), loss.detach(), rtol=0, atol=1e-10)
        torch.testing.assert_close(result.divergence, value.detach(), rtol=0, atol=1e-10)
        for a, b in zip(torch.autograd.grad(result.loss, case.learned), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@every_kind
def test_float32_stays_within_1e_5_of_float64(kind):
    case = make_case().to(torch.float32)
    exact = case.to(torch.float64)
    topk = _topk(exact, 4)
    result = _ours(case, KINDS[kind], TopK(topk.ids, topk.logp.float()))
    loss, value = _naive(exact, KINDS[kind], topk)
    torch.testing.assert_close(result.divergence.double(), value.detach(), rtol=0, atol=1e-5)
    for a, b in zip(torch.autograd.grad(result.loss, case.learned), torch.autograd.grad(loss, exact.learned),
                    strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-5)


@every_kind
def test_all_tokens_listed_give_the_divergence_over_the_whole_vocabulary(kind):
    case = make_case()
    order = torch.stack([torch.randperm(V, generator=torch.Generator().manual_seed(i)) for i in range(N)])
    listed = _ours(case, KINDS[kind], TopK(order, _teacher(case).gather(1, order)))
    got = torch.autograd.grad(listed.loss, case.learned)
    full = run(case.hidden, Head(case.weight, case.bias), case.targets, _objective(case), divergence=KINDS[kind],
               teacher_hidden=case.teacher_hidden, teacher_head=Head(case.teacher_weight))
    torch.testing.assert_close(listed.divergence, full.divergence, rtol=0, atol=1e-10)
    torch.testing.assert_close(listed.teacher_logp, full.teacher_logp, rtol=0, atol=1e-10)
    for a, b in zip(got, torch.autograd.grad(full.loss, case.learned), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_one_listed_token_gives_the_binary_kl():
    topk = TopK(torch.tensor([[2]]), torch.tensor([[math.log(0.5)]]))
    result = run(torch.zeros(1, 2), Head(torch.zeros(4, 2)), torch.tensor([1]), lambda s: s.divergence.sum(),
                 divergence=KINDS["reverse_kl"], teacher_topk=topk)
    assert result.divergence.item() == pytest.approx(0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5))


def test_the_teachers_log_prob_is_known_where_it_lists_the_target_and_nan_elsewhere():
    case = make_case()
    topk = _topk(case, 3)
    case.targets = torch.where(torch.arange(N) % 2 == 0, topk.ids[:, 1], _teacher(case).argmin(-1))
    with_divergence = _ours(case, KINDS["jsd"], topk, chunk_elements=2 * V)
    alone = _ours(case, None, topk, objective=lambda s: s.learner_logp.sum())
    for found in (with_divergence.teacher_logp, alone.teacher_logp):
        assert torch.equal(found[::2], topk.logp[::2, 1]) and found[1::2].isnan().all()


@every_kind
@pytest.mark.parametrize("excess", [0.0, 1e-7, 5e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_list_that_leaves_nothing_to_the_rest_stays_finite(kind, excess, dtype):
    case = make_case().to(dtype)
    topk = _topk(case, 3)
    mass = topk.logp.double().logsumexp(-1, keepdim=True)
    full = TopK(topk.ids, (topk.logp.double() - mass + math.log1p(excess)).to(dtype))
    result = _ours(case, KINDS[kind], full)
    assert result.divergence.isfinite().all()
    for gradient in torch.autograd.grad(result.loss, case.learned):
        assert gradient.isfinite().all()


def test_a_teacher_without_a_tail_costs_the_forward_kl_nothing_there():
    case = make_case()
    topk = _topk(case, 3)
    full = TopK(topk.ids, topk.logp.log_softmax(-1))
    result = _ours(case, KINDS["forward_kl"], full)
    prob = (case.hidden @ case.weight.T + case.bias).log_softmax(-1).gather(1, full.ids)
    expected = (full.logp.exp() * (full.logp - prob)).sum(-1)
    torch.testing.assert_close(result.divergence, expected.detach(), rtol=0, atol=1e-10)


@every_kind
def test_listed_probabilities_of_zero_stay_finite(kind):
    case = make_case()
    topk = _topk(case, 3)
    result = _ours(case, KINDS[kind], TopK(topk.ids, topk.logp.index_fill(1, torch.tensor([2]), -math.inf)))
    assert result.divergence.isfinite().all()
    for gradient in torch.autograd.grad(result.loss, case.learned):
        assert gradient.isfinite().all()


def test_a_student_that_is_sure_of_the_listed_tokens_has_a_small_tail_and_not_a_rounded_one():
    weight = torch.tensor([0.0, -30.0, -30.0, -30.0])[:, None]
    result = run(torch.ones(1, 1), Head(weight), torch.tensor([0]), lambda s: s.divergence.sum(),
                 divergence=KINDS["forward_kl"],
                 teacher_topk=TopK(torch.tensor([[0]]), torch.tensor([[math.log(0.5)]])))
    expected = 0.5 * math.log(0.5) + 0.5 * (math.log(0.5) + 30 - math.log(3))
    assert result.divergence.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("ids", "logp", "message"), [
    ([[1, 1]], [[-1.0, -2.0]], "names a token twice"), ([[0, 11]], [[-1.0, -2.0]], "token 11 of a vocabulary of 11"),
    ([[-1, 3]], [[-1.0, -2.0]], "token -1 of"), ([[0, 1]], [[-0.1, -0.1]], r"add up to 1\.81"),
    ([[0, 1]], [[-0.1, math.nan]], "add up to nan")])
def test_what_is_no_list_of_log_probs_is_refused(ids, logp, message):
    case = make_case(n=1)
    with pytest.raises(DataError, match=message):
        _ours(case, KINDS["reverse_kl"], TopK(torch.tensor(ids), torch.tensor(logp)))


def test_memory_beyond_the_students_own_chunk_grows_with_the_list_and_not_with_the_vocabulary():
    vocab, n, extra = 4096, 32, []
    case = make_case(n=n, d=2, v=vocab)
    topk = _topk(case, 4)
    for listed in (None, topk):
        with Spy(vocab) as spy:
            run(case.hidden, Head(case.weight), case.targets, lambda s: s.learner_logp.sum(), teacher_topk=listed,
                divergence=None if listed is None else KINDS["jsd"], chunk_elements=8 * vocab)
        extra.append(spy.peak)
    assert extra[1] - extra[0] < 40 * n * 4 * 8 < n * vocab * 8 / 10


def test_no_tokens_give_loss_zero():
    case = make_case(n=0)
    result = _ours(case, KINDS["jsd"], TopK(torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 3)))
    result.loss.backward()
    assert result.loss.item() == 0.0 and torch.equal(case.weight.grad, torch.zeros(V, D, dtype=torch.float64))
