"""Several teachers as one distribution, against loops over full logits that autograd differentiates."""

import math

import pytest
import torch

from tests.models.full_logits import HEADS, KINDS, D, N, V, make_case
from tests.models.test_head_cost import Spy
from tinyr2.core.errors import ConfigError
from tinyr2.models import sweep
from tinyr2.models.head import Blend, Head, run
from tinyr2.objectives.policy import weighted_nll

WEIGHTS = (1.0, 2.5, 0.5)


def _parts(count, extra=None, dtype=torch.float64):
    """States of several widths, and heads over V tokens, one with a bias."""
    rng = torch.Generator().manual_seed(7)

    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

    hidden = tuple(normal(N, 3 + i) for i in range(count))
    heads = tuple(Head(normal(V, 3 + i), normal(V) if i == 1 else None, **(extra or {})) for i in range(count))
    return hidden, heads


def _objective(case):
    def objective(scores):
        nll = weighted_nll(scores.learner_logp, case.credit[scores.part], denom=N)
        return nll if scores.divergence is None else nll + (case.share[scores.part] * scores.divergence).sum()

    return objective


def _ours(case, spec, blend, **kwargs):
    return run(case.hidden, Head(case.weight, case.bias), case.targets, _objective(case), divergence=spec,
               teacher_blend=blend, **kwargs)


def _probs(hidden, head, temperature):
    """(V,) of one token, logit by logit."""
    logits = []
    for v in range(V):
        x = head.scale * (sum(h * w for h, w in zip(hidden, head.weight[v].double(), strict=True))
                          + (0.0 if head.bias is None else head.bias[v].double()))
        logits.append(x if head.softcap is None else head.softcap * math.tanh(x / head.softcap))
    raised = [math.exp(x / temperature) for x in logits]
    return torch.tensor(raised, dtype=torch.float64) / sum(raised)


def _mixed(blend, i, temperature):
    """The blend's distribution of token i, (V,), as its definition is written."""
    shares = [w / sum(blend.weights) for w in blend.weights]
    probs = [_probs(h[i].double().tolist(), head, temperature)
             for h, head in zip(blend.hidden, blend.heads, strict=True)]
    if blend.how == "average":
        return sum(w * q for w, q in zip(shares, probs, strict=True))
    product = math.prod(q**w for w, q in zip(shares, probs, strict=True))
    return product / product.sum()


def _kl(a, b):
    return (a * (a / b).log()).sum()


def _naive(case, spec, blend, temperature=1.0):
    """Loss and streams, token by token."""
    rows = []
    for i, target in enumerate(case.targets.tolist()):
        student = ((case.weight @ case.hidden[i] + case.bias) / temperature).softmax(-1)
        teacher = _mixed(blend, i, temperature)
        m = spec.beta * teacher + (1 - spec.beta) * student
        value = {"reverse_kl": _kl(student, teacher), "forward_kl": _kl(teacher, student),
                 "jsd": spec.beta * _kl(teacher, m) + (1 - spec.beta) * _kl(student, m)}[spec.kind]
        rows.append((student[target].log(), value, teacher[target].log()))
    logp, value, teacher_logp = (torch.stack(column) for column in zip(*rows, strict=True))
    return -(case.credit * logp).sum() / N + (case.share * value).sum(), logp, value, teacher_logp


def _assert_same(case, spec, blend, exact, tolerance, *, temperature=1.0, **kwargs):
    result = _ours(case, spec, blend, temperature=temperature, **kwargs)
    loss, *streams = _naive(exact, spec, blend, temperature)
    names = ("learner_logp", "divergence", "teacher_logp")
    for a, b in [(result.loss, loss), *((getattr(result, n), s) for n, s in zip(names, streams, strict=True)),
                 *zip(torch.autograd.grad(result.loss, case.learned), torch.autograd.grad(loss, exact.learned),
                      strict=True)]:
        torch.testing.assert_close(a.detach().double(), b.detach(), rtol=0, atol=tolerance)


every_kind = pytest.mark.parametrize("kind", KINDS)
every_way = pytest.mark.parametrize("how", ["average", "product"])


@every_kind
@every_way
@pytest.mark.parametrize("extra", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_values_and_gradients_are_those_of_the_definition_whatever_the_chunk(kind, how, extra, count, monkeypatch):
    case = make_case()
    blend = Blend(*_parts(count, extra), WEIGHTS[:count], how)
    for chunk, block in ((1, 4), (3 * V + 4, 2**19), (2**23, 3 * N)):
        monkeypatch.setattr(sweep, "CPU_BLOCK", block)
        for temperature in (0.6, 1.3):
            _assert_same(case, KINDS[kind], blend, case, 1e-10, temperature=temperature, chunk_elements=chunk)


@every_kind
@every_way
def test_float32_stays_within_1e_5_of_float64(kind, how):
    case = make_case().to(torch.float32)
    blend = Blend(*_parts(3, dtype=torch.float32), WEIGHTS, how)
    _assert_same(case, KINDS[kind], blend, case.to(torch.float64), 1e-5)


@every_kind
@every_way
def test_one_part_is_that_teacher_bit_for_bit_whatever_its_weight(kind, how):
    case = make_case().to(torch.float32)
    (states,), (head,) = _parts(1, dtype=torch.float32)
    alone = run(case.hidden, Head(case.weight, case.bias), case.targets, _objective(case), divergence=KINDS[kind],
                teacher_hidden=states, teacher_head=head)
    expected = torch.autograd.grad(alone.loss, case.learned)
    for weight in (1.0, 0.3):
        blended = _ours(case, KINDS[kind], Blend((states,), (head,), (weight,), how))
        assert torch.equal(blended.divergence, alone.divergence)
        assert torch.equal(blended.teacher_logp, alone.teacher_logp)
        for a, b in zip(torch.autograd.grad(blended.loss, case.learned), expected, strict=True):
            assert torch.equal(a, b)


@every_kind
@every_way
def test_two_equal_teachers_are_one(kind, how):
    case = make_case().to(torch.float32)
    (states,), (head,) = _parts(1, dtype=torch.float32)
    alone = run(case.hidden, Head(case.weight, case.bias), case.targets, _objective(case), divergence=KINDS[kind],
                teacher_hidden=states, teacher_head=head)
    both = _ours(case, KINDS[kind], Blend((states, states), (head, head), (0.3, 0.9), how))
    torch.testing.assert_close(both.divergence, alone.divergence, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(both.teacher_logp, alone.teacher_logp, rtol=1e-6, atol=1e-6)
    expected = torch.autograd.grad(alone.loss, case.learned)
    for a, b in zip(torch.autograd.grad(both.loss, case.learned), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_an_even_chance_of_a_sure_and_of_a_clueless_teacher_by_hand():
    sure, clueless = torch.tensor([[math.log(3.0)], [0.0]]), torch.zeros(2, 1)  # 3/4 and 1/4, 1/2 and 1/2
    states = (torch.ones(1, 1), torch.ones(1, 1))
    logps = {}
    for how in ("average", "product"):
        blend = Blend(states, (Head(sure), Head(clueless)), (1.0, 1.0), how)
        result = run(torch.zeros(1, 2), Head(torch.zeros(2, 2)), torch.tensor([0]), lambda s: s.learner_logp.sum(),
                     teacher_blend=blend)
        logps[how] = result.teacher_logp.item()
    assert logps["average"] == pytest.approx(math.log(5 / 8))
    assert logps["product"] == pytest.approx(math.log(math.sqrt(3) / (math.sqrt(3) + 1)))


def _blended_and_summed(kind, how):
    """Gradients of the divergence from the blend, and the weighted sum of those from its parts."""
    case, (hidden, heads) = make_case(), _parts(3)
    blended = torch.autograd.grad(_ours(case, KINDS[kind], Blend(hidden, heads, WEIGHTS, how)).loss, case.learned)
    summed = [torch.zeros_like(x) for x in case.learned]
    for states, head, weight in zip(hidden, heads, WEIGHTS, strict=True):
        result = run(case.hidden, Head(case.weight, case.bias), case.targets, _objective(case), divergence=KINDS[kind],
                     teacher_hidden=states, teacher_head=head)
        for total, g in zip(summed, torch.autograd.grad(result.loss, case.learned), strict=True):
            total += weight / sum(WEIGHTS) * g
    return blended, summed


@pytest.mark.parametrize(("kind", "how"), [("reverse_kl", "product"), ("forward_kl", "average")])
def test_a_weighted_sum_of_kls_has_the_gradient_of_the_kl_to_the_blend(kind, how):
    for a, b in zip(*_blended_and_summed(kind, how), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("kind", "how"), [("reverse_kl", "average"), ("forward_kl", "product")])
def test_the_other_way_around_the_two_differ(kind, how):
    assert all((a - b).abs().max() > 1e-2 for a, b in zip(*_blended_and_summed(kind, how), strict=True))


@every_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_teachers_that_rule_out_what_the_others_want_stay_finite_and_right(how, dtype):
    case = make_case(n=1)
    case.targets = torch.tensor([1])
    # in float64 the tail stays exact; in float32 3,000 nats lie far below the smallest number
    heads = tuple(Head(torch.tensor(x, dtype=dtype)[:, None]) for x in ([0.0, -1000.0, -3000.0], [-3000.0, -10.0, 0.0]))
    states = (torch.ones(1, 1, dtype=dtype),) * 2
    result = run(torch.zeros(1, 1, dtype=dtype), Head(torch.zeros(3, 1, dtype=dtype)), case.targets,
                 lambda s: s.divergence.sum(), divergence=KINDS["reverse_kl"],
                 teacher_blend=Blend(states, heads, (1.0, 1.0), how))
    logp = {"average": math.log(0.5) - 10.0, "product": 0.0}[how]
    assert result.teacher_logp.item() == pytest.approx(logp, abs=1e-4)
    others = {"average": 2 * math.log(0.5), "product": -1500.0 + 505.0 - 1500.0 + 505.0}[how]
    assert result.divergence.item() == pytest.approx(-math.log(3) - (logp + others) / 3, rel=1e-4)


@every_kind
@every_way
@pytest.mark.parametrize("low", [-300.0, -1500.0])
def test_logits_far_above_those_of_the_first_block_do_not_overflow(kind, how, low, monkeypatch):
    monkeypatch.setattr(sweep, "CPU_BLOCK", N)
    case, (hidden, heads) = make_case(), _parts(2)
    with torch.no_grad():
        for bias in (heads[1].bias, case.bias):
            bias[:3] += low
    blend = Blend(hidden, heads, (1.0, 1.0), how)
    if low == -300.0:
        _assert_same(case, KINDS[kind], blend, case, 1e-9)
    else:  # beyond what the loop can raise
        result = _ours(case, KINDS[kind], blend)
        assert result.divergence.isfinite().all() and result.teacher_logp.isfinite().all()


@every_kind
@every_way
def test_no_tensor_over_the_vocabulary_is_larger_than_a_chunk(kind, how):
    vocab, chunk = 64, 1000
    case = make_case(n=200, d=4, v=vocab)
    heads = Head(case.teacher_weight), Head(case.teacher_weight.flip(0))
    with Spy(vocab, widths=(4, 6)) as spy:
        _ours(case, KINDS[kind], Blend((case.teacher_hidden,) * 2, heads, (1.0, 1.0), how),
              chunk_elements=chunk).loss.backward()
    assert chunk - vocab < spy.largest <= chunk


@every_way
def test_no_tokens_give_loss_zero(how):
    case = make_case(n=0)
    heads = Head(case.teacher_weight), Head(case.teacher_weight.flip(0))
    result = _ours(case, KINDS["jsd"], Blend((case.teacher_hidden,) * 2, heads, (1.0, 1.0), how))
    result.loss.backward()
    assert result.loss.item() == 0.0 and torch.equal(case.weight.grad, torch.zeros(V, D, dtype=torch.float64))


@pytest.mark.parametrize("weights", [(1.0, 0.0), (1.0, -2.0), (math.nan, 1.0), (math.inf, 1.0)])
def test_weights_that_are_no_positive_numbers_are_refused(weights):
    with pytest.raises(ConfigError, match="make each one positive"):
        _ours(make_case(), KINDS["jsd"], Blend(*_parts(2), weights))


def test_parts_of_different_vocabularies_are_refused():
    (a, b), (first, second) = _parts(2)
    with pytest.raises(ConfigError, match=r"teachers of \[11, 9\] tokens"):
        _ours(make_case(), KINDS["jsd"], Blend((a, b), (first, Head(second.weight[:9])), (1.0, 1.0)))
