"""Line-ups: shares counted by hand, every token in one block, what is lost and who ends a turn."""

import numpy as np
import pytest

from tests.tokens.makers import MADE, byte_level, of_pieces, sentencepiece, tokenizer_of, wordpiece
from tinyr2.core.errors import DataError
from tinyr2.core.types import Message, Problem, Rollout
from tinyr2.teachers.marginal import Marginal
from tinyr2.teachers.views import Paper
from tinyr2.tokens.lineup import (
    compare,
    line_up,
    lost_bytes,
    readable,
    roles,
    shares,
    tokens_of,
    vocabulary,
    worst,
)
from tinyr2.tokens.samples import SAMPLES
from tinyr2.tokens.translate import Translator

PAIRS = [(a, b) for a in MADE for b in MADE]


def pieces() -> Translator:
    """ab|c|d|x against a|b|cd|x."""
    return Translator(of_pieces("ab", "c", "d", "x"), of_pieces("a", "b", "cd", "x"))


def test_shares_are_those_counted_by_hand():
    # ab|c|d|x|ab|x over a|b|cd|x|a|b|x: of 6 tokens and 8 bytes the two x are one to one
    found = shares(line_up(pieces(), [("k", "abcdxabx")]))
    assert found["exact"] == found["mapped"] == {"tokens": 2 / 6, "bytes": 2 / 8}
    assert found["chunk"] == {"tokens": 1.0, "bytes": 1.0}
    # and c|d is the teacher's cd, where it has a distribution over either; of ab, two of its tokens, it has none
    assert found["marginal"] == {"tokens": 4 / 6, "bytes": 4 / 8}
    assert found["bytes_covered"] == 1.0
    assert found["size"] == {"texts": 1, "bytes": 8, "student_tokens": 6, "teacher_tokens": 7}


def test_the_whole_is_counted_over_all_texts_and_each_kind_over_its_own():
    found = compare(line_up(pieces(), [("a", "x"), ("b", "ab"), ("b", "xx")]))
    assert found["exact"]["tokens"] == 3 / 4
    assert {kind: one["exact"] for kind, one in found["kinds"].items()} == {
        "a": {"tokens": 1.0, "bytes": 1.0}, "b": {"tokens": 2 / 3, "bytes": 2 / 4}}
    assert found["kinds"]["b"]["size"]["texts"] == 2


@pytest.mark.parametrize("kind", MADE)
def test_a_tokenizer_lines_up_with_itself_one_to_one(kind):
    translator = Translator(tokenizer_of(kind), tokenizer_of(kind))
    found = shares(line_up(translator, [("k", "the cat sat on the mat"), ("k", "12 cats")]))
    whole = {"tokens": 1.0, "bytes": 1.0}
    assert (found["exact"], found["chunk"], found["marginal"]) == (whole, whole, whole)
    assert vocabulary(translator)["shared"] > 0
    assert worst(line_up(translator, [("k", "the cat")]), translator) == []


def test_a_first_token_without_its_space_is_exact_but_not_mapped():
    # "▁the" opens a text as "the"; inside a text it is " the", so the vocabularies pair it with no "the"
    translator = Translator(of_pieces("the", " cat"), sentencepiece())
    one, = line_up(translator, [("k", "the cat")])
    assert one.spans.kept("exact").tolist()[0]
    assert not one.mapped[0]


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_marginal_keeps_what_it_would_ask_for_of_an_answer_with_the_same_tokens(student, teacher):
    translator = Translator(tokenizer_of(student), tokenizer_of(teacher))
    ours, theirs = translator.student, translator.teacher
    marginal = Marginal(translator.prefixes, ours.pieces, theirs.pieces, ours.vocab)
    for one in line_up(translator, [*SAMPLES.items()]):
        rollout = Rollout(problem=Problem(id="0", task="t", messages=(Message("user", "0"),), answer=""), group=0,
                          sample=0, author="student", prompt_ids=(), response_ids=one.student.ids, finish="length")
        paper = Paper(prompt_ids=(), response_ids=one.teacher.ids, spans=one.spans, opened=len(one.student.ids))
        asked = [query.token for query in marginal.queries(rollout, paper, 0, 0)]
        assert one.kept("marginal").nonzero()[0].tolist() == asked


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_blocks_hold_every_token_of_both_sides_once_and_in_order(student, teacher):
    translator = Translator(tokenizer_of(student), tokenizer_of(teacher))
    for one in line_up(translator, [*SAMPLES.items(), ("short", "a"), ("empty", "")]):
        blocks = one.blocks()
        for side in ("student", "teacher"):
            slices = [getattr(block, side) for block in blocks]
            assert [k for s in slices for k in range(s.start, s.stop)] == list(range(len(getattr(one, side).ids)))
        for block in blocks:
            if block.aligned:
                ours, theirs = tokens_of(one, block, translator)
                assert b"".join(ours) == b"".join(theirs)
        covered = sum(len(b"".join(tokens_of(one, b, translator)[0])) for b in blocks if b.aligned)
        assert covered == one.kept_bytes("chunk")


def test_what_a_normalizer_changes_is_lost_and_named():
    translator = Translator(byte_level(), wordpiece())
    lineups = line_up(translator, [("k", "The cat"), ("k", "the cat"), ("k", "The hat")])
    assert lost_bytes(lineups) == [{"side": "teacher", "kind": "k", "text": "The", "count": 2}]
    # of 21 bytes the two "The" are in no span; " cat" and " hat" are
    assert shares(lineups)["bytes_covered"] == pytest.approx((21 - 6) / 21)


def test_the_longest_spans_come_first_and_each_text_once():
    translator = Translator(of_pieces("a", "b", "c", "x"), of_pieces("abc", "ab", "x"))
    found = worst(line_up(translator, [("k", "xabxabcxabcx")]), translator)
    assert found == [{"kind": "k", "text": "abc", "student": ["a", "b", "c"], "teacher": ["abc"]},
                     {"kind": "k", "text": "ab", "student": ["a", "b"], "teacher": ["ab"]}]


def test_the_end_of_a_turn_is_paired_and_special_tokens_without_a_role_are_alone():
    student, teacher = byte_level(), sentencepiece()
    found = roles(Translator(student, teacher))
    end = next(p for p in found["paired"] if p["student"]["id"] == student.convert_tokens_to_ids("<|im_end|>"))
    assert (end["role"], [t["token"] for t in end["teacher"]]) == ("end", ["<|im_end|>"])
    alone = found["unpaired"]["teacher"]
    assert [t["token"] for t in alone["tokens"]] == ["<unk>", "<s>", "</s>", "<|im_start|>"]
    assert alone["count"] == 4


def test_the_mapped_vocabulary_is_counted_against_either_side():
    translator = pieces()
    found = vocabulary(translator)
    # "x", and the end of a turn; each has 4 pieces beside 5 special tokens
    assert (found["shared"], found["student"], found["teacher"]) == (len(translator.pairs[0]), 9, 9)
    assert found["student_share"] == found["shared"] / 9


def test_bytes_that_are_no_character_are_read_as_escapes():
    assert readable("漢".encode()[:2]) == r"\xe6\xbc"


def test_texts_without_a_byte_are_refused():
    with pytest.raises(DataError, match="not one byte; give a file with text"):
        line_up(pieces(), [("k", "")])


def test_the_samples_are_of_one_to_two_kilobytes_and_varied():
    assert all(1000 <= len(text.encode()) <= 2000 for text in SAMPLES.values())
    assert {"\u200d", "\ufe0f", "\U0001f3fd", "\u0301"} <= set(SAMPLES["emoji"])
    assert {"，", "。", "《"} <= set(SAMPLES["chinese"])
    assert "\\frac{" in SAMPLES["maths"]
    assert "\n    " in SAMPLES["code"]
    assert "\t" in SAMPLES["code"]
    assert np.mean([ord(c) < 128 for c in SAMPLES["prose"]]) > 0.95
