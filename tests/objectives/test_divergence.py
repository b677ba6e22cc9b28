"""Divergences against loops over single probabilities in float64, values and gradients."""

import math

import pytest
import torch
from pydantic import ValidationError

from tinyr2.objectives.divergence import Divergence, add_jsd, add_kl, conclude_jsd, conclude_kl, measure

SPECS = [Divergence(kind="reverse_kl"), Divergence(kind="forward_kl"),
         Divergence(kind="jsd", beta=0.5), Divergence(kind="jsd", beta=0.1), Divergence(kind="jsd", beta=0.9)]
NAMES = [f"{s.kind}-{s.beta}" for s in SPECS]
every_kind = pytest.mark.parametrize("spec", SPECS, ids=NAMES)


def _kl(p, q):
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))


def _by_definition(spec, student, teacher):
    if spec.kind == "reverse_kl":
        return _kl(student, teacher)
    if spec.kind == "forward_kl":
        return _kl(teacher, student)
    mixture = [spec.beta * t + (1 - spec.beta) * s for s, t in zip(student, teacher, strict=True)]
    return spec.beta * _kl(teacher, mixture) + (1 - spec.beta) * _kl(student, mixture)


def _softmax(logits):
    weights = [math.exp(z) for z in logits]
    return [w / sum(weights) for w in weights]


def _logps(n=4, v=6, dtype=torch.float64, spread=2.0):
    rng = torch.Generator().manual_seed(3)
    student, teacher = (spread * torch.randn(n, v, generator=rng, dtype=torch.float64) for _ in range(2))
    return student.to(dtype), student.to(dtype).log_softmax(-1), teacher.to(dtype).log_softmax(-1)


@every_kind
def test_values_are_those_of_the_definition_summed_in_a_loop(spec):
    logits, student, teacher = _logps()
    values, _ = measure(spec, student, teacher)
    expected = [_by_definition(spec, _softmax(z.tolist()), t.exp().tolist())
                for z, t in zip(logits, teacher, strict=True)]
    assert values.tolist() == pytest.approx(expected, abs=1e-12)


@every_kind
def test_gradients_are_the_central_differences_of_the_definition(spec):
    logits, student, teacher = _logps(n=2, v=4)
    _, gradients = measure(spec, student, teacher)
    step = 1e-5
    for i in range(2):
        probs = teacher[i].exp().tolist()
        for j in range(4):
            up, down = logits[i].tolist(), logits[i].tolist()
            up[j] += step
            down[j] -= step
            slope = (_by_definition(spec, _softmax(up), probs) - _by_definition(spec, _softmax(down), probs))
            assert gradients[i, j].item() == pytest.approx(slope / (2 * step), abs=1e-9)


@every_kind
def test_gradients_are_those_that_autograd_finds_through_the_softmax(spec):
    logits, _, teacher = _logps()
    logits.requires_grad_()
    student = logits.log_softmax(-1)
    s, t = student.exp(), teacher.exp()
    m = spec.beta * t + (1 - spec.beta) * s
    value = {"reverse_kl": (s * (student - teacher)).sum(), "forward_kl": (t * (teacher - student)).sum(),
             "jsd": (spec.beta * t * (teacher - m.log()) + (1 - spec.beta) * s * (student - m.log())).sum()}[spec.kind]
    value.backward()
    _, gradients = measure(spec, student.detach(), teacher)
    torch.testing.assert_close(gradients, logits.grad, rtol=0, atol=1e-12)


def test_hand_computed_numbers():
    student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert measure(Divergence(kind="reverse_kl"), student, teacher)[0].item() == pytest.approx(0.143841, abs=1e-6)
    assert measure(Divergence(kind="forward_kl"), student, teacher)[0].item() == pytest.approx(0.130812, abs=1e-6)
    assert measure(Divergence(kind="jsd"), student, teacher)[0].item() == pytest.approx(0.033822, abs=1e-6)


@every_kind
def test_a_student_equal_to_its_teacher_has_divergence_zero_and_gradient_zero(spec):
    _, student, _ = _logps()
    values, gradients = measure(spec, student, student.clone())
    assert values.abs().max().item() <= 1e-12
    assert gradients.abs().max().item() <= 1e-12


@every_kind
def test_the_gradient_of_each_token_sums_to_zero_because_logits_have_a_free_constant(spec):
    _, student, teacher = _logps()
    _, gradients = measure(spec, student, teacher)
    assert gradients.sum(-1).abs().max().item() <= 1e-12


@every_kind
def test_probabilities_that_round_to_zero_leave_everything_finite_and_right(spec):
    low, exact = _logps(dtype=torch.float32, spread=80.0)[1:], _logps(spread=80.0)[1:]
    assert (low[0].exp() == 0).any() and (low[1].exp() == 0).any()
    values, gradients = measure(spec, *low)
    expected_values, expected_gradients = measure(spec, *exact)
    torch.testing.assert_close(values.double(), expected_values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients.double(), expected_gradients, rtol=1e-4, atol=1e-4)


@every_kind
def test_the_inputs_survive(spec):
    _, student, teacher = _logps()
    kept = student.clone(), teacher.clone()
    measure(spec, student, teacher)
    assert torch.equal(student, kept[0]) and torch.equal(teacher, kept[1])


def _in_blocks(spec, student, teacher, size):
    """Divergence and gradient (n, V) from logits (V, n) in bits, `size` rows at a time."""
    blocks = list(zip(student.split(size), teacher.split(size), strict=True))
    total, teacher_total = student.exp2().sum(0), teacher.exp2().sum(0)
    if spec.kind == "jsd":
        walked = [(s - total.log2(), t - teacher_total.log2()) for s, t in blocks]
        sums = [add_jsd(spec.beta, *pair) for pair in walked]
        value, pull = conclude_jsd(spec.beta, *(sum(column) for column in zip(*sums, strict=True)))
        return value, torch.cat([pull.e * prob + pull.x * kept for prob, kept in walked]).T
    raised, kept = [s.exp2() for s, _ in blocks], [torch.empty_like(s) for s, _ in blocks]
    sums = [add_kl(spec.kind, s.clone(), t.clone(), e, x) for (s, t), e, x in zip(blocks, raised, kept, strict=True)]
    found, cross = (sum(column) for column in zip(*sums, strict=True))
    torch.testing.assert_close(found, teacher_total, rtol=1e-6, atol=0)
    value, pull = conclude_kl(spec.kind, cross, total, found)
    return value, torch.cat([pull.e * e + pull.x * x for e, x in zip(raised, kept, strict=True)]).T


@every_kind
@pytest.mark.parametrize("size", [1, 4, 6])
@pytest.mark.parametrize("shift", [0.0, -300.0, 300.0])
def test_blocks_of_shifted_logits_in_bits_give_the_same_values_and_gradients(spec, size, shift):
    _, student, teacher = _logps()
    bits = [(x / math.log(2)).T + torch.arange(4) * 7 + shift for x in (student, teacher)]
    value, gradient = _in_blocks(spec, *bits, size)
    expected = measure(spec, student, teacher)
    torch.testing.assert_close(value, expected[0], rtol=0, atol=1e-11)
    torch.testing.assert_close(gradient, expected[1], rtol=0, atol=1e-11)


@every_kind
def test_blocks_of_logits_that_round_to_zero_stay_finite_and_right(spec):
    low, exact = _logps(dtype=torch.float32, spread=80.0)[1:], _logps(spread=80.0)[1:]
    value, gradient = _in_blocks(spec, *((x / math.log(2)).T.contiguous() for x in low), 4)
    expected = measure(spec, *exact)
    torch.testing.assert_close(value.double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), expected[1], rtol=1e-4, atol=1e-4)


def test_jsd_nears_the_two_kls_at_its_ends():
    _, student, teacher = _logps()
    for beta, kind in ((1e-7, "forward_kl"), (1 - 1e-7, "reverse_kl")):
        share = min(beta, 1 - beta)
        scaled = measure(Divergence(kind="jsd", beta=beta), student, teacher)[0] / share
        torch.testing.assert_close(scaled, measure(Divergence(kind=kind), student, teacher)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bad", [{"beta": 0.0}, {"beta": 1.0}, {"kind": "kl"}, {"betta": 0.5}])
def test_a_divergence_that_does_not_exist_is_refused(bad):
    with pytest.raises(ValidationError):
        Divergence(**bad)
