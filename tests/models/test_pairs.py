"""A teacher of another vocabulary, against loops over events that autograd differentiates."""

import math

import pytest
import torch

from tests.models.full_logits import HEADS, KINDS, D, N, V, make_case
from tests.models.test_head_cost import Spy
from tinyr2.core.errors import ConfigError, DataError
from tinyr2.models import sweep
from tinyr2.models.head import Blend, Head, Pairs, run
from tinyr2.objectives.policy import weighted_nll

W = 9  # tokens of the teacher
EPS = torch.finfo(torch.float64).eps
SHARED = {"some": ([7, 0, 3, 10], [2, 8, 0, 5]), "one": ([4], [4]), "all of the teacher's": ([*range(2, 11)], None),
          "all of the student's": (None, [*range(11, 0, -1)]), "all": (None, [*range(1, 11), 0])}


def _case(shared, dtype=torch.float64, n=N):
    """A case whose teacher has a vocabulary that fits the pairs, and the pairs."""
    student, teacher = SHARED[shared]
    student = list(range(V)) if student is None else student
    vocab = {"all of the student's": V + 3, "all": V}.get(shared, W)
    teacher = list(range(vocab)) if teacher is None else teacher
    case, other = make_case(n=n), make_case(n=n, v=vocab, seed=1)
    case.teacher_weight = other.teacher_weight
    return case.to(dtype), Pairs(torch.tensor(student), torch.tensor(teacher))


def _objective(case, *, with_logp=True):
    def objective(scores):
        nll = weighted_nll(scores.learner_logp, case.credit[scores.part], denom=N) if with_logp else 0.0
        return nll + (case.share[scores.part] * scores.divergence).sum()

    return objective


def _ours(case, spec, pairs, *, extra=None, objective=None, **kwargs):
    return run(case.hidden, Head(case.weight, case.bias, **(extra or {})), case.targets, objective or _objective(case),
               divergence=spec, teacher_hidden=case.teacher_hidden, teacher_head=Head(case.teacher_weight),
               teacher_pairs=pairs, **kwargs)


def _divergence(spec, student, teacher):
    """The divergence of two lists of probabilities, event by event."""
    total = torch.zeros((), dtype=torch.float64)
    for s, t in zip(student, teacher, strict=True):
        m = spec.beta * t + (1 - spec.beta) * s
        total = total + {
            "reverse_kl": s * (s / t).log(), "forward_kl": t * (t / s).log(),
            "jsd": spec.beta * t * (t / m).log() + (1 - spec.beta) * s * (s / m).log()}[spec.kind]
    return total


def _naive(case, spec, pairs, *, extra=None, temperature=1.0, floor=EPS):
    """Loss and streams: token by token, event by event."""
    extra = {"scale": 1.0, "softcap": None} | (extra or {})
    ours, theirs = pairs.student.tolist(), pairs.teacher.tolist()
    logp, values, entropy, teacher_logp = [], [], [], []
    for i, target in enumerate(case.targets.tolist()):
        logits = extra["scale"] * (case.weight @ case.hidden[i] + case.bias)
        if extra["softcap"] is not None:
            logits = extra["softcap"] * torch.tanh(logits / extra["softcap"])
        student = (logits / temperature).softmax(-1)
        teacher = (case.teacher_weight @ case.teacher_hidden[i] / temperature).softmax(-1)
        events = [student[j] for j in ours], [teacher[j] for j in theirs]
        rests = [[p for j, p in enumerate(side) if j not in ids] for side, ids in ((student, ours), (teacher, theirs))]
        if rests[0] or rests[1]:
            for event, rest in zip(events, rests, strict=True):
                event.append(torch.stack(rest).sum() if rest else torch.tensor(floor, dtype=torch.float64))
        values.append(_divergence(spec, *events))
        logp.append(student[target].log())
        entropy.append(-(student * student.log()).sum())
        partner = dict(zip(ours, theirs, strict=True)).get(target)
        teacher_logp.append(torch.tensor(math.nan, dtype=torch.float64) if partner is None else teacher[partner].log())
    logp, values, entropy, teacher_logp = (torch.stack(x) for x in (logp, values, entropy, teacher_logp))
    loss = -(case.credit * logp).sum() / N + (case.share * values).sum()
    return loss, {"learner_logp": logp, "divergence": values, "entropy": entropy, "teacher_logp": teacher_logp}


def _assert_same(result, case, loss, streams, exact, tolerance):
    torch.testing.assert_close(result.loss.detach().double(), loss.detach(), rtol=0, atol=tolerance)
    for name, expected in streams.items():
        torch.testing.assert_close(getattr(result, name).double(), expected.detach(), rtol=0, atol=tolerance,
                                   equal_nan=True)
    got = torch.autograd.grad(result.loss, case.learned)
    for a, b in zip(got, torch.autograd.grad(loss, exact.learned), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance)


every_kind = pytest.mark.parametrize("kind", KINDS)
every_share = pytest.mark.parametrize("shared", SHARED)


@every_kind
@every_share
@pytest.mark.parametrize("extra", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("temperature", [0.6, 1.3])
def test_values_and_gradients_are_those_of_the_events_whatever_the_chunk(kind, shared, extra, temperature, monkeypatch):
    case, pairs = _case(shared)
    for chunk, block in ((1, 4), (3 * V + 4, 2**19), (2**23, 3 * N), (2**23, 1)):
        monkeypatch.setattr(sweep, "CPU_BLOCK", block)
        result = _ours(case, KINDS[kind], pairs, extra=extra, temperature=temperature, chunk_elements=chunk)
        loss, streams = _naive(case, KINDS[kind], pairs, extra=extra, temperature=temperature)
        _assert_same(result, case, loss, streams, case, 1e-10)


@every_kind
@every_share
@pytest.mark.parametrize("extra", HEADS.values(), ids=HEADS)
def test_float32_stays_within_1e_5_of_float64(kind, shared, extra, monkeypatch):
    case, pairs = _case(shared, torch.float32)
    for block in (2**19, 3 * N):
        monkeypatch.setattr(sweep, "CPU_BLOCK", block)
        exact = case.to(torch.float64)
        loss, streams = _naive(exact, KINDS[kind], pairs, extra=extra, floor=torch.finfo(torch.float32).eps)
        _assert_same(_ours(case, KINDS[kind], pairs, extra=extra), case, loss, streams, exact, 1e-5)


@every_kind
@pytest.mark.parametrize("blocks", [2**19, 5 * N])
def test_one_vocabulary_in_another_order_is_one_vocabulary(kind, blocks, monkeypatch):
    monkeypatch.setattr(sweep, "CPU_BLOCK", blocks)
    case = make_case()
    order = torch.randperm(V, generator=torch.Generator().manual_seed(3))
    plain = run(case.hidden, Head(case.weight, case.bias), case.targets, _objective(case), divergence=KINDS[kind],
                teacher_hidden=case.teacher_hidden, teacher_head=Head(case.teacher_weight))
    expected = torch.autograd.grad(plain.loss, case.learned)
    case.teacher_weight = case.teacher_weight[order]
    result = _ours(case, KINDS[kind], Pairs(order, torch.arange(V)))
    for name in ("divergence", "teacher_logp", "learner_logp", "entropy"):
        torch.testing.assert_close(getattr(result, name), getattr(plain, name), rtol=0, atol=1e-12)
    for a, b in zip(torch.autograd.grad(result.loss, case.learned), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@every_kind
def test_a_teacher_that_is_the_student_gives_no_signal_whatever_is_shared(kind):
    case = make_case()
    result = run(case.hidden, Head(case.weight, case.bias), case.targets, lambda s: s.divergence.sum(),
                 divergence=KINDS[kind], teacher_hidden=case.hidden.detach(),
                 teacher_head=Head(case.weight.detach()[[5, 1, 0, 9, 3, 2, 4, 8, 7, 6, 10]], case.bias.detach()[
                     [5, 1, 0, 9, 3, 2, 4, 8, 7, 6, 10]]),
                 teacher_pairs=Pairs(torch.tensor([5, 9, 10, 0]), torch.tensor([0, 3, 10, 2])))
    assert result.divergence.abs().max().item() <= 1e-12
    for gradient in torch.autograd.grad(result.loss, case.learned):
        assert gradient.abs().max().item() <= 1e-12


def test_the_teachers_log_prob_alone_needs_no_divergence(monkeypatch):
    for block in (2**19, 3 * N):
        monkeypatch.setattr(sweep, "CPU_BLOCK", block)
        case, pairs = _case("some")
        result = _ours(case, None, pairs, objective=lambda s: weighted_nll(s.learner_logp, denom=1))
        _, streams = _naive(case, KINDS["jsd"], pairs)
        torch.testing.assert_close(result.teacher_logp, streams["teacher_logp"], rtol=0, atol=1e-12, equal_nan=True)
        assert result.divergence is None
        (got,) = torch.autograd.grad(result.loss, case.bias)
        (expected,) = torch.autograd.grad(-streams["learner_logp"].sum(), case.bias)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@every_kind
@pytest.mark.parametrize("use", ["learner_logp", "divergence"])
def test_a_stream_that_the_objective_leaves_out_gets_no_gradient(kind, use):
    case, pairs = _case("some")
    weights = {"learner_logp": case.credit, "divergence": case.share}
    result = _ours(case, KINDS[kind], pairs, objective=lambda s: (weights[use][s.part] * getattr(s, use)).sum())
    _, streams = _naive(case, KINDS[kind], pairs)
    expected = torch.autograd.grad((weights[use] * streams[use]).sum(), case.learned)
    for a, b in zip(torch.autograd.grad(result.loss, case.learned), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@every_kind
@pytest.mark.parametrize("how", ["average", "product"])
def test_a_blend_of_another_vocabulary_is_compared_like_one_model(kind, how):
    case, pairs = _case("some")
    other = make_case(v=W, seed=2)
    heads = Head(case.teacher_weight), Head(other.teacher_weight)
    blend = Blend((case.teacher_hidden, other.teacher_hidden), heads, (1.0, 3.0), how)
    result = run(case.hidden, Head(case.weight, case.bias), case.targets, _objective(case), divergence=KINDS[kind],
                 teacher_blend=blend, teacher_pairs=pairs)
    logps = [(s @ h.weight.T).log_softmax(-1) for s, h in zip(blend.hidden, heads, strict=True)]
    mixed = torch.logsumexp(torch.stack([logps[0] + math.log(0.25), logps[1] + math.log(0.75)]), 0)
    if how == "product":
        mixed = 0.25 * logps[0] + 0.75 * logps[1]
    case.teacher_hidden, case.teacher_weight = mixed, torch.eye(W, dtype=torch.float64)
    loss, streams = _naive(case, KINDS[kind], pairs)
    _assert_same(result, case, loss, streams, case, 1e-10)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sure", [0, 1])
def test_a_side_that_is_sure_of_the_shared_tokens_or_of_the_others_stays_finite(kind, dtype, sure):
    case, pairs = _case("some", dtype)
    with torch.no_grad():
        case.bias[pairs.student] += 300.0 * (1 - 2 * sure)
    for objective in (None, lambda s: s.divergence.sum()):
        result = _ours(case, KINDS[kind], pairs, objective=objective)
        assert result.divergence.isfinite().all()
        for gradient in torch.autograd.grad(result.loss, case.learned):
            assert gradient.isfinite().all()


@every_kind
@pytest.mark.parametrize(("dtype", "low", "tolerance"), [(torch.float64, -3000.0, 1e-9), (torch.float32, -100.0, 1e-4)])
def test_logits_far_above_those_of_the_first_block_do_not_overflow(kind, dtype, low, tolerance, monkeypatch):
    monkeypatch.setattr(sweep, "CPU_BLOCK", N)
    case, pairs = _case("all of the teacher's", dtype)
    steep = torch.zeros(W, dtype=dtype)
    steep[0] = low
    with torch.no_grad():
        case.bias[:3] += low
    exact = case.to(torch.float64)
    result = run(case.hidden, Head(case.weight, case.bias), case.targets, _objective(case), divergence=KINDS[kind],
                 teacher_hidden=case.teacher_hidden, teacher_head=Head(case.teacher_weight, steep), teacher_pairs=pairs)
    assert all(getattr(result, name).isfinite().all() for name in ("learner_logp", "entropy"))
    student = (exact.hidden @ exact.weight.T + exact.bias).log_softmax(-1)
    torch.testing.assert_close(result.learner_logp.double(), student.gather(1, exact.targets[:, None])[:, 0].detach(),
                               rtol=1e-6, atol=tolerance)
    teacher = (exact.teacher_hidden @ exact.teacher_weight.T + steep.double()).log_softmax(-1)
    known = ~result.teacher_logp.isnan()
    expected = teacher.gather(1, (exact.targets - 2).clamp_min(0)[:, None])[:, 0]
    torch.testing.assert_close(result.teacher_logp[known].double(), expected[known], rtol=1e-6, atol=tolerance)
    for gradient in torch.autograd.grad(result.loss, case.learned):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_of_either_vocabulary_is_larger_than_a_chunk(kind, monkeypatch):
    monkeypatch.setattr(sweep, "CPU_BLOCK", 300)
    vocab, chunk = 64, 1000
    case = make_case(n=200, d=4, v=vocab)
    case.teacher_weight = make_case(v=96, d=4, seed=1).teacher_weight
    pairs = Pairs(torch.arange(48), torch.arange(48) + 40)
    peaks = []
    for width in (vocab, 96):
        with Spy(width, widths=(4, 6)) as spy:
            _ours(case, KINDS[kind], pairs, chunk_elements=chunk).loss.backward()
        peaks.append(spy.largest)
    assert 0 < max(peaks) <= chunk


def test_without_a_gradient_the_values_stay():
    case, pairs = _case("some")
    for kind in KINDS:
        loud = _ours(case, KINDS[kind], pairs)
        with torch.no_grad():
            quiet = _ours(case, KINDS[kind], pairs)
        assert torch.equal(quiet.loss, loud.loss.detach()) and torch.equal(quiet.divergence, loud.divergence)


def test_no_tokens_give_loss_zero():
    case, pairs = _case("some", n=0)
    result = _ours(case, KINDS["jsd"], pairs)
    result.loss.backward()
    assert result.loss.item() == 0.0 and torch.equal(case.weight.grad, torch.zeros(V, D, dtype=torch.float64))


@pytest.mark.parametrize(("student", "teacher", "message"), [
    ([1, 11], [0, 1], "student token 11 of a vocabulary of 11"), ([1, 2], [0, -1], "teacher token -1 of"),
    ([1, 1], [0, 1], "student token 1 has two partners"), ([1, 2], [4, 4], "teacher token 4 has two partners"),
    ([], [], "share no token")])
def test_what_is_no_pairing_is_refused(student, teacher, message):
    case, _ = _case("some")
    pairs = Pairs(torch.tensor(student, dtype=torch.int64), torch.tensor(teacher, dtype=torch.int64))
    with pytest.raises(DataError, match=message):
        _ours(case, KINDS["reverse_kl"], pairs)


def test_two_vocabularies_without_pairs_are_refused_with_the_cure():
    case, _ = _case("some")
    with pytest.raises(ConfigError, match="11 tokens, the teacher's 9.*or give the pairs"):
        _ours(case, KINDS["reverse_kl"], None)
