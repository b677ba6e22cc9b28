"""A step with several teachers: what their opinions add up to, against loops over tokens in float64."""

from functools import partial

import pytest
import torch

from tests.train.judged import learn, member, moved, naive, reverse, same, tasked
from tests.train.tiny import ROLLOUTS, VOCAB, qwen3
from tinyr2.objectives.divergence import Divergence
from tinyr2.teachers.local import hire, judge_of
from tinyr2.teachers.minds import Visitor
from tinyr2.train.loss import LossConfig
from tinyr2.train.metrics import score_metrics, teacher_metrics

SAMPLED = LossConfig(estimator="sampled")


def weighted(a, b):
    """The term of two teachers whose reverse KLs count a and b."""
    return lambda r, j, s, t: a * reverse(s, t[0]) + b * reverse(s, t[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", [LossConfig(), SAMPLED, LossConfig(divergence=Divergence(kind="jsd", beta=0.3))])
def test_a_panel_of_one_is_the_single_teacher_to_the_bit(loss, dtype):
    alone = learn([], ROLLOUTS, loss=loss, budget=16, dtype=dtype,
                  judge=judge_of(hire(qwen3(hidden=24, seed=1, dtype=dtype), VOCAB)))
    same(learn([member(dtype=dtype)], ROLLOUTS, loss=loss, budget=16, dtype=dtype), alone, atol=0.0)


def test_two_equal_teachers_of_half_the_weight_are_one():
    one = learn([member()], ROLLOUTS)
    same(learn([member(name="a", weight=0.5), member(name="b", weight=0.5)], ROLLOUTS), one, atol=1e-14)
    same(learn([member(name="a", weight=0.5), member(name="b", weight=0.5)], ROLLOUTS, combine="average"), one, 1e-9)
    same(learn([member(name="a", weight=0.5), member(name="b", weight=0.5)], ROLLOUTS, combine="product"), one, 1e-9)


@pytest.mark.parametrize("combine", ["sum", "average", "product"])
def test_weights_of_one_and_nothing_are_the_first_teacher_to_the_bit(combine):
    both = [member(1, dtype=torch.float32), member(2, weight=0.0, dtype=torch.float32)]
    one = learn([member(1, dtype=torch.float32)], ROLLOUTS, dtype=torch.float32)
    same(learn(both, ROLLOUTS, combine=combine, dtype=torch.float32), one, atol=0.0)


@pytest.mark.parametrize("weights", [(0.7, 1.6), (1.0, 1.0)])
def test_the_weighted_sum_of_reverse_kls_equals_a_loop(weights):
    members = [member(seed, weight=w) for seed, w in zip((1, 2), weights, strict=True)]
    same(learn(members, ROLLOUTS), naive(ROLLOUTS, weighted(*weights)))


@pytest.mark.parametrize("combine", ["average", "product"])
def test_blends_of_distributions_equal_a_loop(combine):
    def term(r, j, s, t):
        if combine == "average":
            return reverse(s, (0.25 * t[0].exp() + 0.75 * t[1].exp()).log())
        return reverse(s, torch.log_softmax(0.25 * t[0] + 0.75 * t[1], -1))

    found = learn([member(1, weight=0.25), member(2, weight=0.75)], ROLLOUTS, combine=combine)
    same(found, naive(ROLLOUTS, term))
    assert moved(found[1]) > 1e-4


def test_weights_follow_their_schedules():
    members = [member(1, weight=1.0, weight_end=0.2), member(2, weight=0.0, weight_end=0.8)]
    same(learn(members, ROLLOUTS, progress=0.25), naive(ROLLOUTS, weighted(0.8, 0.2)))
    same(learn(members, ROLLOUTS, progress=1.0), naive(ROLLOUTS, weighted(0.2, 0.8)))


TASKS = ("sums", "sums", "sorting", "else", "sums")


def routed(**more):
    return [member(1, weight=0.6, tasks=frozenset({"sums"}), **more),
            member(2, tasks=frozenset({"sorting", "sums"}), **more)]


@pytest.mark.parametrize("budget", [1000, 9])
@pytest.mark.parametrize("loss", [LossConfig(), SAMPLED])
def test_each_answer_is_judged_by_the_teachers_of_its_task(loss, budget):
    full = loss.estimator == "full"

    def term(r, j, s, t):
        weights = {"sums": (0.6, 1.0), "sorting": (0.0, 1.0), "else": (0.0, 0.0)}[r.problem.task]
        token = r.response_ids[j]
        return sum(w * (reverse(s, q) if full else (s[token] - q[token]).detach() * s[token])
                   for w, q in zip(weights, t, strict=True)) * (full or r.author == "student")

    found = learn(routed(speaks=not full), tasked(TASKS), loss=loss, budget=budget)
    # teachers that speak are heard in float32
    same(found, naive(tasked(TASKS), term), atol=1e-9 if full else 1e-8)


@pytest.mark.parametrize("budget", [1, 9, 14])
def test_however_the_step_is_split_the_gradient_is_the_same(budget):
    for make in (lambda: [member(1, weight=0.3), member(2)], routed,
                 lambda: [member(1, mind=Visitor(partial(hire, qwen3(24, 1, torch.float64), VOCAB), budget))]):
        whole = learn(make(), tasked(TASKS))
        same(learn(make(), tasked(TASKS), budget=budget), whole, atol=1e-12)


def test_metrics_tell_the_teachers_apart():
    scores, _ = learn(routed(), tasked(TASKS))
    # of 15 tokens the first teacher judges 9, the second 14
    assert {n: c for n, (_, c) in scores.facts.items()} == {"teacher/t1/kl": 9, "teacher/t2/kl": 14}
    sums = {n: 0.0 for n in scores.facts}

    def term(r, j, s, t):
        if r.problem.task == "sums":
            sums["teacher/t1/kl"] += float(reverse(s.detach(), t[0]))
        if r.problem.task != "else":
            sums["teacher/t2/kl"] += float(reverse(s.detach(), t[1]))
        return 0.0 * s.sum()

    naive(tasked(TASKS), term)
    assert {n: x for n, (x, _) in scores.facts.items()} == pytest.approx(sums, abs=1e-9)
    assert teacher_metrics(scores) == pytest.approx({n: x / scores.facts[n][1] for n, x in sums.items()})


def test_no_teacher_is_lost_whatever_it_is_called():
    names = ("teacher_model", "teacher", "default")
    called = [member(seed, weight=w, name=n) for seed, w, n in zip((1, 2, 3), (0.3, 0.7, 1.1), names, strict=True)]
    numbered = [member(seed, weight=w) for seed, w in zip((1, 2, 3), (0.3, 0.7, 1.1), strict=True)]
    found, expected = learn(called, ROLLOUTS), learn(numbered, ROLLOUTS)
    same(found, expected, atol=0.0)
    assert [*teacher_metrics(found[0])] == [f"teacher/{name}/kl" for name in names]
    assert [*teacher_metrics(found[0]).values()] == [*teacher_metrics(expected[0]).values()]


def test_the_kl_is_known_where_some_answers_have_no_teacher():
    scores, _ = learn(routed(), tasked(TASKS))
    assert score_metrics(scores)["kl"] == pytest.approx(scores.loss, rel=1e-9)


def test_the_kl_is_known_where_one_task_has_a_teacher_of_distributions_and_another_one_that_speaks():
    members = [member(1, tasks=frozenset({"sums"})), member(2, tasks=frozenset({"sorting"}), speaks=True)]
    scores, _ = learn(members, tasked(("sums", "sums", "sorting", "sorting", "sums")))
    assert "kl" in score_metrics(scores)


def test_a_blend_does_not_jump_when_the_weight_of_one_goes_to_nothing():
    losses = [learn([member(1, weight=0.3), member(2, weight=w)], ROLLOUTS, combine="average")[0].loss
              for w in (1e-9, 0.0)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
