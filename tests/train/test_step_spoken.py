"""A step with teachers who speak of spans: what the student's tokens are credited with, against numbers by hand."""

import math

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
)
from tests.tokens.makers import of_pieces
from tests.train.judged import learn, member, moved, rows, same
from tests.train.tiny import ROLLOUTS, VOCAB, qwen3, qwen3_f64
from tinyr2.models.head import head_of
from tinyr2.teachers.local import hire
from tinyr2.teachers.member import Member, Seat
from tinyr2.teachers.minds import Distant, Resident
from tinyr2.teachers.panel import Panel
from tinyr2.teachers.views import View
from tinyr2.tokens.translate import Translator
from tinyr2.train.loss import LossConfig, count, token_distillation, token_divergence
from tinyr2.train.metrics import score_metrics
from tinyr2.train.step import Learner, Reading, accumulate

SPEAK, COMPARE = ("exact", "chunk", "chunk_debiased"), ("mapped", "marginal")
CANONICAL = [answer("ab", AB, CD, END), answer("dd", D, AB, group=1), answer("abcd", C, AB, CD, END, group=2)]
# the spans of `answers` against the teacher's papers, by hand: (student's tokens, teacher's tokens) of each answer
PAPERS = [((5, 6, 2, 3), (10, 8, 2)), ((8, 8, 2, 3), (10, 8, 2)), ((10, 8, 2, 3), (8, 5, 6))]
LYING = [[((0, 1), (0,)), ((2,), (1,)), ((3,), (2,))], [((0, 1, 2), (0, 1)), ((3,), (2,))],
         [((0,), (0,)), ((1,), (1, 2))]]


def translated(signal, other, model, student, rollouts, budget=1000):
    """A step with one teacher, `model`, who reads through `other`, its tokenizer."""
    translator = Translator(student_tokenizer(), other)
    panel = Panel([Member(Seat(name="t", signal=signal), View(translator=translator), Resident(hire(model, VOCAB)),
                          aid(signal, translator))], student=head_of(student, VOCAB))
    panel.prepare(rollouts, 0.0)
    counts = count(rollouts)
    student.zero_grad()
    scores = accumulate(
        Learner(model=student, vocab=VOCAB, tokens_per_micro_batch=budget), rollouts,
        lambda batch: token_distillation(LossConfig(), batch, counts), Reading(
            divergence=LossConfig().divergence, judge=panel, compare=lambda batch: token_divergence(counts),
            shows_states=signal == "chunk_debiased"))
    return scores, {n: p.grad for n, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("budget", [1000, 9])
@pytest.mark.parametrize("signal", [*SPEAK, *COMPARE])
def test_the_student_itself_across_the_translation_gives_no_signal_and_no_gradient(signal, budget):
    scores, grads = translated(signal, student_tokenizer(), qwen3(), qwen3(), CANONICAL, budget)
    most = 1e-6 if signal in COMPARE else 0.0
    assert abs(scores.loss) <= most and moved(grads) <= most
    assert scores.facts["teacher/t/kept"] == (9.0, 9.0)
    if signal in SPEAK:
        assert scores.teacher_gap.tolist() == [0.0] * 9
        assert scores.facts["teacher/t/unknown"] == (0.0, 9.0)


@pytest.mark.parametrize("signal", [*SPEAK, *COMPARE])
def test_the_student_in_another_order_of_ids_gives_no_signal_and_no_gradient(signal):
    other = of_pieces("cd", "d", "ab", "c", "b", "a")
    other.chat_template = student_tokenizer().chat_template
    order = torch.arange(VOCAB)
    order[5:11] = torch.tensor([CD, D, AB, C, B, A])
    model = qwen3()
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(qwen3().get_input_embeddings().weight[order])
    scores, grads = translated(signal, other, model, qwen3(), CANONICAL)
    assert abs(scores.loss) < 1e-6 and moved(grads) < 1e-6
    assert scores.facts["teacher/t/kept"] == (9.0, 9.0)
    distant = qwen3(seed=3)  # and somebody else gives one
    assert moved(translated(signal, other, distant, qwen3(), CANONICAL)[1]) > 1e-3


# --- twelve tokens by hand: ab c d a b cd d d a ab d end, against abc d abc d d d a a b d end

TWELVE = (AB, C, D, A, B, CD, D, D, A, AB, D, END)
SAID = [-0.5, -1.0, -1.5, -2.0, -2.5, -3.0, -3.5, -4.0, -4.5, -5.0, -5.5]
# every token of the student's has the log-prob -ln 23 = -3.135494
GAPS = {
    "exact": [0, 0, 2.135494, 0, 0, 0, 0.635494, 0.135494, -0.364506, 0, -1.864506, -2.364506],
    "chunk": [5.770988, 5.770988, 2.135494, 5.906483, 5.906483, 5.906483, 0.635494, 0.135494, -0.364506, -5.364506,
              -1.864506, -2.364506],
}
# 3.135494 · (sum of the gaps) / 12
LOSSES = {"exact": -0.440807, "chunk": 5.803247}


def unsure():
    """A student to whom all 23 tokens are as likely."""
    model = qwen3()
    with torch.no_grad():
        model.model.norm.weight.zero_()
    return model


@pytest.mark.parametrize("signal", ["exact", "chunk"])
def test_twelve_tokens_are_credited_with_the_numbers_written_here(signal):
    asked = []
    mind = Distant(lambda papers: asked.extend(papers) or [SAID])
    teacher = member(view=across(), mind=mind, signal=signal, name="t")
    scores, _ = learn([teacher], [answer("ab", *TWELVE)], model=unsure(), dtype=torch.float32)
    assert asked == [((5, 6, 2, 3), (10, 8, 10, 8, 8, 8, 5, 5, 6, 8, 2))]
    assert scores.learner_logp.tolist() == pytest.approx([-3.135494] * 12, abs=1e-6)
    assert scores.teacher_gap.tolist() == pytest.approx(GAPS[signal], abs=1e-6)
    assert scores.loss == pytest.approx(LOSSES[signal], abs=1e-6)
    assert scores.facts["teacher/t/kept"] == ((6.0 if signal == "exact" else 12.0), 12.0)


# --- loops


def spoken(rollouts, gaps_of):
    """(loss, gradient): −mean of gap · log p(y) by a loop; gaps_of(i, the student's log-probs) gives answer i's."""
    student, total, tokens = qwen3_f64(), torch.zeros((), dtype=torch.float64), 0
    for i, r in enumerate(rollouts):
        mine = rows(student, r)
        mine = torch.stack([mine[j, token] for j, token in enumerate(r.response_ids)])
        gaps = gaps_of(i, [float(x) for x in mine.detach()])
        total = total - sum(gap * x for gap, x in zip(gaps, mine, strict=True))
        tokens += len(gaps)
    total = total / tokens
    total.backward()
    return float(total.detach()), {n: p.grad for n, p in student.named_parameters()}


def span_gaps(i, mine, signal="chunk", weight=1.0):
    """The whole log-ratio of its span at each token of answer i of `answers`."""
    theirs, gaps = logps(qwen3_f64(hidden=24, seed=1), *PAPERS[i]), [0.0] * len(mine)
    for ours, others in LYING[i]:
        if signal == "exact" and (len(ours) > 1 or len(others) > 1):
            continue
        for j in ours:
            gaps[j] = weight * (sum(theirs[k] for k in others) - sum(mine[k] for k in ours))
    return gaps


@pytest.mark.parametrize("budget", [1000, 9, 1])
@pytest.mark.parametrize("signal", ["exact", "chunk"])
def test_every_token_of_a_span_carries_the_whole_log_ratio(signal, budget):
    expected = spoken(answers(), lambda i, mine: span_gaps(i, mine, signal))
    found = learn([member(view=across(), signal=signal)], answers(), budget=budget)
    same(found, expected)
    assert moved(found[1]) > 1e-3


def test_the_spans_of_an_answer_add_up_to_its_log_ratio():
    scores, _ = learn([member(view=across())], answers())
    for n, r in enumerate(scores.rollouts):
        i = [x.sample + 2 * x.group for x in answers()].index(r.sample + 2 * r.group)
        gap = scores.teacher_gap[scores.row == n].tolist()
        mine = logps(qwen3_f64(), r.prompt_ids, r.response_ids)
        total = sum(logps(qwen3_f64(hidden=24, seed=1), *PAPERS[i])) - sum(mine)
        assert sum(gap[ours[0]] for ours, _ in LYING[i]) == pytest.approx(total, abs=1e-9)


def test_speakers_of_several_vocabularies_add_up_by_their_weights():
    def gaps(i, mine):
        r = answers()[i]
        plain = logps(qwen3_f64(hidden=24, seed=2), r.prompt_ids, r.response_ids)
        return [0.5 * (t - s) + g for t, s, g in zip(plain, mine, span_gaps(i, mine, weight=2.0), strict=True)]

    found = learn([member(2, weight=0.5, speaks=True), member(1, weight=2.0, view=across())], answers(), budget=9)
    same(found, spoken(answers(), gaps), atol=1e-8)


def test_one_who_compares_distributions_and_one_who_speaks_add_up():
    both = [member(2, weight=0.5), member(1, weight=2.0, view=across())]
    whole, spans = (learn([m], answers()) for m in both)
    joint = learn(both, answers(), budget=9)
    expected = {n: whole[1][n] + spans[1][n] for n in whole[1]}
    same(joint, (whole[0].loss + spans[0].loss, expected), atol=1e-12)


def test_the_kl_is_that_of_the_loss_where_one_teacher_compares_and_one_speaks():
    both = [member(2, weight=0.5), member(1, weight=2.0, view=across())]
    whole, spans = (learn([m], answers()) for m in both)
    joint = learn(both, answers(), budget=9)
    theirs = whole[0].loss + score_metrics(spans[0])["kl"]
    assert score_metrics(joint[0])["kl"] == pytest.approx(theirs, abs=1e-9)


@pytest.mark.parametrize("bad", [None, math.nan, -math.inf, math.inf])
@pytest.mark.parametrize("signal", ["exact", "chunk"])
def test_a_log_prob_that_is_no_number_never_reaches_the_loss_and_is_counted(signal, bad):
    said = [[-0.5, bad, -1.0], [bad, -0.5, -2.0], [-3.0, -3.5, -4.0]]
    unknown = {(0, 2), (1, 0), (1, 1), (1, 2)}  # (answer, token) of the spans with such a value
    teacher = member(view=across(), mind=Distant(lambda papers: said), signal=signal, name="t")
    scores, grads = learn([teacher], answers())

    def gaps(i, mine):
        out = [0.0] * len(mine)
        for ours, others in LYING[i]:
            if (signal == "exact" and (len(ours) > 1 or len(others) > 1)) or (i, ours[0]) in unknown:
                continue
            for j in ours:
                out[j] = sum(said[i][k] for k in others) - sum(mine[k] for k in ours)
        return out

    same((scores, grads), spoken(answers(), gaps), atol=1e-7)  # what a server says is held in float32
    assert math.isfinite(scores.loss) and all(bool(g.isfinite().all()) for g in grads.values())
    assert scores.facts["teacher/t/unknown"] == ((1.0, 4.0) if signal == "exact" else (4.0, 10.0))


def test_the_first_tokens_of_an_answer_count_more_with_position_weights():
    def gaps(i, mine):
        r = ROLLOUTS[i]
        if r.author != "student":  # a policy gradient is of what the student sampled
            return [0.0] * len(mine)
        plain = logps(qwen3_f64(hidden=24, seed=1), r.prompt_ids, r.response_ids)
        own = [t - s for t, s in zip(plain, mine, strict=True)]
        total = sum(map(abs, own)) + 1e-8
        return [g * (1.5 - 0.5 * sum(map(abs, own[:j])) / total) for j, g in enumerate(own)]

    loss = LossConfig(estimator="sampled", position_weight=0.5)
    for budget in (1000, 9):
        same(learn([member(1, speaks=True)], ROLLOUTS, loss=loss, budget=budget), spoken(ROLLOUTS, gaps), atol=1e-8)
