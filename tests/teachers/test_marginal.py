"""`Marginal` against enumeration, and where tokenizers do what they should not."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from tests.teachers.marginal_reference import Case, rollout_of
from tests.tokens.makers import MADE, byte_level, of_pieces, sentencepiece, unigram
from tinyr2.models.head import Head, TopK, run
from tinyr2.objectives.divergence import Divergence, measure
from tinyr2.teachers.marginal import Marginal
from tinyr2.tokens.prefixes import Prefixes

DIGITS = ("0", "1", "2", "#", ";")
END = 4  # of a turn, on both sides
TEACHER = ("0", "1", "2", "01", "12", "012", "#", "##", ";")


def case(student, teacher=TEACHER, **more):
    return Case(of_pieces(*student), of_pieces(*teacher), **more)


def spelled(case, text):
    return case.translator.student.encode(text.encode()).ids


def expected(case, rollout):
    """{token: (V,)} by enumeration, where each of the teacher's tokens is one or more of the student's."""
    paper, out = case.paper(rollout), {}
    ids, said = list(rollout.response_ids), paper.response_ids
    i, last = 0, ()
    for j, token in enumerate(said):
        written = case.written[token]
        assert tuple(ids[i:i + len(written)]) == written
        out[i] = case.enumerated(said[:max(0, j - 1)], last, said[j - 1:j] if j else ())
        for n in range(1, len(written)):
            out[i + n] = case.enumerated(said[:j], written[:n], None)
        i, last = i + len(written), written
    assert i == len(ids)
    return out


def check(case, rollout, atol=1e-13):
    found, wanted = case.ask(rollout), expected(case, rollout)
    assert found.keys() == wanted.keys()
    for token, row in wanted.items():
        assert np.abs(found[token].numpy() - row).max() <= atol


@pytest.mark.parametrize("teacher", [TEACHER, (*TEACHER, "x", "x0", "0x", "#1xx")])
@pytest.mark.parametrize("text", ["012;", "0012##;", "12012#0;1", "###01;;2"])
@pytest.mark.parametrize("student", [DIGITS, (*DIGITS, "01"), (*DIGITS, "##", "12")])
def test_it_is_what_enumeration_of_the_teachers_next_tokens_gives(student, text, teacher):
    one = case(student, teacher, padding=3)
    check(one, rollout_of(spelled(one, text)))


def test_a_token_in_progress_by_hand():
    # after "0" the teacher's token was 0 or may become 03 or 04; students of single characters see all three
    one = case(("0", "3", "4", ";"), ("0", "3", "4", "03", "04", ";"))
    rollout = rollout_of(spelled(one, "0;"))
    zero, three, four, zero3, zero4, end = range(5, 11)
    first, second = one.table.after(()), one.table.after((zero,))
    began = first[[zero, zero3, zero4]].sum()
    rho = first[zero] / began
    found = one.ask(rollout)
    assert found[0][5].item() == pytest.approx(began, abs=1e-14)
    assert found[1][6].item() == pytest.approx(first[zero3] / began + rho * second[three], abs=1e-14)
    assert found[1][7].item() == pytest.approx(first[zero4] / began + rho * second[four], abs=1e-14)
    assert found[1][5].item() == pytest.approx(rho * second[[zero, zero3, zero4]].sum(), abs=1e-14)
    assert found[1][8].item() == pytest.approx(rho * second[end], abs=1e-14)
    assert found[1][END].item() == pytest.approx(rho * second[END], abs=1e-14)
    # special tokens without a counterpart are the tail's
    assert found[0].sum().item() == pytest.approx(1 - first[:END].sum(), abs=1e-14)
    assert found[1].sum().item() == pytest.approx(1 - rho * second[:END].sum(), abs=1e-14)


def test_text_that_the_student_cannot_write_is_taken_as_not_said_and_special_tokens_as_said():
    one = case(("0", "1"), ("0", "1", "x", "x0", "0x"), padding=2)
    first = one.table.after(())
    assert len(first) == 12  # 5 special tokens, 5 pieces, 2 ids without a token
    known = 1 - first[[7, 8]].sum()
    assert known < 0.99
    row = one.ask(rollout_of((5,)))[0].numpy()
    assert row[[END, 5, 6]] == pytest.approx(np.array([first[4], first[5] + first[9], first[6]]) / known, abs=1e-14)
    assert 1 - row.sum() == pytest.approx(first[[0, 1, 2, 3, 10, 11]].sum() / known, abs=1e-14)
    assert not row[[0, 1, 2, 3, 7, 8]].any()


@pytest.mark.parametrize("pieces", [TEACHER, DIGITS])
def test_with_one_tokenizer_it_is_the_teachers_own_distribution(pieces):
    one = case(pieces, pieces)
    rollout = rollout_of(spelled(one, "012#0;12##;01"))
    found, shared = one.ask(rollout), one.translator.pairs[0]
    assert sorted(found) == list(range(len(rollout.response_ids)))
    for j, row in found.items():
        own = one.table.after(rollout.response_ids[:j])
        assert np.abs(row.numpy()[shared] - own[shared]).max() < 1e-14
        assert row.sum().item() == pytest.approx(own[shared].sum(), abs=1e-14)


def test_a_longer_token_counts_only_where_the_student_would_have_written_it_so():
    # "01" of the teacher's is one token of the student's, who wrote "0": so the teacher's token was 0, or 02
    one = case(("0", "1", "2", "01"), ("0", "1", "2", "01", "02"))
    check(one, rollout := rollout_of(spelled(one, "00")))
    first, second = one.table.after(()), one.table.after((5,))
    rho = first[5] / (first[5] + first[9])
    assert one.ask(rollout)[1][6].item() == pytest.approx(rho * second[6], abs=1e-14)


def test_where_the_student_cut_as_its_tokenizer_does_not_nothing_is_known_until_the_teachers_token_ends():
    one = case((*DIGITS, "01"))
    zero, one_, both, end = 5, 6, 10, 9
    rollout = rollout_of((zero, one_, end))  # the tokenizer's own are (both, end)
    asked, paper = one.queries(rollout)
    assert paper.response_ids == (8, 13)
    assert [(q.token, q.inside, q.path, q.fresh) for q in asked] == [
        (0, None, (), 0), (1, 0, (zero,), None), (2, None, (), 1)]
    found = one.ask(rollout)
    first, second = one.table.after(()), one.table.after((8,))
    assert found[0][both].item() == pytest.approx(first[[8, 10]].sum(), abs=1e-14)  # 01 and 012
    assert found[0][zero].item() == pytest.approx(first[5], abs=1e-14)
    assert found[1].sum() == 0  # of the tokens that it writes with 0 first, none goes on
    assert found[2].sum().item() == pytest.approx(1 - second[:END].sum(), abs=1e-14)


def test_a_students_token_that_covers_several_of_the_teachers_is_not_asked_for():
    one = case((*DIGITS, "01", "0#1"), ("0", "1", "#", "##", ";", "2"))
    rollout = rollout_of(spelled(one, ";0#1;01"))
    assert [(q.token, q.fresh) for q in one.queries(rollout)[0]] == [(0, 0), (2, 4)]
    assert one.queries(rollout)[0][1].inside is None  # the ";" after "0#1": the teacher's last token there was its "1"


def test_what_is_not_learned_is_not_asked_for():
    one = case(DIGITS)
    rollout = rollout_of(spelled(one, "012#"))
    masked = replace(rollout, learn_mask=(False, True, False, True))
    asked, _ = one.queries(masked, first=10, teacher_first=20)
    assert [(q.token, q.inside, q.path, q.fresh) for q in asked] == [
        (10, 20, (5,), None), (11, 20, (5, 6, 7), 21)]


def test_of_an_empty_answer_and_of_an_answer_without_text_nothing_is_asked():
    one = case(DIGITS)
    for ids in ((), (1,), (1, 0, 10**6)):
        asked, paper = one.queries(rollout_of(ids))
        assert asked == [] and paper.spans.count == 0


@pytest.mark.parametrize("silent", [1, 3, 10**6])
def test_in_place_of_a_token_that_the_teacher_does_not_have_comes_what_it_says_next(silent):
    # <s>, a chat's opening, or an id of a padded vocabulary; the teacher reads 012;
    one = case(DIGITS)
    asked, paper = one.queries(rollout_of((silent, 5, silent, 6, 7, silent, silent, 9, silent)))
    assert paper.response_ids == (10, 13)
    fresh, inside, further, after = ((None, (), 0), (0, (5,), None), (0, (5, 6), None), (0, (5, 6, 7), 1))
    assert [(q.token, q[1:]) for q in asked] == [
        (0, fresh), (1, fresh), (2, inside), (3, inside), (4, further), (5, after), (6, after), (7, after)]


def test_lost_bytes_are_not_asked_for_and_cut_off_what_was_in_progress():
    one = case((*DIGITS, "é"))
    # 0 <s> é <s> 1: the teacher has no é
    asked, paper = one.queries(rollout_of((5, 1, 10, 1, 6)))
    assert paper.lost == 2 and paper.spans.student.tolist() == [0, -1, -1, -1, 1]
    fresh = paper.spans.teacher.tolist().index(1)
    assert [(q.token, q.inside, q.fresh) for q in asked] == [(0, None, 0), (3, None, fresh), (4, None, fresh)]


def test_an_end_of_turn_is_asked_for_by_its_role():
    one = case(DIGITS)
    rollout = rollout_of((5, 6, END))
    asked, paper = one.queries(rollout)
    assert asked[-1].fresh == 1 and paper.response_ids == (8, END)
    row = one.ask(rollout)[2]
    first, second = one.table.after(()), one.table.after(paper.response_ids[:1])
    rho = first[8] / first[[8, 10]].sum()  # 01 or 012
    assert row[END].item() == pytest.approx(rho * second[END], abs=1e-14)


def thinking(tokenizer, *texts, special=True):
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": [*texts]})
    else:
        tokenizer.add_tokens([*texts])
    return tokenizer


def test_a_role_that_the_teacher_spells_with_several_tokens_is_not_asked_for():
    ours = thinking(of_pieces(*DIGITS), "<think>", "</think>")
    one = Case(ours, of_pieces(*TEACHER, *"<>/think"))
    opening = ours.convert_tokens_to_ids("<think>")
    asked, paper = one.queries(rollout_of((5, opening, 6)))
    assert len(paper.response_ids) == 9  # 0 < t h i n k > 1
    assert [(q.token, q.inside, q.fresh) for q in asked] == [(0, None, 0), (2, None, 8)]


@pytest.mark.parametrize("special", [True, False])
def test_a_role_of_one_token_on_both_sides_is_one_even_where_it_is_text_to_the_teacher(special):
    ours = thinking(of_pieces(*DIGITS, "<"), "<think>", "</think>")
    theirs = thinking(of_pieces(*TEACHER, "<"), "<think>", "</think>", special=special)
    one = Case(ours, theirs)
    mine, other = (t.convert_tokens_to_ids("<think>") for t in (ours, theirs))
    rollout = rollout_of((mine, 5, mine))
    found, (asked, paper) = one.ask(rollout), one.queries(rollout)
    assert paper.response_ids == (other, 5, other)
    assert [(q.token, q.inside, q.fresh) for q in asked] == [(0, None, 0), (1, 0, 1), (2, 1, 2)]
    first = one.table.after(())
    assert found[0][mine].item() == pytest.approx(first[other], abs=1e-14)
    second = one.table.after((other,))
    assert found[1][mine].item() == pytest.approx(second[other], abs=1e-14)


ANSWER = "the cat sat on the mat, 12 cats: a hat? 漢é the cat"


@pytest.mark.parametrize(("student", "teacher"), [*product(MADE, MADE)])
def test_tokenizers_of_all_kinds_agree_with_enumeration(student, teacher):
    one = Case(MADE[student](), MADE[teacher]())
    rollout = rollout_of(one.translator.student.encode(ANSWER.encode()).ids)
    asked, paper = one.queries(rollout)
    assert len({q.token for q in asked}) == len(asked) > 5
    found = one.ask(rollout)
    for q in (*asked[:6], *asked[6::5]):
        said = paper.response_ids
        if q.inside is None:
            row = one.enumerated(said[:q.fresh], (), ())
        else:
            row = one.enumerated(said[:q.inside], q.path, None if q.fresh is None else said[q.inside:q.fresh])
        # of a long list the likeliest are there
        kept = found[q.token].numpy()
        assert np.abs(np.where(kept > 0, kept - row, 0)).max() < 1e-13
        assert (kept > 0).sum() == min(64, (row > 0).sum()) and row[kept == 0].max() <= kept[kept > 0].min()


@pytest.mark.parametrize(("student", "teacher"), [
    (byte_level, sentencepiece), (sentencepiece, byte_level), (sentencepiece, sentencepiece), (unigram, byte_level)])
def test_a_first_token_whose_space_is_no_text_is_not_taken_for_one_with_a_space(student, teacher):
    one = Case(student(), teacher())
    rollout = rollout_of(one.translator.student.encode(b"the cat").ids)
    asked, paper = one.queries(rollout)
    first = one.translator.teacher.pieces[paper.response_ids[0]]
    alike = one.translator.student.pieces[rollout.response_ids[0]] == first
    assert alike == (student is teacher) and (0 in [q.token for q in asked]) == alike
    assert len(rollout.response_ids) - 1 in [q.token for q in asked]


def compared(topk, logits, kind):
    """(The divergences, their gradient by the student's logits (n, V))."""
    states = logits.clone().requires_grad_()
    size = logits.shape[1]
    result = run(states, Head(torch.eye(size, dtype=logits.dtype)), torch.zeros(len(logits), dtype=torch.int64),
                 lambda s: s.divergence.sum(), divergence=Divergence(kind=kind), teacher_topk=topk)
    result.loss.backward()
    return result.divergence, states.grad


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("pieces", [TEACHER, DIGITS])
def test_a_student_that_is_the_teacher_with_special_and_padded_tokens_is_not_pulled(pieces, kind):
    one = case(pieces, pieces, padding=12)
    rollout = rollout_of(spelled(one, "012#0;12##;01"))
    asked, paper = one.queries(rollout)
    states = one.states(paper)
    assert len(asked) == len(states) and states.shape[1] == one.marginal.vocab
    assert 1 - states[:, one.translator.pairs[1]].exp().sum(-1).min() > 0.5  # what has no counterpart is likely
    topk = one.marginal.lists(asked, states, Head(torch.eye(one.table.size).double()), 1.0)
    value, grad = compared(topk, states, kind)
    assert value.abs().max() < 1e-12 and grad.abs().max() < 1e-12
    value, grad = compared(topk, states.roll(1, 0), kind)  # and another student is
    assert value.min() > 1e-3 and grad.abs().max() > 1e-2


@pytest.mark.parametrize("silent", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_a_student_that_flees_to_tokens_without_a_counterpart_is_called_back(kind, dtype, silent):
    one = case(DIGITS, padding=2, trained=True)
    asked, paper = one.queries(rollout_of(spelled(one, "012;0#")))
    topk = one.marginal.lists(asked, one.states(paper).to(dtype), Head(torch.eye(one.table.size, dtype=dtype)), 1.0)
    cuts = [i for i, q in enumerate(asked) if q.fresh is not None]
    topk = TopK(ids=topk.ids[cuts], logp=topk.logp[cuts])
    assert float(topk.logp.exp().sum(-1).sub(1).abs().max()) < 1e-6
    logits = torch.zeros(len(cuts), one.marginal.vocab, dtype=dtype)
    logits[:, silent] = 12.0  # <s>, or an id without a token, which the teacher never says
    value, grad = compared(topk, logits, kind)
    assert torch.isfinite(grad).all() and value.min() > 0.5 and value.max() < -np.log(torch.finfo(dtype).eps) + 1
    assert grad.sum(-1).abs().max() < 1e-5 and grad.abs().max() < 1.1
    if kind != "jsd":
        assert (grad[:, silent] > 0).all() and (grad[:, 5:10].sum(-1) < 0).all()


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_where_nothing_is_known_nothing_is_pulled(kind):
    one = case((*DIGITS, "01"))
    asked, paper = one.queries(rollout_of((5, 6, 9)))
    topk = one.marginal.lists(asked[1:2], one.states(paper).float(), Head(torch.eye(one.table.size)), 1.0)
    assert (topk.logp == -torch.inf).all()
    value, grad = compared(topk, torch.randn(1, one.marginal.vocab, generator=torch.manual_seed(0)), kind)
    assert value.abs().max() < 1e-6 and grad.abs().max() < 1e-6


def test_a_list_of_the_whole_vocabulary_has_no_bucket():
    # a student whose every id the teacher says: as if it were compared without a list
    one = case(DIGITS, trained=True)
    asked, paper = one.queries(rollout_of(spelled(one, "0;1")))
    shift = {i: n for n, i in enumerate((END, *range(5, 10)))}
    prefixes = Prefixes({piece.encode(): shift[i + 5] for i, piece in enumerate(DIGITS)},
                        one.translator.teacher.pieces, {END: 0})
    small = Marginal(prefixes, [b"", *map(str.encode, DIGITS)], one.translator.teacher.pieces, 6)
    asked = [q._replace(path=tuple(shift[i] for i in q.path)) for q in asked if q.fresh is not None]
    topk = small.lists(asked, one.states(paper).float(), Head(torch.eye(one.table.size)), 1.0)
    assert topk.ids.shape == (3, 6) and (topk.logp > -torch.inf).all()
    assert topk.logp.exp().sum(-1).sub(1).abs().max() < 1e-6
    logits = torch.randn(3, 6, generator=torch.manual_seed(0))
    teacher = torch.zeros(3, 6).scatter_(1, topk.ids, topk.logp)
    for kind in ("forward_kl", "reverse_kl", "jsd"):
        value, grad = compared(topk, logits, kind)
        wanted, pull = measure(Divergence(kind=kind), logits.log_softmax(-1), teacher)
        torch.testing.assert_close(value, wanted, rtol=0, atol=2e-6)
        torch.testing.assert_close(grad, pull, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-6)])
def test_single_and_half_precision_are_summed_in_single(dtype, atol):
    one = case(DIGITS)
    rollout = rollout_of(spelled(one, "0012##;"))
    asked, paper = one.queries(rollout)
    hidden, head = one.states(paper).to(dtype), Head(torch.eye(one.table.size).to(dtype), scale=1.5)
    found = one.marginal.lists(asked, hidden, head, 0.7)
    wanted = one.marginal.lists(asked, hidden.double(), Head(head.weight.double(), scale=1.5), 0.7)
    assert found.logp.dtype == torch.float32
    dense = [torch.zeros(len(asked), one.marginal.vocab).double().scatter_(1, t.ids, t.logp.double().exp())
             for t in (found, wanted)]
    torch.testing.assert_close(*dense, rtol=0, atol=atol)


@pytest.mark.parametrize("sure", [10.0, 20.0, 60.0])
def test_of_a_teacher_certain_of_text_that_the_student_cannot_write_the_rest_stands_for_the_whole(sure):
    one = case(("0", "1"), ("0", "1", "x"))
    asked, _ = one.queries(rollout_of((5,)))
    hidden = torch.randn(50, one.table.size, generator=torch.manual_seed(0))
    hidden[:, 7] = sure  # x
    asked = [asked[0]._replace(fresh=j) for j in range(50)]
    found = one.marginal.lists(asked, hidden, Head(torch.eye(one.table.size)), 1.0)
    dense = torch.zeros(50, one.marginal.vocab).scatter_(1, found.ids, found.logp.exp())
    rest = hidden[:, :7].double().softmax(-1)  # the same logits without it
    torch.testing.assert_close(dense[:, 4:7].double(), rest[:, 4:], rtol=0, atol=1e-6)
    assert not dense[:, :4].any()


def test_lists_are_the_same_however_many_are_made_at_once(monkeypatch):
    one = case(DIGITS)
    asked, paper = one.queries(rollout_of(spelled(one, "0012##;01#2")))
    head = Head(torch.eye(one.table.size).double())
    whole = one.marginal.lists(asked, one.states(paper), head, 1.0)
    for held in (1, 100, 300):
        monkeypatch.setattr("tinyr2.teachers.marginal._HELD", held)
        some = one.marginal.lists(asked, one.states(paper), head, 1.0)
        torch.testing.assert_close(some.logp, whole.logp, rtol=0, atol=1e-14)
        assert torch.equal(some.ids[some.logp > -torch.inf], whole.ids[whole.logp > -torch.inf])


def test_two_answers_in_one_pack_are_asked_for_together():
    one = case(DIGITS)
    rollouts = [rollout_of(spelled(one, text)) for text in ("012#", ";01")]
    papers = [one.paper(r) for r in rollouts]
    ours, theirs = len(rollouts[0].response_ids), len(papers[0].response_ids)
    asked = [*one.marginal.queries(rollouts[0], papers[0], 0, 0),
             *one.marginal.queries(rollouts[1], papers[1], ours, theirs)]
    assert [q.token for q in asked] == list(range(ours + 3))
    head = Head(torch.eye(one.table.size).double())
    found = one.marginal.lists(asked, torch.cat([one.states(p) for p in papers]), head, 1.0)
    alone = one.marginal.lists([q for q in one.queries(rollouts[1])[0]], one.states(papers[1]), head, 1.0)
    torch.testing.assert_close(found.logp[ours:], alone.logp, rtol=0, atol=1e-14)
