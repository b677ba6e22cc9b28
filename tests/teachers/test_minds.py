"""Where a teacher's knowledge sits makes no difference to what it says; what a server did not say stays unsaid."""

import math
from dataclasses import replace

import pytest
import torch

from tests.teachers.pieces import logps
from tests.train.tiny import ROLLOUTS, VOCAB, qwen3
from tinyr2.core.packing import pack, split
from tinyr2.teachers.local import hire
from tinyr2.teachers.member import Member, Seat
from tinyr2.teachers.minds import Distant, Resident, Visitor
from tinyr2.teachers.views import View


def load():
    return hire(qwen3(hidden=24, seed=1), VOCAB)


@pytest.mark.parametrize("budget", [1000, 16, 9, 1])
def test_a_visitor_says_the_very_same_as_one_who_stays(budget):
    visitor, resident, counted = Visitor(load, budget), Resident(load()), 0
    visitor.visit(ROLLOUTS)
    for some in split(ROLLOUTS, budget):
        batch = pack(some)
        one, two = (mind.think(some, batch) for mind in (resident, visitor))
        assert torch.equal(one.hidden, two.hidden) and torch.equal(one.head.weight, two.head.weight)
        assert torch.equal(one.logp(batch.targets, 0.7), two.logp(batch.targets, 0.7))
        counted += len(some)
    assert counted == len(ROLLOUTS)


def test_a_visitor_is_loaded_once_a_step_and_not_at_all_without_papers():
    loads = []
    visitor = Visitor(lambda: loads.append(1) or load(), 9)
    visitor.visit([])
    assert loads == []
    visitor.visit(ROLLOUTS)
    visitor.visit(ROLLOUTS[:2])
    assert loads == [1, 1]
    with pytest.raises(KeyError):  # what it read in the step before is gone
        visitor.think(ROLLOUTS[2:3], pack(ROLLOUTS[2:3]))


def test_a_visitors_head_is_its_own_copy():
    teacher = load()
    visitor = Visitor(lambda: teacher, 1000)
    visitor.visit(ROLLOUTS)
    batch = pack(ROLLOUTS)
    before = visitor.think(ROLLOUTS, batch).logp(batch.targets, 1.0)
    with torch.no_grad():
        teacher.model.get_output_embeddings().weight.zero_()
    assert torch.equal(visitor.think(ROLLOUTS, batch).logp(batch.targets, 1.0), before)


def test_states_and_temperature_give_the_stock_log_probs():
    batch = pack(ROLLOUTS)
    found = Resident(load()).think(ROLLOUTS, batch).logp(batch.targets, 0.7)
    expected = [x for r in ROLLOUTS for x in logps(load().model, r.prompt_ids, r.response_ids, 0.7)]
    assert found.tolist() == pytest.approx(expected, abs=2e-6)


def test_a_server_is_asked_once_for_all_papers_and_says_masked_tokens_to_nobody():
    asked = []

    def ask(pairs):
        asked.append(list(pairs))
        return [[-1.0 - i - 0.1 * j for j in range(len(response))] for i, (_, response) in enumerate(pairs)]

    rollouts = [ROLLOUTS[0], replace(ROLLOUTS[2], learn_mask=(False, True, False, True, True))]
    mind = Distant(ask)
    mind.visit(rollouts)
    assert asked == [[((3, 4, 5), (6, 7, 2)), ((9,), (10, 11, 12, 13, 2))]]
    found = mind.think(rollouts[::-1], pack(rollouts[::-1]))
    assert found.hidden is None
    assert found.logp(None, 1.0).tolist() == pytest.approx([-2.1, -2.3, -2.4, -1.0, -1.1, -1.2])
    mind.visit([])
    assert len(asked) == 1


def test_what_a_server_did_not_say_is_not_a_number():
    mind = Distant(lambda pairs: [[-0.5, None, -1.5], (None,) * 2])
    mind.visit(ROLLOUTS[:2])
    found = mind.think(ROLLOUTS[:2], pack(ROLLOUTS[:2])).said.tolist()
    assert [math.isnan(x) for x in found] == [False, True, False, True, True] and found[::2][:2] == [-0.5, -1.5]


def test_an_answer_too_few_is_no_answer():
    with pytest.raises(ValueError):
        Distant(lambda pairs: [[-0.5] * 3]).visit(ROLLOUTS[:2])
    with pytest.raises(ValueError):
        Distant(lambda pairs: [[-0.5] * 2]).visit(ROLLOUTS[:1])


@pytest.mark.parametrize("budget", [1000, 9])
def test_a_member_who_visits_has_the_opinion_of_one_who_stays(budget):
    members = [Member(Seat(name="t", tasks=frozenset({"test"})), View(), mind)
               for mind in (Visitor(load, budget), Resident(load()))]
    for member in members:
        member.prepare(ROLLOUTS)
    for some in split(ROLLOUTS, budget):
        one, two = (m.opinion(some, pack(some), None, None, 1.0) for m in members)
        assert one.whole.at is None and torch.equal(one.whole.hidden, two.whole.hidden)
