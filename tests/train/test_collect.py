"""What is asked, kept and counted in a step, with a hand that deals and a hand that answers."""

import itertools
from dataclasses import replace

import pytest

from tests.train.tiny import rollout
from tinyr2.core.types import Message, Problem
from tinyr2.train.collect import SamplingPlan, collect, is_equal

PROBLEMS = [Problem(id=str(i), task="t", messages=(Message("user", str(i)),)) for i in range(12)]


def table(*rows):
    """A hand that answers the i-th problem with the i-th row of rewards; and one that deals them in order."""
    rewards = dict(zip((p.id for p in PROBLEMS), rows, strict=False))
    asked = []

    def deal(round_, n, before):
        assert [p.id for p in before] == [p for r in asked for p in r]
        found = PROBLEMS[len(before):len(before) + n]
        asked.append([p.id for p in found])
        return found

    def answer(round_, problems):
        return [replace(rollout((3,), (4,), group=g, sample=i, reward=None if x == "error" else x,
                                error="no" if x == "error" else None), problem=p)
                for g, p in enumerate(problems) for i, x in enumerate(rewards[p.id])]
    return deal, answer, asked


EQUAL, MIXED = (1.0, 1.0), (1.0, 0.0)


@pytest.mark.parametrize("plan, kept", [("keep", ["0", "1", "2", "3"]), ("drop", ["1", "3"])])
def test_groups_of_equal_rewards_are_kept_or_dropped_whole(plan, kept):
    deal, answer, asked = table(EQUAL, MIXED, (0.0, 0.0), MIXED)
    found = collect(SamplingPlan(equal_groups=plan), 4, deal, answer)
    assert [r.problem.id for r in found.kept[::2]] == kept
    assert [r.group for r in found.kept] == [g for g in range(len(kept)) for _ in range(2)]
    assert (len(found.written), found.rounds, found.groups, found.equal) == (8, 1, 4, 2)
    assert len(asked) == 1


def test_dropped_groups_are_replaced_until_the_batch_is_full():
    deal, answer, asked = table(MIXED, EQUAL, EQUAL, EQUAL, MIXED, EQUAL, EQUAL, MIXED, *[MIXED] * 3)
    found = collect(SamplingPlan(equal_groups="refill", max_rounds=9), 4, deal, answer)
    # of eight groups three were worth keeping, so three more are likely to hold the one that is missing
    assert asked == [["0", "1", "2", "3"], ["4", "5", "6", "7"], ["8", "9", "10"]]
    assert [r.problem.id for r in found.kept[::2]] == ["0", "4", "7", "8"]
    assert len(found.kept) == 8 and len(found.written) == 22
    assert (found.rounds, found.groups, found.equal) == (3, 11, 5)


def test_as_many_more_are_asked_as_make_up_for_those_that_will_be_dropped_and_never_more_than_a_batch():
    sizes = []

    def deal(round_, n, before):
        sizes.append(n)
        return PROBLEMS[:n]

    verdicts = itertools.cycle([MIXED, EQUAL])

    def answer(round_, problems):
        return [replace(rollout((3,), (4,), group=g, reward=x), problem=p)
                for g, p in enumerate(problems) for x in next(verdicts)]
    found = collect(SamplingPlan(equal_groups="refill"), 6, deal, answer)
    assert sizes == [6, 6]  # half were worth keeping, so twice the missing three
    assert len(found.kept) == 12 and found.groups == 12


def test_refilling_ends_after_its_rounds_with_what_there_is():
    deal, answer, asked = table(*[EQUAL] * 12)
    found = collect(SamplingPlan(equal_groups="refill", max_rounds=3), 2, deal, answer)
    assert (found.kept, found.rounds, found.groups, found.equal) == ([], 3, 6, 6)
    assert len(found.written) == 12


def test_groups_of_several_rounds_never_share_a_number():
    deal, answer, _ = table(MIXED, EQUAL, MIXED, MIXED)
    found = collect(SamplingPlan(equal_groups="refill"), 2, deal, answer)
    assert len({r.group for r in found.written}) == found.groups
    assert [(r.group, r.problem.id) for r in found.kept] == [(0, "0"), (0, "0"), (1, "2"), (1, "2")]


def test_a_group_is_judged_as_a_whole_by_equality_and_by_nothing_else():
    def group(*rewards):
        return [rollout((3,), (4,), reward=x) for x in rewards]
    assert is_equal(group(*[0.95] * 8)) and is_equal(group(*[0.5] * 8))
    assert not is_equal(group(0.0, *[0.95] * 7))
    assert not is_equal(group(0.1, 0.1 + 1e-12))
    assert is_equal(group(1.0, None, 1.0)) and not is_equal(group(1.0, None, 0.0))
    assert is_equal(group(1.0)) and is_equal(group(None, None))
    late = [*group(1.0, 1.0), replace(group(0.0)[0], error="late")]
    assert is_equal(late)


def test_one_loser_among_winners_keeps_the_winners_too():
    deal, answer, _ = table((0.0, *[0.95] * 7))
    found = collect(SamplingPlan(equal_groups="drop"), 1, deal, answer)
    assert [r.reward for r in found.kept] == [0.0, *[0.95] * 7]


def test_answers_that_failed_stay_in_their_group_and_are_counted():
    deal, answer, _ = table((1.0, "error", 0.0), ("error", "error", 1.0))
    found = collect(SamplingPlan(equal_groups="drop"), 2, deal, answer)
    assert [r.error for r in found.kept] == [None, "no", None]
    assert len(found.written) == 6 and found.equal == 1
