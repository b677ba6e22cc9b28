"""Logits distillation on given completions: T² on the soft term, and each way of weighing the two, against loops."""

import math
from dataclasses import replace

import pytest
import torch

from tests.train.judged import member, moved, reverse, rows, same
from tests.train.tiny import ROLLOUTS, VOCAB, qwen3, qwen3_f64
from tinyr2.objectives.divergence import Divergence
from tinyr2.teachers.panel import Panel
from tinyr2.train import kd
from tinyr2.train.kd import KdConfig
from tinyr2.train.loss import count
from tinyr2.train.step import Learner, Reading, accumulate

GIVEN = [replace(r, author="dataset") for r in ROLLOUTS]


def learn(config, members, *, rollouts=GIVEN, budget=1000, progress=0.0, kind="reverse_kl", combine="sum"):
    """(scores, gradient by name) of a step on the data's completions."""
    panel, counts, model = Panel(members, combine), count(rollouts), qwen3(dtype=torch.float64)
    panel.prepare(rollouts, progress)
    learner = Learner(model=model, vocab=VOCAB, tokens_per_micro_batch=budget)
    scores = accumulate(learner, rollouts, lambda batch: kd.hard(config, batch, counts, VOCAB, progress), Reading(
        divergence=Divergence(kind=kind), judge=panel, teaching_temperature=config.temperature,
        teacher_entropy=config.by == "entropy",
        compare=lambda batch: kd.soft(config, batch, counts, VOCAB, progress)))
    return scores, {n: p.grad.clone() for n, p in model.named_parameters()}


def naive(config, weights, *, seeds=(1,), kind="reverse_kl", rollouts=GIVEN):
    """The mean over tokens of soft · T² · divergence at T + hard · −log p(y) at 1; weights(t) gives (soft, hard)."""
    student, total = qwen3_f64(), torch.zeros((), dtype=torch.float64)
    for r in rollouts:
        hard, soft = rows(student, r), rows(student, r, config.temperature)
        with torch.no_grad():
            theirs = [rows(qwen3_f64(hidden=24, seed=seed), r, config.temperature) for seed in seeds]
        for j, token in enumerate(r.response_ids):
            first = theirs[0][j]
            a, b = weights(first)
            kl = sum(reverse(soft[j], t[j]) if kind == "reverse_kl" else reverse(t[j], soft[j]) for t in theirs)
            total = total + a * config.temperature ** 2 * kl - b * hard[j, token]
    total = total / sum(len(r.response_ids) for r in rollouts)
    total.backward()
    return float(total.detach()), {n: p.grad for n, p in student.named_parameters()}


@pytest.mark.parametrize("budget", [1000, 9])
@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_fixed_weights_equal_a_loop(temperature, kind, budget):
    config = KdConfig(temperature=temperature, soft_weight=0.7, hard_weight=0.2)
    found = learn(config, [member(1)], budget=budget, kind=kind)
    same(found, naive(config, lambda t: (0.7, 0.2), kind=kind))
    assert moved(found[1]) > 1e-3


@pytest.mark.parametrize(("progress", "weights"), [(0.0, (0.9, 0.1)), (0.25, (0.7, 0.3)), (1.0, (0.1, 0.9))])
def test_linear_weights_go_to_their_ends(progress, weights):
    config = KdConfig(by="linear", soft_weight=0.9, hard_weight=0.1, soft_weight_end=0.1, hard_weight_end=0.9)
    same(learn(config, [member(1)], progress=progress, budget=14), naive(config, lambda t: weights))


@pytest.mark.parametrize("budget", [1000, 9])
def test_the_less_sure_the_teacher_the_more_the_hard_label_counts(budget):
    config = KdConfig(by="entropy", soft_weight=0.8, hard_weight=0.1, temperature=1.5)
    seen = []

    def weights(t):
        soft = 0.8 * (1 + float((t.exp() * t).sum()) / math.log(VOCAB))
        seen.append(soft)
        return soft, 0.9 - soft

    expected = naive(config, weights)
    same(learn(config, [member(1)], budget=budget), expected)
    assert 0.0 < min(seen) < max(seen) < 0.8


def test_two_teachers_are_weighted_on_the_soft_side_alone():
    config = KdConfig(soft_weight=0.7, hard_weight=0.2)
    same(learn(config, [member(1), member(2)]), naive(config, lambda t: (0.7, 0.2), seeds=(1, 2)))
