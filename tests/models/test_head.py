"""Objectives over hidden states in chunks, against the same thing written down over full logits."""

import math
from dataclasses import replace

import pytest
import torch

from tests.models.full_logits import HEADS, KINDS, Case, D, N, V, default_objective, make_case, naive, run_case
from tinyr2.core.errors import ConfigError
from tinyr2.models import sweep
from tinyr2.models.head import Head, run
from tinyr2.models.side import Reader
from tinyr2.objectives.policy import sampled_reverse_kl

CHUNKS = (1, V, 3 * V + 4, 2**23)  # less than a token, one token, three (uneven), all


def _assert_same(case, divergence, tolerance, exact, **kwargs):
    result = run_case(case, divergence, **kwargs)
    got = torch.autograd.grad(result.loss, case.learned)
    loss, logp, value, entropy, teacher_logp = naive(
        exact, divergence, extra=kwargs.get("extra"), temperature=kwargs.get("temperature", 1.0))
    expected = torch.autograd.grad(loss, exact.learned)
    pairs = [(result.loss, loss), (result.learner_logp, logp), (result.entropy, entropy)]
    pairs += zip(got, expected, strict=True)
    if divergence is not None:
        pairs += [(result.divergence, value), (result.teacher_logp, teacher_logp)]
    for a, b in pairs:
        assert a.dtype == case.hidden.dtype
        torch.testing.assert_close(a.detach().double(), b.detach(), rtol=0, atol=tolerance)


every_kind = pytest.mark.parametrize("kind", [None, *KINDS])
every_head = pytest.mark.parametrize("extra", HEADS.values(), ids=HEADS)


@every_kind
@every_head
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.3])
def test_values_and_gradients_are_those_over_full_logits_whatever_the_chunk(kind, extra, temperature):
    case = make_case()
    for chunk in CHUNKS:
        _assert_same(case, KINDS.get(kind), 1e-10, case, extra=extra, temperature=temperature, chunk_elements=chunk)


@every_kind
@every_head
def test_float32_stays_within_1e_5_of_float64(kind, extra):
    case = make_case().to(torch.float32)
    for chunk in CHUNKS:
        _assert_same(case, KINDS.get(kind), 1e-5, case.to(torch.float64), extra=extra, temperature=1.3,
                     chunk_elements=chunk)


@every_kind
@every_head
@pytest.mark.parametrize("block", [1, 3 * V, 5 * 3])
def test_blocks_of_the_vocabulary_change_nothing(kind, extra, block, monkeypatch):
    monkeypatch.setattr(sweep, "CPU_BLOCK", block)  # a row, one chunk's whole vocabulary, three rows of a chunk
    monkeypatch.setattr(sweep, "CPU_ROWS", 5)
    case, parts = make_case(), []

    def objective(scores):
        parts.append(scores.part)
        return default_objective(case, KINDS.get(kind))(scores)

    _assert_same(case, KINDS.get(kind), 1e-10, case, extra=extra, objective=objective)
    assert [(p.start, p.stop) for p in parts] == [(0, 5), (5, 7)]


@every_kind
@pytest.mark.parametrize(("dtype", "low", "tolerance"), [
    (torch.float64, -3000.0, 1e-9), (torch.float32, -100.0, 1e-4), (torch.float32, 0.0, 1e-5)])
def test_logits_far_above_those_of_the_first_block_do_not_overflow(kind, dtype, low, tolerance, monkeypatch):
    monkeypatch.setattr(sweep, "CPU_BLOCK", N)
    case = make_case().to(dtype)
    with torch.no_grad():
        case.bias[:3] += low
    seen = []
    refer = Reader.refer_to_largest
    monkeypatch.setattr(Reader, "refer_to_largest", lambda reader, blocks: seen.append(1) or refer(reader, blocks))
    _assert_same(case, KINDS.get(kind), tolerance, case.to(torch.float64))
    assert bool(seen) == (low < 0)


def test_the_objective_sees_detached_streams_and_leaves_that_take_a_gradient():
    case = make_case()

    def objective(scores):
        assert scores.learner_logp.is_leaf and scores.learner_logp.requires_grad
        assert scores.divergence.is_leaf and scores.divergence.requires_grad
        assert not scores.entropy.requires_grad and not scores.teacher_logp.requires_grad
        return scores.divergence.sum()

    result = run_case(case, KINDS["jsd"], objective=objective)
    assert result.loss.requires_grad
    for stream in (result.learner_logp, result.entropy, result.divergence, result.teacher_logp):
        assert not stream.requires_grad


@pytest.mark.parametrize("use", ["learner_logp", "divergence"])
def test_a_stream_that_the_objective_leaves_out_gets_no_gradient(use):
    case = make_case()
    weights = {"learner_logp": case.credit, "divergence": case.share}
    result = run_case(case, KINDS["reverse_kl"], objective=lambda s: (weights[use][s.part] * getattr(s, use)).sum())
    got = torch.autograd.grad(result.loss, case.learned)
    _, logp, value, _, _ = naive(case, KINDS["reverse_kl"])
    stream = {"learner_logp": logp, "divergence": value}[use]
    expected = torch.autograd.grad((weights[use] * stream).sum(), case.learned)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_an_objective_that_does_not_depend_on_the_student_gives_gradients_of_zero():
    case, rewards = make_case(), torch.tensor([0.5, 1.0])
    result = run_case(case, objective=lambda s: -rewards.max().double())
    for gradient in torch.autograd.grad(result.loss, case.learned):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_equal_to_its_teacher_has_divergence_zero_and_gradient_zero(kind):
    case = make_case()
    case = replace(case, teacher_hidden=case.hidden.detach(), teacher_weight=case.weight.detach())
    result = run(case.hidden, Head(case.weight), case.targets, lambda s: s.divergence.sum(), temperature=0.6,
                 divergence=KINDS[kind], teacher_hidden=case.teacher_hidden, teacher_head=Head(case.teacher_weight))
    assert result.divergence.abs().max().item() <= 1e-12
    for gradient in torch.autograd.grad(result.loss, (case.hidden, case.weight)):
        assert gradient.abs().max().item() <= 1e-12


@every_kind
def test_logits_of_plus_and_minus_80_stay_finite_and_right(kind):
    case = make_case(n=3)
    steep = torch.linspace(-80, 80, V, dtype=torch.float64)
    case.hidden = torch.tensor([[1.0], [-1.0], [0.5]], dtype=torch.float64)
    case.weight, case.teacher_weight = steep[:, None].clone(), steep.roll(3)[:, None].clone()
    case.bias, case.teacher_hidden = torch.zeros(V, dtype=torch.float64), case.hidden.flip(0)
    low = case.to(torch.float32)
    result = run_case(low, KINDS.get(kind))
    got = torch.autograd.grad(result.loss, low.learned)
    exact = case.to(torch.float64)
    loss, *_ = naive(exact, KINDS.get(kind))
    torch.testing.assert_close(result.loss.double(), loss, rtol=1e-5, atol=1e-5)
    for a, b in zip(got, torch.autograd.grad(loss, exact.learned), strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_the_sampled_form_needs_only_the_teachers_log_prob():
    case = make_case()
    result = run(case.hidden, Head(case.weight, case.bias), case.targets,
                 lambda s: sampled_reverse_kl(s.learner_logp, s.teacher_logp, denom=N), temperature=0.6,
                 teacher_hidden=case.teacher_hidden, teacher_head=Head(case.teacher_weight), chunk_elements=2 * V)
    got = torch.autograd.grad(result.loss, case.learned)
    _, logp, _, _, teacher_logp = naive(case, temperature=0.6)
    expected = torch.autograd.grad(-((teacher_logp - logp).detach() * logp).sum() / N, case.learned)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@every_kind
def test_no_tokens_give_loss_zero_and_gradients_of_zero(kind):
    case = make_case(n=0)
    result = run_case(case, KINDS.get(kind))
    result.loss.backward()
    assert result.loss.item() == 0.0
    for x in case.learned:
        assert torch.equal(x.grad, torch.zeros_like(x))
    assert len(result.learner_logp) == len(result.entropy) == 0


def test_what_is_done_to_the_loss_reaches_the_gradients():
    case = make_case()
    plain = torch.autograd.grad(run_case(case, KINDS["jsd"]).loss, case.learned)
    scaled = torch.autograd.grad(3 * run_case(case, KINDS["jsd"]).loss + 1, case.learned)
    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(3 * a, b, rtol=0, atol=1e-14)


def test_a_second_backward_stops_instead_of_scaling_twice():
    result = run_case(make_case())
    result.loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="backward runs once"):
        result.loss.backward()


def test_micro_batches_in_any_order_add_up_to_the_whole():
    case = make_case()
    whole = torch.autograd.grad(run_case(case, KINDS["reverse_kl"]).loss, case.learned)
    for x in case.learned:
        x.grad = None
    for rows in ([4, 5], [0], [6, 2, 3, 1]):
        part = Case(case.hidden[rows], case.weight, case.bias, case.teacher_hidden[rows], case.teacher_weight,
                    case.targets[rows], case.credit[rows], case.share[rows])
        run_case(part, KINDS["reverse_kl"]).loss.backward()
    for x, expected in zip(case.learned, whole, strict=True):
        torch.testing.assert_close(x.grad, expected, rtol=0, atol=1e-12)


def test_a_token_has_the_same_scores_alone_and_in_company():
    case = make_case()
    together = run_case(case, KINDS["jsd"], chunk_elements=3 * V)
    for i in range(N):
        alone = run(case.hidden[i:i + 1], Head(case.weight, case.bias), case.targets[i:i + 1],
                    lambda s: s.divergence.sum(), divergence=KINDS["jsd"],
                    teacher_hidden=case.teacher_hidden[i:i + 1], teacher_head=Head(case.teacher_weight))
        for name in ("learner_logp", "divergence", "entropy", "teacher_logp"):
            torch.testing.assert_close(getattr(alone, name)[0], getattr(together, name)[i], rtol=0, atol=1e-12)


def test_without_gradients_the_streams_are_the_log_softmax_and_its_entropy():
    case = make_case()
    with torch.no_grad():
        found = run(case.hidden, Head(case.weight, case.bias), case.targets, default_objective(case, None),
                    temperature=1.3)
    _, expected, _, spread, _ = naive(case, temperature=1.3)
    torch.testing.assert_close(found.learner_logp, expected.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.entropy, spread.detach(), rtol=0, atol=1e-12)
    assert not found.loss.requires_grad


def test_a_uniform_head_has_log_prob_and_entropy_of_log_v():
    found = run(torch.ones(2, 3), Head(torch.zeros(8, 3)), torch.tensor([0, 7]), lambda s: s.learner_logp.sum())
    assert found.learner_logp.tolist() == pytest.approx([-math.log(8)] * 2)
    assert found.entropy.tolist() == pytest.approx([math.log(8)] * 2)


def test_a_cropped_vocabulary_normalizes_over_the_kept_tokens_and_pads_the_gradient():
    case = make_case()
    case.targets = case.targets % 8
    weight, bias = case.weight[:8], case.bias[:8]
    teacher = {"teacher_hidden": case.teacher_hidden, "teacher_head": Head(case.teacher_weight[:8])}
    result = run(case.hidden, Head(weight, bias), case.targets, default_objective(case, KINDS["jsd"]),
                 divergence=KINDS["jsd"], chunk_elements=20, **teacher)
    got = torch.autograd.grad(result.loss, case.learned)
    small = Case(case.hidden, weight, bias, case.teacher_hidden, case.teacher_weight[:8], case.targets, case.credit,
                 case.share)
    expected = torch.autograd.grad(naive(small, KINDS["jsd"])[0], case.learned)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    assert torch.equal(got[1][8:], torch.zeros(V - 8, D, dtype=torch.float64))


def test_two_vocabularies_of_different_sizes_are_refused_with_the_cure():
    case = make_case()
    case.teacher_weight = case.teacher_weight[:9]
    with pytest.raises(ConfigError, match=r"student's head has 11 tokens, the teacher's 9.*head_of\(model, vocab="):
        run_case(case, KINDS["reverse_kl"])


def test_bfloat16_states_and_weights_are_computed_in_float32():
    low = make_case().to(torch.bfloat16)
    result = run_case(low, KINDS["reverse_kl"])
    got = torch.autograd.grad(result.loss, low.learned)
    high = low.to(torch.float32)
    expected = run_case(high, KINDS["reverse_kl"])
    torch.testing.assert_close(result.learner_logp, expected.learner_logp, rtol=0, atol=1e-6)
    for a, b in zip(got, torch.autograd.grad(expected.loss, high.learned), strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a, b.bfloat16(), rtol=0, atol=1e-2)


def test_autocast_around_the_call_does_not_lower_its_precision():
    case = make_case().to(torch.float32)
    plain = torch.autograd.grad(run_case(case, KINDS["jsd"]).loss, case.learned)
    with torch.autocast("cpu", torch.bfloat16):
        loss = run_case(case, KINDS["jsd"]).loss
    for a, b in zip(torch.autograd.grad(loss, case.learned), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_bfloat16_on_cuda_accumulates_in_float32():
    low = make_case(n=64, d=32, v=256).to(torch.bfloat16)
    cuda = Case(**{name: x.detach().cuda() for name, x in vars(low).items()}).learning()
    result = run_case(cuda, KINDS["reverse_kl"], chunk_elements=20 * 256)
    high = low.to(torch.float64)
    expected = run_case(high, KINDS["reverse_kl"])
    torch.testing.assert_close(result.learner_logp.cpu().double(), expected.learner_logp, rtol=0, atol=1e-4)
    got = torch.autograd.grad(result.loss, cuda.learned)
    for a, b in zip(got, torch.autograd.grad(expected.loss, high.learned), strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=2e-2, atol=2e-2 * b.abs().max().item())
