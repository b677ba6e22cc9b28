"""The whole way from a student's ids to a teacher's, and the spans between them."""

import random
from functools import cache

import numpy as np
import pytest
from tokenizers import AddedToken, normalizers

from tests.tokens import makers
from tinyr2.core.errors import ConfigError, DataError
from tinyr2.core.types import Message
from tinyr2.tokens.build import CHATML, train_tokenizer
from tinyr2.tokens.chat import end_of_turn, render_example, render_prompt
from tinyr2.tokens.spelling import Spelling
from tinyr2.tokens.translate import Answer, Translator

ASK = (Message("user", "the cat"),)
WORDS = ["the", "cat", "sat on", "hat?", "12", "345", "add", "café", "größer", "привет", "漢字", "\n\n", "é", "e\u0301",
         "o\u0308\u0323", "ﬁ", "Å", "½", "🙂", "👩\u200d👩\u200d👧", "<|im_end|>", "</s>", "<unk>"]
STRINGS = 10_000


@pytest.fixture(autouse=True, scope="module")
def _spell_each_once():
    """A tokenizer's parts are read once for the module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Spelling, "of", cache(Spelling.of))
        yield


@cache
def translator(student, teacher):
    return Translator(makers.tokenizer_of(student), makers.tokenizer_of(teacher))


def character(rng):
    """Any character of any plane but the surrogates; every fifth a combining mark."""
    if rng.random() < 0.2:
        return chr(rng.randrange(0x300, 0x370))
    code = rng.randrange(0x110000 - 0x800)
    return chr(code if code < 0xD800 else code + 0x800)


def sentence(rng):
    parts = [rng.choice(WORDS) if rng.random() < 0.7 else "".join(character(rng) for _ in range(rng.randrange(1, 4)))
             for _ in range(rng.randrange(6))]
    return rng.choice(["", " ", "  "]) * (rng.random() < 0.2) + rng.choice(["", " ", " "]).join(parts)


def written(tokenizer, rng):
    """What a student might write: the tokens of a sentence, or any tokens at all; cut off, or ended."""
    ids = tokenizer.encode(sentence(rng), add_special_tokens=False)
    if rng.random() < 0.4:  # another way to cut, and often no whole characters
        ids = ids[rng.randrange(2):][:rng.randrange(8)]
        ids += [rng.randrange(len(tokenizer)) for _ in range(rng.randrange(8))]
    return ids + [tokenizer.eos_token_id] * rng.randrange(2)


def check(t, ids, said, rng):
    """Everything that holds of any translation."""
    spans, ours, theirs = said.spans, said.spans.student, said.spans.teacher
    text, ends = t.student.spell(ids)
    assert said.bytes == len(text) and len(ours) == len(ids) and len(theirs) == len(said.response_ids)
    # In order, and one run on either side.
    for side in (ours, theirs):
        inside = side[side >= 0]
        assert (np.unique(inside) == np.arange(spans.count)).all() and (np.diff(inside) >= 0).all()
        first, last = (np.searchsorted(inside, np.arange(spans.count), where) for where in ("left", "right"))
        at = np.flatnonzero(side >= 0)
        assert (at[last - 1] - at[first] == last - first - 1).all() or said.unpaired
    # The same bytes on both sides of each span.
    starts = ends - np.diff(ends, prepend=0)
    spelled = [b""] * spans.count
    for i, k in zip(said.response_ids, theirs, strict=True):
        if k >= 0:
            spelled[k] += t.teacher.pieces[i]
    covered = np.zeros(len(text), dtype=bool)
    for k in range(spans.count):
        at = np.flatnonzero(ours == k)
        a, b = starts[at[0]], ends[at[-1]]
        assert text[a:b] == spelled[k] or (a == 0 and b" " + text[a:b] == spelled[k]), (ids, k)
        covered[a:b] = True
    # Complete: what no span covers is around bytes that the teacher cannot spell, and these no span covers.
    lost = np.zeros(len(text), dtype=bool)
    for a, b in said.lost:
        lost[a:b] = True
    assert not (covered & lost).any()
    edges = np.flatnonzero(np.diff(np.concatenate([[True], covered, [True]]).astype(int)))
    for a, b in zip(edges[::2], edges[1::2], strict=True):
        assert lost[a:b].any()
    if not said.lost:
        zero = int((ours < 0).sum())
        assert zero == said.unpaired or not text
        assert (theirs >= 0).all()
    # The log-ratios of the spans add up to that of the sequence.
    p, q = -rng.random(len(ids)), -rng.random(len(theirs))
    inside = np.zeros(spans.count)
    np.add.at(inside, theirs[theirs >= 0], q[theirs >= 0])
    np.subtract.at(inside, ours[ours >= 0], p[ours >= 0])
    whole = q.sum() - p.sum() - q[theirs < 0].sum() + p[ours < 0].sum()
    assert abs(inside.sum() - whole) < 1e-9


@pytest.mark.parametrize("teacher", makers.KINDS)
def test_any_text_is_tiled_on_both_sides(teacher):
    for student in makers.KINDS:
        t, rng = translator(student, teacher), random.Random(f"{student} {teacher}")
        tokenizer = makers.tokenizer_of(student)
        answers = [written(tokenizer, rng) for _ in range(STRINGS // len(makers.KINDS) ** 2 + 1)]
        said = t.translate_all([(ASK, Answer(ids)) for ids in answers])
        numbers = np.random.default_rng(0)
        for ids, one in zip(answers, said, strict=True):
            check(t, ids, one, numbers)
            if teacher in (*makers.REAL, "bytes", "sentencepiece") and "▁".encode() not in t.student.spell(ids)[0]:
                assert one.lost == ()


def thinker(opening="<think>", closing="</think>", *, special=True, opened="", size=330):
    """A byte-level tokenizer that thinks; its prompt ends with `opened`."""
    tokenizer = train_tokenizer(makers.CORPUS, vocab_size=size, chat_template=CHATML.replace(
        "assistant\\n' }}{% endif", f"assistant\\n{opened}' }}}}{{% endif"))
    tokenizer.add_tokens([AddedToken(opening, special=special), AddedToken(closing, special=special)])
    return tokenizer


def ids_of(tokenizer, *texts):
    return [i for text in texts for i in tokenizer.encode(text, add_special_tokens=False)]


def names(tokenizer, ids):
    return [tokenizer.decode([i], skip_special_tokens=False) for i in ids]


def told(spans):
    return spans.student.tolist(), spans.teacher.tolist()


def aligned(student, teacher, *texts, **settings):
    """(The teacher's tokens, the spans of the student's tokens, those of the teacher's, unpaired)."""
    said = Translator(student, teacher, **settings).translate(ASK, ids_of(student, *texts))
    return (names(teacher, said.response_ids), *told(said.spans), said.unpaired)


@pytest.mark.parametrize("kind", [*makers.KINDS, "first", "always", "never"])
def test_a_tokenizer_and_itself_are_one_to_one(kind):
    same = makers.sentencepiece(kind) if kind in ("first", "always", "never") else makers.tokenizer_of(kind)
    prompt, response = render_example(same, ASK, (Message("assistant", "the hat sat on the mat, 12"),))
    said = Translator(same, same).translate(ASK, response, prompt_ids=prompt)
    assert (said.prompt_ids, said.response_ids, said.lost) == (prompt, response, ())
    assert told(said.spans) == ([*range(len(response))], [*range(len(response))])
    assert said.spans.one_to_one.all()


def test_only_the_bytes_of_another_way_to_cut_count():
    student = makers.byte_level()
    ids = ids_of(student, *"the", " cat")
    said = Translator(student, makers.byte_level(300)).translate(ASK, ids)
    assert told(said.spans) == ([0, 0, 0, 1], [0, 1])


def test_numbers_that_one_side_writes_as_one_token_are_in_spans_on_both():
    joined, single = makers.of_pieces("345", "12", "+", "=", "3"), makers.of_pieces(*"12345+=")
    assert aligned(single, joined, "12+345=3") == (
        ["12", "+", "345", "=", "3"], [0, 0, 1, 2, 2, 2, 3, 4], [0, 1, 2, 3, 4], 0)
    assert aligned(joined, single, "12+345=3") == (
        list("12+345=3"), [0, 1, 2, 3, 4], [0, 0, 1, 2, 2, 2, 3, 4], 0)


def test_the_end_of_an_answer_pairs_with_the_teacher_s_and_a_cut_answer_has_none():
    student, teacher = makers.sentencepiece(), makers.byte_level()
    assert aligned(student, teacher, "the", "<|im_end|>") == (["the", "<|im_end|>"], [0, 1], [0, 1], 0)
    assert aligned(student, teacher, "the", "</s>") == (["the", "<|im_end|>"], [0, 1], [0, 1], 0)
    assert aligned(student, teacher, "the") == (["the"], [0], [0], 0)
    assert aligned(student, teacher, "<|im_end|>") == (["<|im_end|>"], [0], [0], 0)
    assert aligned(student, teacher) == ([], [], [], 0)


def test_padding_that_is_the_end_changes_nothing():
    student, teacher = makers.byte_level(326), makers.byte_level(327)
    teacher.pad_token = student.pad_token = "<|im_end|>"
    assert aligned(student, teacher, "the<|im_end|>") == (["the", "<|im_end|>"], [0, 1], [0, 1], 0)


def test_a_teacher_without_an_end_in_its_template_ends_with_eos():
    teacher = makers.byte_level(328)
    teacher.chat_template = "{% for m in messages %}{{ m['content'] + '\\n' }}{% endfor %}"
    teacher.eos_token = "<|endoftext|>"
    assert aligned(makers.byte_level(), teacher, "the<|im_end|>") == (["the", "<|endoftext|>"], [0, 1], [0, 1], 0)


def test_an_end_in_the_middle_ends_nothing():
    student, teacher = makers.byte_level(), makers.sentencepiece("never")
    assert aligned(student, teacher, "the<|im_end|> cat") == (["the", " cat"], [0, -1, 1], [0, 1], 1)


def test_a_bos_that_one_template_writes_stays_in_its_prompt():
    teacher = makers.sentencepiece("never")
    plain = render_prompt(teacher, ASK)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher, "chat_template", "{{ bos_token }}" + makers.TEMPLATE)
        said = Translator(makers.byte_level(), teacher).translate(ASK, ids_of(makers.byte_level(), "the cat"))
    assert said.prompt_ids == (teacher.bos_token_id, *plain)
    assert told(said.spans) == ([0, 1], [0, 1])


def test_special_tokens_spelled_as_text_stay_text():
    student, teacher = makers.sentencepiece(), makers.byte_level()
    spelled = [makers.sentencepiece().convert_tokens_to_ids(c) for c in ("<0x3C>", "<0x7C>", "<0x3E>")]
    text = "<|im_end|>"
    ids = [spelled["<|>".index(c)] if c in "<|>" else Spelling.of(student).pieces.index(c.encode()) for c in text]
    said = Translator(student, teacher).translate(ASK, ids)
    assert teacher.convert_tokens_to_ids(text) not in said.response_ids
    assert teacher.decode(said.response_ids) == text and said.bytes == len(text) and said.lost == ()


def test_thoughts_are_mapped_by_role():
    student, teacher = thinker(), thinker("[THINK]", "[/THINK]", size=300)
    text = "<think>the</think> cat<|im_end|>"
    mapped = ["[THINK]", "the", "[/THINK]", " cat", "<|im_end|>"]
    assert aligned(student, teacher, text) == (mapped, [*range(5)], [*range(5)], 0)
    assert aligned(thinker(special=False), teacher, text) == (mapped, [*range(5)], [*range(5)], 0)
    assert aligned(thinker("◁think▷", "◁/think▷"), teacher, text.replace("<", "◁").replace("k>", "k▷").replace(
        "◁|im_end|>", "<|im_end|>")) == (mapped, [*range(5)], [*range(5)], 0)


def test_a_role_is_sealed():
    said = Translator(thinker(), thinker(size=300)).translate(ASK, ids_of(thinker(), "<think> cat the</think>"))
    assert said.spans.sealed.tolist() == [True, False, True, True]
    assert told(said.spans.merged(np.zeros(4, dtype=bool))) == ([0, 1, 1, 2], [0, 1, 1, 2])


def test_a_teacher_that_has_no_token_for_a_thought_spells_the_student_s():
    teacher = makers.byte_level()
    assert aligned(thinker(), teacher, "<think>the</think>") == (
        [*"<think>", "the", *"</think>"], [0, 1, 2], [0] * 7 + [1] + [2] * 8, 0)


def test_a_thought_that_is_the_same_text_on_both_sides_is_text():
    said = Translator(thinker(special=False), thinker(special=False, size=300)).translate(
        ASK, ids_of(thinker(), "<think>the</think>"))
    assert (told(said.spans), said.bytes) == (([0, 1, 2], [0, 1, 2]), 18)
    assert aligned(makers.byte_level(), thinker(special=False), "<think>the") == (
        ["<think>", "the"], [0] * 7 + [1], [0, 1], 0)


def test_a_thought_that_the_teacher_s_prompt_has_opened_is_not_opened_again():
    student, teacher = thinker(), thinker("[THINK]", "[/THINK]", opened="[THINK]\\n")
    assert aligned(student, teacher, "<think>the</think>") == (["the", "[/THINK]"], [-1, 0, 1], [0, 1], 1)
    assert aligned(student, teacher, "<think>\nthe") == (["the"], [-1, -1, 0], [0], 2)
    assert aligned(student, teacher, "\n<think>\n\nthe") == (["\n", "the"], [-1, -1, -1, 0, 1], [0, 1], 3)
    assert aligned(makers.byte_level(), teacher, "<think>\nthe") == (["the"], [-1] * 8 + [0], [0], 8)
    assert aligned(student, teacher, "the") == (["the"], [0], [0], 0)


def test_a_thought_that_the_student_s_prompt_has_opened_is_opened_in_the_teacher_s():
    student, teacher = thinker(opened="<think>\\n"), thinker("[THINK]", "[/THINK]")
    plain = render_prompt(teacher, ASK)
    for prompt in (None, render_prompt(student, ASK)):
        said = Translator(student, teacher).translate(ASK, ids_of(student, "the</think>"), prompt_ids=prompt)
        assert said.prompt_ids == (*plain, *ids_of(teacher, "[THINK]\n"))
        assert told(said.spans) == ([0, 1], [0, 1])
    unopened = ids_of(student, "assistant\n")
    assert Translator(student, teacher).translate(ASK, [], prompt_ids=unopened).prompt_ids == plain


def test_where_both_prompts_open_a_thought_both_go_on():
    student, teacher = thinker(opened="<think>\\n"), thinker("[THINK]", "[/THINK]", opened="[THINK]")
    said = Translator(student, teacher).translate(ASK, ids_of(student, "the</think>"))
    assert (said.prompt_ids, told(said.spans)) == (render_prompt(teacher, ASK), ([0, 1], [0, 1]))


def test_other_special_tokens_are_counted_and_their_neighbors_aligned():
    student, teacher = makers.byte_level(), makers.sentencepiece("never")
    assert aligned(student, teacher, "the<|im_start|> cat<|endoftext|><|im_end|>") == (
        ["the", " cat", "<|im_end|>"], [0, -1, 1, -1, 2], [0, 1, 2], 2)
    assert aligned(student, teacher, "t", "<|im_start|>", "he") == (["the"], [0, -1, 0], [0], 1)


def test_a_role_can_be_named_and_be_text():
    student, teacher = makers.byte_level(), thinker("<a>", "</a>")
    named = {"think_open": ("(think)", "<a>"), "think_close": ("(done)", "</a>")}
    assert aligned(student, teacher, "(think) the(done)", roles=named) == (
        ["<a>", " the", "</a>"], [0] * 7 + [1] + [2] * 5, [0, 1, 2], 0)
    with pytest.raises(ConfigError, match="'thinking' is no role.*; take think_open or think_close"):
        aligned(student, teacher, "the", roles={"thinking": ("a", "b")})


def test_a_first_space_is_the_template_s_matter():
    student, teacher = makers.byte_level(), makers.sentencepiece("first")
    assert aligned(student, teacher, "the cat") == (["the", "cat"], [0, 1], [0, 1], 0)
    ids = Translator(student, teacher).translate(ASK, ids_of(student, "the cat")).response_ids
    assert teacher.convert_ids_to_tokens(ids) == ["the", "▁cat"]
    teacher = makers.sentencepiece("always")
    ids = Translator(student, teacher).translate(ASK, ids_of(student, "the cat")).response_ids
    assert teacher.convert_ids_to_tokens(ids) == ["▁the", "▁cat"]


def test_bytes_that_a_teacher_loses_are_named_and_their_neighbors_aligned():
    student, teacher = makers.byte_level(), makers.normalized(normalizers.NFKC)
    said = Translator(student, teacher).translate(ASK, ids_of(student, "the ½ cat", "<|im_end|>"))
    assert (said.lost, said.bytes) == (((4, 6),), 10)
    assert said.spans.student.tolist() == [0, 1, -1, -1, 2, 3]
    assert names(teacher, [i for i, k in zip(said.response_ids, said.spans.teacher, strict=True) if k >= 0]) == [
        "the", " ", " cat", "<|im_end|>"]


def test_a_character_that_the_student_has_cut_is_read_by_its_bytes():
    student, teacher = makers.byte_level(), makers.sentencepiece("never")
    ids = ids_of(student, "the🙂")[:-1]
    said = Translator(student, teacher).translate(ASK, ids)
    assert teacher.convert_ids_to_tokens(said.response_ids[-3:]) == ["<0xF0>", "<0x9F>", "<0x99>"]
    assert said.lost == () and said.spans.student.tolist()[-3:] == [1, 2, 3]


def test_answers_together_are_as_alone():
    rng = random.Random(0)
    for student, teacher in (("bytes", "sentencepiece"), ("wordpiece", "bytes"), ("unigram", "characters")):
        t = translator(student, teacher)
        answers = [written(makers.tokenizer_of(student), rng) for _ in range(20)]
        for ids, together in zip(answers, t.translate_all([(ASK, Answer(ids)) for ids in answers]), strict=True):
            alone = t.translate(ASK, ids)
            assert told(alone.spans) == told(together.spans) and alone.spans.count == together.spans.count
            assert (alone.response_ids, alone.lost, alone.bytes) == (
                together.response_ids, together.lost, together.bytes)
    assert t.translate_all([]) == []


def test_pairs_are_the_ids_of_the_same_bytes_and_roles():
    ours, theirs = makers.byte_level(), makers.sentencepiece()
    student, teacher = Translator(ours, theirs).pairs
    t = translator("bytes", "sentencepiece")
    assert len(set(student.tolist())) == len(set(teacher.tolist())) == len(student)
    pairs = dict(zip(student.tolist(), teacher.tolist(), strict=True))
    (end,) = (i for i in pairs if not t.student.pieces[i])
    assert (end, pairs.pop(end)) == (end_of_turn(ours), end_of_turn(theirs))
    assert all(t.student.pieces[i] == t.teacher.pieces[j] for i, j in pairs.items())
    assert pairs.keys() == {i for i, p in enumerate(t.student.pieces) if p and p in t.teacher.pieces}
    assert ids_of(theirs, "the cat")[1] == pairs[ids_of(ours, " cat")[0]]


def test_pairs_of_a_tokenizer_and_itself_are_every_text_token():
    student, teacher = translator("bytes", "bytes").pairs
    assert student.tolist() == teacher.tolist()
    assert sorted(student.tolist()) == [2, *range(3, len(makers.byte_level()))]


def test_a_teacher_without_a_template_or_against_the_roles_is_refused():
    teacher = makers.byte_level(329)
    teacher.chat_template = "{{ raise_exception('users only') }}"
    ids = ids_of(makers.byte_level(), "the")
    with pytest.raises(DataError, match="rejects the roles.*users only"):
        Translator(makers.byte_level(), teacher).translate(ASK, ids)
    teacher.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        Translator(makers.byte_level(), teacher).translate(ASK, ids)
