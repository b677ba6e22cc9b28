"""What the tests of a step with teachers share: panels, gradients, and the same losses by loops over tokens."""

from dataclasses import replace

import torch

from tests.train.tiny import ROLLOUTS, VOCAB, qwen3, qwen3_f64
from tinyr2.teachers.local import hire
from tinyr2.teachers.member import Member, Seat
from tinyr2.teachers.minds import Resident
from tinyr2.teachers.panel import Panel
from tinyr2.teachers.views import View
from tinyr2.train.loss import LossConfig, count, token_distillation, token_divergence
from tinyr2.train.step import Learner, Reading, accumulate


def tasked(tasks):
    """ROLLOUTS, each of the task that it is given."""
    return [replace(r, problem=replace(r.problem, task=t)) for r, t in zip(ROLLOUTS, tasks, strict=True)]


def member(seed=1, model=None, view=None, mind=None, dtype=torch.float64, **seat):
    """A teacher who reads what the student wrote."""
    mind = mind or Resident(hire(model or qwen3(hidden=24, seed=seed, dtype=dtype), VOCAB))
    return Member(Seat(**{"name": f"t{seed}", **seat}), view or View(), mind)


def learn(members, rollouts, *, loss=None, budget=1000, combine="sum", model=None, temperature=1.0, judge=None,
          progress=0.0, dtype=torch.float64, vocab=VOCAB):
    """(scores, gradient by name) of a step of `rollouts` with these teachers."""
    loss, counts = loss or LossConfig(), count(rollouts)
    model = model or qwen3(dtype=dtype)
    panel = judge or Panel(members, combine)
    if judge is None:
        panel.prepare(rollouts, progress)
    model.zero_grad()
    apart = panel.company if judge is None and len({m.seat.tasks for m in members}) > 1 else None
    learner = Learner(model=model, vocab=vocab, tokens_per_micro_batch=budget)
    scores = accumulate(learner, rollouts, lambda batch: token_distillation(loss, batch, counts), Reading(
        temperature=temperature, divergence=loss.divergence if loss.estimator == "full" else None, judge=panel,
        compare=lambda batch: token_divergence(counts), apart=apart))
    return scores, {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def rows(model, rollout, temperature=1.0):
    """(n, V) log-probs that predict each response token, from a stock forward of one row."""
    logits = model(torch.tensor([[*rollout.prompt_ids, *rollout.response_ids]])).logits[0] / temperature
    return torch.log_softmax(logits, -1)[len(rollout.prompt_ids) - 1:-1]


def naive(rollouts, term, seeds=(1, 2)):
    """(loss, gradient by name): the mean over learned tokens of term(rollout, j, s, (t, …)), in float64, by loops.

    s, t (V,): the log-probs of the student and of the teachers made from `seeds`
    """
    student, teachers = qwen3_f64(), [qwen3_f64(hidden=24, seed=seed) for seed in seeds]
    total = torch.zeros((), dtype=torch.float64)
    for r in rollouts:
        mine = rows(student, r)
        with torch.no_grad():
            theirs = [rows(t, r) for t in teachers]
        for j in range(len(r.response_ids)):
            total = total + term(r, j, mine[j], [t[j] for t in theirs])
    total = total / sum(len(r.response_ids) for r in rollouts)
    total.backward()
    return float(total.detach()), {n: p.grad for n, p in student.named_parameters()}


def reverse(s, t):
    """KL(p‖q) of two rows of log-probs."""
    return (s.exp() * (s - t)).sum()


def same(found, expected, atol=1e-9):
    """Whether two steps, (scores or loss, gradients), are the same."""
    (one, first), (two, second) = found, expected
    values = [getattr(x, "loss", x) for x in (one, two)]
    assert abs(values[0] - values[1]) <= atol, values
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=atol)


def moved(gradients):
    """The largest part of a gradient."""
    return max(float(g.abs().max()) for g in gradients.values())
