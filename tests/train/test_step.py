import dataclasses
import math
import random

import pytest
import torch

from tests.train.tiny import ROLLOUTS, VOCAB, qwen3, qwen3_f64, rollout
from tinyr2.objectives.divergence import Divergence
from tinyr2.teachers.local import hire, judge_of
from tinyr2.train import step
from tinyr2.train.loss import LossConfig, count, importance, likelihood, sequence_distillation, token_distillation
from tinyr2.train.step import Learner, Reading, accumulate

KINDS = ["nll", "reverse_kl", "forward_kl", "jsd", "sampled", "reinforce", "weighted_nll"]


def gradient(kind, rollouts, budget=1000, model=None, teacher=None, temperature=1.0, whole=None):
    """(loss, gradient by name) of `rollouts` as a share of the step `whole`."""
    model = model or qwen3(dtype=torch.float64)
    teacher = hire(teacher or qwen3(hidden=24, seed=1, dtype=torch.float64), VOCAB)
    counts = count(whole or rollouts)
    loss = LossConfig()
    if kind in ("forward_kl", "jsd"):
        loss = LossConfig(divergence=Divergence(kind=kind, beta=0.3))
    if kind == "sampled":
        loss = LossConfig(estimator="sampled")
    if kind in ("reinforce", "weighted_nll"):
        loss = LossConfig(level="sequence", reward_loss=kind)
    objective = {"nll": lambda b: likelihood(counts)}.get(kind, lambda b: token_distillation(loss, b, counts))
    if loss.level == "sequence":
        def objective(batch):
            return sequence_distillation(loss, batch, counts, 0.5)
    model.zero_grad()
    learner = Learner(model=model, vocab=VOCAB, tokens_per_micro_batch=budget)
    scores = accumulate(learner, rollouts, objective, Reading(
        temperature=temperature, divergence=loss.divergence if kind not in ("nll", "sampled") else None,
        judge=None if kind == "nll" else judge_of(teacher)))
    return scores, {n: p.grad.clone() for n, p in model.named_parameters()}


def reference(kind, rollouts, temperature=1.0):
    """The same losses by loops over rows and tokens, on full float64 logits, with autograd."""
    model, teacher = qwen3_f64(), qwen3_f64(hidden=24, seed=1)
    tokens = sum(len(r.response_ids) for r in rollouts)
    own = sum(r.author == "student" for r in rollouts)
    total = torch.zeros((), dtype=torch.float64)
    for r in rollouts:
        ids = torch.tensor([[*r.prompt_ids, *r.response_ids]])
        student = torch.log_softmax(model(ids).logits[0] / temperature, -1)
        with torch.no_grad():
            wise = torch.log_softmax(teacher(ids).logits[0] / temperature, -1)
        for j, token in enumerate(r.response_ids):
            at = len(r.prompt_ids) + j - 1
            s, t = student[at], wise[at]
            reverse, forward = (s.exp() * (s - t)).sum(), (t.exp() * (t - s)).sum()
            mix = (0.3 * t.exp() + 0.7 * s.exp()).log()
            jsd = 0.3 * (t.exp() * (t - mix)).sum() + 0.7 * (s.exp() * (s - mix)).sum()
            mine = reverse / own if r.author == "student" else 0.0
            total = total + {
                "nll": -s[token] / tokens, "reverse_kl": reverse / tokens, "forward_kl": forward / tokens,
                "jsd": jsd / tokens, "sampled": -(t - s)[token].detach() * s[token] / tokens,
                "reinforce": 0.125 * mine - 0.8 * r.advantage * s[token] / len(rollouts),
                "weighted_nll": 0.125 * mine - 0.8 * r.reward * s[token] / len(rollouts)}[kind]
    total.backward()
    return float(total.detach()), {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_loss_and_gradient_equal_a_loop_over_tokens(kind, temperature):
    scores, found = gradient(kind, ROLLOUTS, temperature=temperature)
    loss, expected = reference(kind, ROLLOUTS, temperature)
    assert scores.loss == pytest.approx(loss, abs=1e-10)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_in_any_order_add_up_to_the_same_gradient(kind):
    whole, expected = gradient(kind, ROLLOUTS)
    shuffled = ROLLOUTS[:]
    random.Random(3).shuffle(shuffled)
    for budget in (1, 9, 14):
        scores, found = gradient(kind, shuffled, budget)
        assert scores.loss == pytest.approx(whole.loss, abs=1e-12)
        for name, grad in expected.items():
            torch.testing.assert_close(found[name], grad, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd", "sampled"])
def test_a_teacher_equal_to_the_student_gives_no_loss_and_no_gradient(kind):
    scores, found = gradient(kind, ROLLOUTS, model=qwen3(dtype=torch.float64), teacher=qwen3(dtype=torch.float64))
    assert abs(scores.loss) < 1e-14
    assert max(float(g.abs().max()) for g in found.values()) < 1e-14


def test_changing_a_masked_token_after_the_learned_ones_changes_nothing():
    masked = [rollout((3, 4), (5, 6, 7), learn_mask=(True, True, False))]
    other = [rollout((3, 4), (5, 6, 19), learn_mask=(True, True, False))]
    (one, first), (two, second) = gradient("reverse_kl", masked), gradient("reverse_kl", other)
    assert one.loss == two.loss
    for name in first:
        assert torch.equal(first[name], second[name])


def test_a_rollout_without_a_verdict_keeps_its_divergence_and_has_no_reward_gradient():
    blank = [dataclasses.replace(r, advantage=None, reward=None) for r in ROLLOUTS[:2]]
    known = [dataclasses.replace(r, advantage=0.0, reward=0.0) for r in ROLLOUTS[:2]]
    _, first = gradient("reinforce", [blank[0], known[1]])
    _, second = gradient("reinforce", known)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=1e-15)
    assert max(float(g.abs().max()) for g in first.values()) > 0


def test_scores_come_back_in_the_order_of_their_rollouts():
    scores, _ = gradient("sampled", ROLLOUTS, budget=9)
    model = qwen3_f64()
    expected = []
    for r in scores.rollouts:
        logp = torch.log_softmax(model(torch.tensor([[*r.prompt_ids, *r.response_ids]])).logits[0], -1)
        n = len(r.prompt_ids)
        expected += [float(logp[n + j - 1, t].detach()) for j, t in enumerate(r.response_ids)]
    assert scores.learner_logp.tolist() == pytest.approx(expected, abs=1e-12)
    assert [len(scores.rollouts[i].response_ids) for i in range(5)] == torch.bincount(scores.row).tolist()


@pytest.mark.parametrize("budget", [1000, 9])
@pytest.mark.parametrize("estimator", ["full", "sampled"])
def test_tokens_of_another_precision_are_weighted_one_by_one_however_they_are_packed(estimator, budget):
    rollouts = [dataclasses.replace(r, actor_logp=tuple(-3.0 - 0.9 * math.sin(7 * i + j) for j in
                range(len(r.response_ids)))) if r.author == "student" else r for i, r in enumerate(ROLLOUTS)]
    model, teacher, counts = qwen3(dtype=torch.float64), qwen3(24, seed=1, dtype=torch.float64), count(rollouts)
    loss = LossConfig(estimator=estimator)
    learner = Learner(model=model, vocab=VOCAB, tokens_per_micro_batch=budget)
    scores = accumulate(learner, rollouts,
                        lambda batch: token_distillation(loss, batch, counts, importance(batch, 1.5)),
                        Reading(divergence=loss.divergence if estimator == "full" else None,
                                judge=judge_of(hire(teacher, VOCAB))))
    total, seen = 0.0, []
    for r in rollouts:
        ids = torch.tensor([[*r.prompt_ids, *r.response_ids]])
        with torch.no_grad():
            logs = [torch.log_softmax(m(ids).logits[0], -1) for m in (qwen3_f64(), qwen3_f64(hidden=24, seed=1))]
        for j, token in enumerate(r.response_ids):
            s, t = (x[len(r.prompt_ids) + j - 1] for x in logs)
            weight = 1.0
            if r.actor_logp is not None:
                weight = min(math.exp(float(s[token]) - r.actor_logp[j]), 1.5)
                seen.append(weight)
            term = (s.exp() * (s - t)).sum() if estimator == "full" else -(t - s)[token] * s[token]
            total += weight * float(term) / counts.tokens
    assert min(seen) < 0.9 and max(seen) == 1.5
    assert scores.loss == pytest.approx(total, abs=1e-8)  # actor_logp is held in float32


@pytest.mark.parametrize("budget", [1000, 9])
def test_gradient_checkpointing_leaves_the_same_gradients(budget):
    counts, found = count(ROLLOUTS), []
    for recompute in (False, True):
        model = qwen3()
        learner = Learner(model=model, vocab=VOCAB, tokens_per_micro_batch=budget, gradient_checkpointing=recompute)
        scores = accumulate(learner, ROLLOUTS, lambda _, counts=counts: likelihood(counts))
        found.append((scores.loss, [p.grad for p in model.parameters()]))
    assert found[0][0] == found[1][0]
    for one, two in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-7)


def test_gradient_checkpointing_is_what_the_learner_asks_of_the_forward(monkeypatch):
    asked, forward = [], step.hidden_states
    monkeypatch.setattr(step, "hidden_states", lambda *a, **k: asked.append(k) or forward(*a, **k))
    counts = count(ROLLOUTS)
    for recompute in (False, True):
        learner = Learner(model=qwen3(), vocab=VOCAB, tokens_per_micro_batch=1000, gradient_checkpointing=recompute)
        accumulate(learner, ROLLOUTS, lambda _: likelihood(counts))
    assert asked == [{"gradient_checkpointing": False}, {"gradient_checkpointing": True}]


def bfloat16_learner(model) -> Learner:
    return Learner(model=model, vocab=VOCAB, tokens_per_micro_batch=1000,
                   autocast=lambda: torch.autocast("cpu", torch.bfloat16))


def test_products_in_bfloat16_leave_float32_log_probs_and_float32_gradients_near_the_exact_ones():
    counts, results = count(ROLLOUTS), []
    for learner in (Learner(model=qwen3(), vocab=VOCAB, tokens_per_micro_batch=1000), bfloat16_learner(qwen3())):
        scores = accumulate(learner, ROLLOUTS, lambda _: likelihood(counts))
        assert scores.learner_logp.dtype == scores.entropy.dtype == torch.float32
        assert {p.grad.dtype for p in learner.model.parameters()} == {torch.float32}
        results.append((scores.learner_logp, torch.cat([p.grad.flatten() for p in learner.model.parameters()])))
    (exact, gradient), (rounded, other) = results
    assert 0 < float((exact - rounded).abs().max()) < 0.02
    assert float(torch.cosine_similarity(gradient, other, dim=0)) > 0.999
    # float32 values that bfloat16 could not hold: the head did not round them
    assert not torch.equal(rounded, rounded.bfloat16().float())


def test_a_learners_dtype_is_that_of_its_products():
    plain = Learner(model=qwen3(), vocab=VOCAB, tokens_per_micro_batch=1)
    assert (plain.dtype, bfloat16_learner(qwen3()).dtype) == (torch.float32, torch.bfloat16)
    assert dataclasses.replace(plain, model=qwen3(dtype=torch.bfloat16)).dtype == torch.bfloat16
