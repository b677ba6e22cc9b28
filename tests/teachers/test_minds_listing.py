"""A server that names its likeliest tokens: what it listed is what is compared, and what it left out is absent."""

import math
from dataclasses import replace

import pytest
import torch

from tests.train.tiny import ROLLOUTS
from tinyr2.core.packing import pack
from tinyr2.teachers.member import Member, Seat
from tinyr2.teachers.minds import Listing
from tinyr2.teachers.views import View

FULL = ((4, -0.5), (9, -1.5))


def listing(rows, **more):
    """A mind whose server says these rows of each paper."""
    mind = Listing(lambda papers: rows, **{"k": 2, "vocab": 12} | more)
    mind.visit(ROLLOUTS[:len(rows)])
    return mind, mind.think(ROLLOUTS[:len(rows)], pack(ROLLOUTS[:len(rows)]))


def test_rows_are_padded_with_absent_entries_and_tokens_without_a_row_are_left_out():
    # ROLLOUTS[0] and [1] have 3 and 2 response tokens; 12 is beyond the vocabulary
    _, found = listing([[FULL, None, ((12, -0.1), (3, -2.0))], [((12, -0.1),), ((7, -0.3),)]], tail="none")
    assert found.at.tolist() == [0, 2, 4]
    assert found.topk.ids.tolist() == [[4, 9], [3, 0], [7, 0]] and found.topk.tail == "none"
    torch.testing.assert_close(found.topk.logp, torch.tensor([[-0.5, -1.5], [-2.0, -math.inf], [-0.3, -math.inf]]))
    found.topk.check(3, 12)


def test_a_paper_without_an_answer_has_no_rows():
    _, found = listing([None, [FULL, FULL]])
    assert found.at.tolist() == [3, 4]
    _, found = listing([None, None])
    assert found.at.tolist() == [] and found.topk.ids.shape == (0, 2)


def test_tokens_that_are_not_learned_have_no_row_and_micro_batches_take_their_own():
    rollouts = [replace(ROLLOUTS[0], learn_mask=(False, True, True)), ROLLOUTS[1]]
    mind = Listing(lambda papers: [[((1, -1.0),), ((2, -1.0),), ((3, -1.0),)], [((4, -1.0),), ((5, -1.0),)]], 2, 12)
    mind.visit(rollouts)
    assert mind.think(rollouts[::-1], pack(rollouts[::-1])).topk.ids[:, 0].tolist() == [4, 5, 2, 3]
    assert mind.think(rollouts[:1], pack(rollouts[:1])).topk.ids[:, 0].tolist() == [2, 3]


def test_a_row_too_few_is_no_answer():
    with pytest.raises(ValueError):
        listing([[FULL, FULL]])


@pytest.mark.parametrize("mine, at, unknown", [
    (None, [0, 2, 4], (2.0, 5.0)), (frozenset({"other"}), [3, 5, 7], (2.0, 5.0))])
def test_a_member_with_lists_compares_where_there_is_one(mine, at, unknown):
    first = [] if mine is None else [ROLLOUTS[0]]
    told = [replace(r, problem=replace(r.problem, task="other")) for r in ROLLOUTS[:2]]
    rows = [[FULL, None, FULL], [None, FULL]]
    member = Member(Seat(name="t", tasks=mine), View(), Listing(lambda papers: rows, 2, 12))
    member.prepare([*first, *told])
    found = member.opinion([*first, *told], pack([*first, *told]), None, None, 0.5)
    assert found.whole.at.tolist() == at and found.spoken is None and not found.complete and found.weight == 0.5
    assert found.facts == {"teacher/t/unknown": unknown}


def test_lists_of_every_token_are_complete():
    rollouts = ROLLOUTS[:2]
    member = Member(Seat(name="t"), View(), Listing(lambda papers: [[FULL] * 3, [FULL] * 2], 2, 12))
    member.prepare(rollouts)
    found = member.opinion(rollouts, pack(rollouts), None, None, 1.0)
    assert found.complete and found.whole.topk.ids.tolist() == [[4, 9]] * 5
