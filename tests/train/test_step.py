import dataclasses
import random

import pytest
import torch

from tests.train.tiny import ROLLOUTS, VOCAB, qwen3, rollout
from tinyr2.objectives.divergence import Divergence
from tinyr2.teachers.local import hire
from tinyr2.train.loss import LossConfig, count, likelihood, sequence_distillation, token_distillation
from tinyr2.train.step import Learner, accumulate

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
    objective = {"nll": lambda b: likelihood(counts)}.get(kind, lambda b: token_distillation(loss, counts))
    if loss.level == "sequence":
        def objective(batch):
            return sequence_distillation(loss, batch, counts, 0.5)
    model.zero_grad()
    learner = Learner(model=model, vocab=VOCAB, tokens_per_micro_batch=budget)
    scores = accumulate(learner, rollouts, objective, temperature=temperature,
                        divergence=loss.divergence if kind not in ("nll", "sampled") else None,
                        teacher=None if kind == "nll" else teacher)
    return scores, {n: p.grad.clone() for n, p in model.named_parameters()}


def reference(kind, rollouts, temperature=1.0):
    """The same losses by loops over rows and tokens, on full float64 logits, with autograd."""
    model, teacher = qwen3(dtype=torch.float64), qwen3(hidden=24, seed=1, dtype=torch.float64)
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
    model = qwen3(dtype=torch.float64)
    expected = []
    for r in scores.rollouts:
        logp = torch.log_softmax(model(torch.tensor([[*r.prompt_ids, *r.response_ids]])).logits[0], -1)
        n = len(r.prompt_ids)
        expected += [float(logp[n + j - 1, t].detach()) for j, t in enumerate(r.response_ids)]
    assert scores.learner_logp.tolist() == pytest.approx(expected, abs=1e-12)
    assert [len(scores.rollouts[i].response_ids) for i in range(5)] == torch.bincount(scores.row).tolist()
