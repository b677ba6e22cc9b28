"""What a teacher reads in place of an answer: its own prompt, its own tokens, and never a cut paper."""

from dataclasses import replace

from tests.teachers.pieces import AB, END, A, C, D, across, answer, answers, student_tokenizer, teacher_tokenizer
from tinyr2.core.types import Message
from tinyr2.teachers.views import View, as_rollout
from tinyr2.tokens.chat import render_prompt


def shown(rollout, group):
    """To the first of a group nothing; to the others the first one's answer, which they can only know by the group."""
    if rollout.sample == 0:
        return None
    return (Message("user", "a" * len(group[0].response_ids)),)


def test_a_view_without_anything_of_its_own_gives_the_students_ids():
    assert View().plain and not across().plain and not View(tokenizer=teacher_tokenizer()).plain
    rollouts = answers()
    papers = View().papers(rollouts)
    assert [(p.prompt_ids, p.response_ids, p.spans) for p in papers] == [
        (r.prompt_ids, r.response_ids, None) for r in rollouts]


def test_another_tokenizer_reads_its_own_template_and_tokens():
    papers = across().papers(answers())
    assert [p.prompt_ids for p in papers] == [(5, 6, 2, 3), (8, 8, 2, 3), (10, 8, 2, 3)]
    assert [p.response_ids for p in papers] == [(10, 8, 2), (10, 8, 2), (8, 5, 6)]
    assert [p.spans.student.tolist() for p in papers] == [[0, 0, 1, 2], [0, 0, 0, 1], [0, 1]]
    assert [p.spans.teacher.tolist() for p in papers] == [[0, 1, 2], [0, 0, 1], [0, 1, 1]]
    assert [(p.bytes, p.lost, p.unpaired) for p in papers] == [(4, 0, 0), (4, 0, 0), (3, 0, 0)]


def test_a_template_of_its_own_with_one_vocabulary_changes_the_prompt_alone():
    (paper,) = View(tokenizer=teacher_tokenizer()).papers(answers()[:1])
    assert paper.prompt_ids == tuple(render_prompt(teacher_tokenizer(), (Message("user", "ab"),)))
    assert paper.response_ids == (AB, C, D, END) and paper.spans is None


def test_a_privilege_is_told_of_the_whole_group_and_may_give_no_paper():
    rollouts = [answer("ab", AB, END), answer("ab", A, END, sample=1), answer("d", D, D, D, group=1, sample=1)]
    view = View(tokenizer=student_tokenizer(), privilege=shown)
    papers = view.papers(rollouts)
    assert papers[0] is None
    assert papers[1].prompt_ids == (A, A, END, 3)  # two letters: the length of its neighbor's answer
    assert papers[2].prompt_ids == (A, A, A, END, 3)
    assert [p.response_ids for p in papers[1:]] == [(A, END), (D, D, D)]


def test_a_privilege_is_read_across_tokenizers_too():
    rollouts = [answer("ab", AB, END), answer("ab", A, END, sample=1)]
    none, paper = across(privilege=shown).papers(rollouts)
    assert none is None and paper.prompt_ids == (5, 5, 2, 3) and paper.response_ids == (5, 2)


def test_what_is_too_long_for_the_teacher_is_no_paper_and_never_cut():
    rollouts = answers()  # papers of 4 + 3 tokens each
    assert [p is None for p in across(context=6).papers(rollouts)] == [True, True, True]
    assert [p.response_ids for p in across(context=7).papers(rollouts)] == [
        p.response_ids for p in across().papers(rollouts)]
    long = answer("abcdabcd", D, END)  # 7 + 2
    assert [p is None for p in across(context=7).papers([long, rollouts[0]])] == [True, False]


def test_a_paper_becomes_a_rollout_that_learns_what_the_student_learns():
    rollout = replace(answers()[0], learn_mask=(True, False, True, True))
    (paper,) = View(tokenizer=teacher_tokenizer()).papers([rollout])
    read = as_rollout(rollout, paper)
    assert read.learn_mask == rollout.learn_mask and read.prompt_ids == paper.prompt_ids
    (paper,) = across().papers([rollout])
    read = as_rollout(rollout, paper)  # of the teacher's tokens all: a span needs each of them
    assert read.learn_mask is None and read.response_ids == (10, 8, 2) and read.learned == 3
