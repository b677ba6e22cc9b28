"""What one teacher tells the student of a packed micro-batch, against spans written by hand and stock forwards."""

import math
from dataclasses import replace

import pytest
import torch

from tests.teachers.pieces import (
    AB,
    CD,
    END,
    A,
    B,
    C,
    D,
    across,
    aid,
    answer,
    answers,
    logps,
    student_tokenizer,
    teacher,
)
from tests.tokens.makers import byte_level, sentencepiece
from tests.train.tiny import VOCAB, qwen3
from tinyr2.core.packing import pack
from tinyr2.core.types import Message, Problem, Rollout
from tinyr2.models.head import Head, head_of
from tinyr2.models.pairs import Pairs
from tinyr2.objectives.spans import span_gap
from tinyr2.teachers.member import Member, Seat
from tinyr2.teachers.minds import Distant, Resident, Thoughts
from tinyr2.teachers.views import View
from tinyr2.tokens.build import train_tokenizer
from tinyr2.tokens.chat import render_example, render_prompt
from tinyr2.tokens.translate import Translator

# the teacher's papers of `answers`, written by hand: prompt, then its response tokens
PAPERS = [((5, 6, 2, 3), (10, 8, 2)), ((8, 8, 2, 3), (10, 8, 2)), ((10, 8, 2, 3), (8, 5, 6))]


def opinion(rollouts, *, view=None, mind=None, student=None, threshold=0.1, told=None, **seat):
    """What a member with this seat says of one micro-batch of `told`, of a step of `rollouts`."""
    member = Member(Seat(**{"name": "t", **seat}), view or across(), mind or Resident(teacher()),
                    aid(seat.get("signal"), threshold=threshold))
    member.prepare(rollouts)
    told = rollouts if told is None else told
    return member.opinion(told, pack(told), *(student or (None, None)), 1.0)


def said(found):
    """(the spans, the log-probs) as lists."""
    return found.spoken.span.tolist(), found.spoken.logp.tolist()


def own(temperature=1.0):
    """(3 papers × 3) the teacher's log-probs of its own tokens."""
    return [logps(teacher().model, *paper, temperature) for paper in PAPERS]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunk_gives_each_span_the_sum_of_the_teachers_tokens(temperature):
    (a, b, c), (d, e, f), (g, h, i) = own(temperature)
    span, logp = said(opinion(answers(), temperature=temperature))
    assert span == [0, 0, 1, 2, 3, 3, 3, 4, 5, 6]
    assert logp == pytest.approx([a, b, c, d + e, f, g, h + i], abs=3e-6)


def test_exact_speaks_of_tokens_that_are_cut_alike_and_of_no_other():
    span, logp = said(opinion(answers(), signal="exact"))
    (_, b, c), (_, _, f), (g, _, _) = own()
    assert span == [-1, -1, 1, 2, -1, -1, -1, 4, 5, -1]
    assert [logp[s] for s in span if s >= 0] == pytest.approx([b, c, f, g], abs=3e-6)


def test_mapped_compares_whole_distributions_one_to_one_and_speaks_of_the_rest():
    found = opinion(answers(), signal="mapped")
    (a, _, _), (d, e, _), (_, h, i) = own()
    assert found.whole.at.tolist() == [2, 3, 7, 8]
    assert found.spoken.span.tolist() == [0, 0, -1, -1, 3, 3, 3, -1, -1, 6]
    assert [found.spoken.logp[s] for s in (0, 3, 6)] == pytest.approx([a, d + e, h + i], abs=3e-6)
    states = []  # the states that predict d and end, end, d on the papers
    for (prompt, response), wanted in zip(PAPERS, ([1, 2], [2], [0]), strict=True):
        with torch.no_grad():
            rows = teacher().model.model(torch.tensor([[*prompt, *response]])).last_hidden_state[0]
        states += [rows[len(prompt) - 1 + j] for j in wanted]
    torch.testing.assert_close(found.whole.hidden, torch.stack(states), rtol=0, atol=3e-6)
    pairs = dict(zip(found.whole.pairs.student.tolist(), found.whole.pairs.teacher.tolist(), strict=True))
    assert {A: 5, B: 6, C: 7, D: 8, END: 2}.items() <= pairs.items() and AB not in pairs and CD not in pairs


def extended(model, prompt, response, at, longer):
    """The probability of the tokens in `longer` where response[at] was written."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response]])).logits[0].double()
    return float(logits.softmax(-1)[len(prompt) - 1 + at, longer].sum())


def debiased(threshold, rollouts):
    model = qwen3()
    batch = pack(rollouts)
    with torch.no_grad():
        states = torch.cat([model.model(torch.tensor([[*r.prompt_ids, *r.response_ids]])).last_hidden_state[0][
            len(r.prompt_ids) - 1:-1] for r in rollouts])
    assert len(states) == len(batch.learn)
    return opinion(rollouts, signal="chunk_debiased", threshold=threshold,
                   student=(states, head_of(model, VOCAB)))


def test_debiased_chunks_close_where_little_probability_is_ruled_out():
    # a|b|end against a|b|end, where the student could have gone on with ab, and the teacher with abc from a
    rollouts = [answer("ab", A, B, END)]
    prompt = rollouts[0].prompt_ids
    ours = extended(qwen3(), prompt, (A, B, END), 0, [AB])
    reads = opinion(rollouts)
    assert reads.spoken.span.tolist() == [0, 1, 2]
    theirs = extended(teacher().model, PAPERS[0][0], (5, 6, 2), 0, [10])
    most = max(ours, theirs, extended(teacher().model, PAPERS[0][0], (5, 6, 2), 1, [9]))
    x, y, z = logps(teacher().model, PAPERS[0][0], (5, 6, 2))
    span, logp = said(debiased(most * 1.001, rollouts))
    assert span == [0, 1, 2] and logp == pytest.approx([x, y, z], abs=3e-6)
    span, logp = said(debiased(max(ours, theirs) * 0.999, rollouts))  # a no longer closes; the text ends after b
    assert span == [0, 0, 1] and logp == pytest.approx([x + y, z], abs=3e-6)


def test_debiased_chunks_never_join_an_end_of_turn_or_two_answers():
    span, logp = said(debiased(0.0, answers()))
    (a, b, c), (d, e, f), (g, h, i) = own()
    assert span[:8] == [0, 0, 0, 1, 2, 2, 2, 3]
    # d in "dab" can be followed by nothing that begins with d among the teacher's pieces, nor among the student's
    assert span[8:] == [4, 5] and logp == pytest.approx([a + b, c, d + e, f, g, h + i], abs=3e-6)


@pytest.mark.parametrize("signal", ["exact", "chunk", "mapped"])
def test_a_span_with_a_token_that_is_not_learned_is_left_out(signal):
    masked = [replace(answers()[0], learn_mask=(True, False, True, True)),
              replace(answers()[1], learn_mask=(False, False, True, True))]
    found = opinion(masked, signal=signal)
    named = found.spoken.span.tolist()
    if found.whole is not None:
        named = [99 if i in found.whole.at.tolist() else s for i, s in enumerate(named)]
    # learned: ab (its span lost c) d end | cd (its span lost a and b) end
    assert [s >= 0 for s in named] == [False, True, True, False, True]
    (_, b, c), (_, _, f), _ = own()
    if signal != "mapped":
        assert [found.spoken.logp[s] for s in named if s >= 0] == pytest.approx([b, c, f], abs=3e-6)


@pytest.mark.parametrize("signal", ["exact", "chunk", "mapped"])
def test_rollouts_without_a_paper_leave_their_tokens_unspoken(signal):
    rollouts = [answer("abcdabcdabcd", C, D), *answers(), answer("dcba", A, task="other")]
    found = opinion(rollouts, view=across(context=7), signal=signal, tasks=frozenset({"letters"}))
    expected = opinion(answers(), signal=signal)
    assert found.spoken.span.tolist() == [-1, -1, *expected.spoken.span.tolist(), -1]
    torch.testing.assert_close(found.spoken.logp, expected.spoken.logp, rtol=0, atol=1e-6)
    if signal == "mapped":
        assert found.whole.at.tolist() == [i + 2 for i in expected.whole.at.tolist()]


@pytest.mark.parametrize("view", [View(), across()])
def test_of_answers_that_are_not_its_business_it_says_nothing(view):
    assert opinion(answers(), view=view, tasks=frozenset({"other"})) is None
    assert opinion(answers(), view=across(context=3)) is None


def test_tokens_that_the_teacher_can_never_say_have_the_same_log_prob_each():
    # <s> stands for no text, and for nothing that the teacher has
    silent = [answer("ab", 1, 1), answer("dd", 1)]
    for signal in ("chunk", "mapped"):
        span, logp = said(opinion(silent, signal=signal, never=-9.0))
        assert [logp[k] for k in span] == [-9.0] * 3 and len(set(span)) == 3
    found = opinion(silent, signal="exact")  # to which all that is not cut alike is 0
    assert found.spoken.span.tolist() == [-1, -1, -1]
    assert found.facts["teacher/t/kept"] == (0.0, 3.0) and found.facts["teacher/t/unpaired"] == (3.0, 2.0)
    assert opinion([*silent, answer("abcdabcdabcd", 1)], view=across(context=6)).spoken.span.tolist()[-1] == -1


def test_a_thought_that_the_teachers_prompt_has_opened_already_is_no_fault_of_the_students():
    ours, theirs = (train_tokenizer(["the cat sat on the mat"] * 3, vocab_size=n) for n in (300, 290))
    for tokenizer in (ours, theirs):
        tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    theirs.chat_template = ("{% for m in messages %}{{ m['content'] + '<|end|>' }}{% endfor %}"
                            "{% if add_generation_prompt %}{{ '<|assistant|><think>' }}{% endif %}")
    messages = (Message("user", "the cat"),)
    rollout = Rollout(problem=Problem(id="0", task="t", messages=messages), group=0, sample=0, author="student",
                      prompt_ids=tuple(render_prompt(ours, messages)), finish="length",
                      response_ids=(ours.convert_tokens_to_ids("<think>"), *ours.encode("the mat")))
    mind = Distant(lambda papers: [[-1.0] * len(r) for _, r in papers])
    member = Member(Seat(name="t"), View(translator=Translator(ours, theirs)), mind)
    member.prepare([rollout])
    span = member.opinion([rollout], pack([rollout]), None, None, 1.0).spoken.span.tolist()
    assert span[0] == -1 and min(span[1:]) >= 0


def hinted(rollout, group):
    return None if rollout.sample == 1 else (Message("user", "d"),)


def test_a_privilege_moves_the_prompt_and_the_skipped_are_not_compared():
    view = View(tokenizer=student_tokenizer(), privilege=hinted)
    found = opinion(answers(), view=view)
    assert found.whole.at.tolist() == [0, 1, 2, 3, 8, 9] and found.spoken is None and not found.complete
    states = []
    for r in answers()[::2]:
        with torch.no_grad():
            rows = teacher().model.model(torch.tensor([[D, END, 3, *r.response_ids]])).last_hidden_state[0]
        states.append(rows[2:-1])
    torch.testing.assert_close(found.whole.hidden, torch.cat(states), rtol=0, atol=3e-6)


def test_who_speaks_gives_the_log_probs_of_the_sampled_tokens_in_one_vocabulary():
    found = opinion(answers(), view=View(tokenizer=student_tokenizer(), privilege=hinted), speaks=True)
    span, logp = said(found)
    assert span == [0, 1, 2, 3, -1, -1, -1, -1, 4, 5] and found.whole is None
    expected = [x for r in answers()[::2] for x in logps(teacher().model, (D, END, 3), r.response_ids)]
    assert logp == pytest.approx(expected, abs=3e-6)


def test_a_micro_batch_hears_what_was_said_of_its_own_answers():
    rollouts = answers()
    span, logp = said(opinion(rollouts, told=rollouts[::-2]))
    (a, b, c), _, (g, h, i) = own()
    assert span == [0, 1, 2, 2, 3, 4] and logp == pytest.approx([g, h + i, a, b, c], abs=3e-6)


@pytest.mark.parametrize(("signal", "span"), [
    ("chunk", [0, 0, 1, 2, 3, 3, 3, 4, 5, 6]), ("exact", [-1, -1, 1, 2, -1, -1, -1, 4, 5, -1])])
def test_what_a_server_does_not_say_makes_its_span_unknown_and_no_other(signal, span):
    mind = Distant(lambda pairs: [[-0.25, None, -1.0], [None, -0.5, -2.0], [-math.inf, -3.0, -4.0]])
    found = opinion(answers(), mind=mind, signal=signal)
    assert found.spoken.span.tolist() == span
    logp = found.spoken.logp.tolist()
    assert [math.isnan(x) for x in logp] == [False, True, False, True, False, False, False]
    assert logp[0] == -0.25 and logp[2] == -1.0 and logp[4] == -2.0 and logp[5] == -math.inf and logp[6] == -7.0
    gap = span_gap(torch.full((10,), -1.0), found.spoken.span, found.spoken.logp).tolist()
    expected = {"chunk": [1.75, 1.75, 0, 0, 0, 0, 0, -1, 0, -6], "exact": [0, 0, 0, 0, 0, 0, 0, -1, 0, 0]}[signal]
    assert gap == expected


def test_the_weight_goes_linearly_and_tasks_choose():
    seat = Seat(name="t", weight=0.8, weight_end=0.2, tasks=frozenset({"letters"}))
    assert [seat.weight_at(p) for p in (0.0, 0.5, 1.0)] == pytest.approx([0.8, 0.5, 0.2])
    assert Seat(name="t", weight=0.3).weight_at(0.9) == 0.3
    assert seat.judges(answers()[0]) and not seat.judges(answer("a", A, task="other"))


def test_mapped_distributions_are_of_tokens_that_are_pairs():
    ours, theirs = byte_level(), sentencepiece("prepend")
    translator = Translator(ours, theirs)
    pairs = Pairs(*map(torch.from_numpy, translator.pairs))
    messages = (Message("user", "the cat"),)
    prompt, response = render_example(ours, messages, (Message("assistant", "the cat sat"),))
    rollout = Rollout(problem=Problem(id="0", task="t", messages=messages), group=0, sample=0, author="student",
                      prompt_ids=tuple(prompt), response_ids=tuple(response), finish="stop")
    asked = []
    mind = Distant(lambda papers: asked.extend(papers) or [[-1.0] * len(r) for _, r in papers])
    # a state that is the number of the token that it predicts
    mind.think = lambda reads, batch: Thoughts(hidden=torch.arange(float(len(batch.learn)))[:, None],
                                               head=Head(torch.zeros(len(theirs), 1)))
    member = Member(Seat(name="t", signal="mapped"), View(translator=translator), mind, pairs)
    member.prepare([rollout])
    batch = pack([rollout])
    found = member.opinion([rollout], batch, None, None, 1.0)
    partner = dict(zip(pairs.student.tolist(), pairs.teacher.tolist(), strict=True))
    read = asked[0][1]
    compared = [(partner.get(int(batch.targets[i])), read[int(j)]) for i, j in zip(
        found.whole.at, found.whole.hidden[:, 0], strict=True)]
    assert len(compared) == 3 and all(mine == other for mine, other in compared)
