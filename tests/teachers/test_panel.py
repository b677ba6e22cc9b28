"""Who is asked, in which order, and what becomes of several opinions."""

import pytest
import torch

from tests.teachers.pieces import answer, answers, logps, teacher
from tinyr2.core.packing import pack, split
from tinyr2.teachers.member import Member, Seat
from tinyr2.teachers.minds import Resident
from tinyr2.teachers.panel import Panel
from tinyr2.teachers.views import View


class Asked(Resident):
    """Keeps whom it was visited with, and how often it thought."""

    def __init__(self, seed=1):
        super().__init__(teacher(seed))
        self.visits, self.thoughts = [], 0

    def visit(self, papers):
        self.visits.append(len(papers))

    def think(self, papers, batch):
        self.thoughts += 1
        return super().think(papers, batch)


def member(name, mind=None, **seat):
    return Member(Seat(name=name, **seat), View(), mind or Asked())


def judged(members, combine="sum", progress=0.0, rollouts=None):
    rollouts = rollouts or answers()
    panel = Panel(members, combine)
    panel.prepare(rollouts, progress)
    return panel(rollouts, pack(rollouts), None)


def test_a_teacher_without_weight_is_neither_visited_nor_asked():
    minds = [Asked(), Asked(2)]
    members = [member("a", minds[0], weight=0.0), member("b", minds[1])]
    assert [o.name for o in judged(members)] == ["b"]
    assert (minds[0].visits, minds[0].thoughts) == ([], 0) and (minds[1].visits, minds[1].thoughts) == ([3], 1)


def test_a_schedule_brings_a_teacher_in_and_lets_another_go():
    members = [member("a", weight=1.0, weight_end=0.0), member("b", weight=0.0, weight_end=0.4)]
    found = {p: [(o.name, o.weight) for o in judged(members, progress=p)] for p in (0.0, 0.5, 1.0)}
    assert found == {0.0: [("a", 1.0)], 0.5: [("a", 0.5), ("b", 0.2)], 1.0: [("b", 0.4)]}


def test_each_is_visited_with_the_answers_of_its_tasks_and_speaks_of_these():
    minds = [Asked(), Asked(2), Asked(3)]
    rollouts = [answer("ab", 5, 6, task="x"), answer("dd", 7, task="y"), answer("cd", 8, 8, 8, task="x")]
    found = judged([member("x", minds[0], tasks=frozenset({"x"})), member("xy", minds[1]),
                    member("z", minds[2], tasks=frozenset({"z"}))], rollouts=rollouts)
    assert [m.visits for m in minds] == [[2], [3], [0]] and minds[2].thoughts == 0
    assert [o.name for o in found] == ["x", "xy"]
    assert found[0].whole.at.tolist() == [0, 1, 3, 4, 5] and found[1].whole.at is None and found[1].complete


def test_answers_with_other_judges_travel_in_other_micro_batches():
    panel = Panel([member("x", tasks=frozenset({"x"})), member("all"), member("xy", tasks=frozenset({"x", "y"}))])
    rollouts = [answer("ab", 5, task=t) for t in "xyzxz"]
    assert [panel.company(r) for r in rollouts] == [("x", "all", "xy"), ("all", "xy"), ("all",), ("x", "all", "xy"),
                                                    ("all",)]
    assert [[r.problem.task for r in some] for some in split(rollouts, 1000, apart=panel.company)] == [
        ["x", "x"], ["y"], ["z", "z"]]


@pytest.mark.parametrize("combine", ["average", "product"])
def test_a_blend_is_one_opinion_that_holds_each_part_by_its_weight(combine):
    (found,) = judged([member("a", weight=0.25), member("b", Asked(2), weight=0.75)], combine)
    blend = found.whole.blend
    assert found.name == "a+b" and blend.how == combine and blend.weights == (0.25, 0.75) and found.complete
    for seed, states, head in zip((1, 2), blend.hidden, blend.heads, strict=True):
        logp = torch.log_softmax(states @ head.weight.T, -1)[range(len(states)), pack(answers()).targets]
        expected = [x for r in answers() for x in logps(teacher(seed).model, r.prompt_ids, r.response_ids)]
        assert logp.tolist() == pytest.approx(expected, abs=3e-6)


def test_a_blend_of_one_is_that_one_and_counts_once():
    (found,) = judged([member("a", weight=0.5), member("b", weight=0.0)], "average")
    assert found.name == "a" and found.whole.blend is None and found.weight == 1.0
