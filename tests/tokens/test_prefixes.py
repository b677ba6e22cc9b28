"""A teacher's tokens as the student writes them, and what goes on after some of these."""

import numpy as np
import pytest

from tests.tokens.makers import byte_level, characters, of_pieces, real, sentencepiece, wordpiece
from tinyr2.tokens.prefixes import END, LOST, Prefixes
from tinyr2.tokens.spelling import Spelling

DIGITS = {b"1": 0, b"2": 1, b"3": 2, b"23": 3}
PIECES = [b"", b"1", b"12", b"123", b"2", b"1", b"4", b"14", b"142"]


def after(prefixes, *path):
    """{teacher's token: the student's next token} of those that the student writes with `path` first."""
    start, stop = prefixes.stretch(path)
    return {int(prefixes.order[p]): int(prefixes.tokens[prefixes.begins[p] + len(path)]) for p in range(start, stop)}


def test_tokens_go_on_where_the_student_would_have_written_the_same_so_far():
    prefixes = Prefixes(DIGITS, PIECES, {})
    assert prefixes.written == ((), (0,), (0, 1), (0, 3), (1,), (0,), (), (0, LOST), (0, LOST))
    assert prefixes.first.tolist() == [LOST, 0, 0, 0, 1, 0, LOST, 0, 0]
    assert after(prefixes) == {1: 0, 2: 0, 3: 0, 4: 1, 5: 0, 7: 0, 8: 0}
    assert after(prefixes, 0) == {1: END, 5: END, 2: 1, 3: 3, 7: LOST, 8: LOST}
    assert after(prefixes, 0, 1) == {2: END}  # 123 is 1 and 23 to the student, and no longer possible
    assert after(prefixes, 0, 3) == {3: END} and after(prefixes, 1) == {4: END}
    assert after(prefixes, 2) == after(prefixes, 0, 1, 2) == after(prefixes, 9) == {}


def test_a_role_is_its_counterpart_whatever_its_text():
    # "1" is the teacher's opening of a thought, which the student's token 7 stands for
    prefixes = Prefixes(DIGITS, [b"", b"1", b"12"], {0: 8, 1: 7})
    assert prefixes.written == ((8,), (7,), (0, 1))
    assert after(prefixes, 0) == {2: 1} and after(prefixes, 7) == {1: END} and after(prefixes, 8) == {0: END}


def test_nothing_in_common_is_nothing_to_go_on_with():
    prefixes = Prefixes({b"x": 0}, [b"", b"1"], {})
    assert prefixes.written == ((), ()) and prefixes.stretch(()) == (0, 0) and prefixes.stretch((0,)) == (0, 0)
    assert Prefixes({}, [], {}).stretch(()) == (0, 0)


@pytest.mark.parametrize("student", [byte_level, characters, sentencepiece, wordpiece])
def test_the_student_writes_as_its_tokenizer_does(student):
    ours, theirs = Spelling.of(student()), Spelling.of(byte_level(300))
    prefixes = Prefixes(ours.ids_of_bytes(), theirs.pieces, {}, ours)
    for piece, tokens in zip(theirs.pieces, prefixes.written, strict=True):
        spelled = b"".join(ours.pieces[i] for i in tokens if i != LOST)
        assert piece.startswith(spelled) and (spelled == piece) == (LOST not in tokens and (bool(tokens) or not piece))
        (encoded,) = ours.encode_all([piece], opens=[False])
        assert encoded.ids == tokens or b"".join(ours.pieces[i] for i in encoded.ids) != piece


def test_what_the_tokenizer_writes_otherwise_by_itself_is_written_by_the_longest_that_fits():
    ours = Spelling.of(wordpiece())  # a word is a piece with a space, and its end one without
    assert [ours.pieces[i] for i in ours.encode_all([b"s"], opens=[False])[0].ids] == [b" s"]
    written = Prefixes(ours.ids_of_bytes(), [b" cats", b" cat", b"s", "漢".encode()[:1]], {}, ours).written
    assert [[ours.pieces[i] for i in tokens] for tokens in written] == [[b" cats"], [b" cat"], [b"s"], []]


def test_merges_are_those_of_the_tokenizer_and_not_the_longest():
    # of "abc" Unigram takes the fewest pieces, a|bcd and not ab|c|d
    ours = Spelling.of(of_pieces("a", "b", "c", "d", "ab", "bcd"))
    assert Prefixes(ours.ids_of_bytes(), [b"abcd"], {}, ours).written == ((5, 10),)
    assert Prefixes(ours.ids_of_bytes(), [b"abcd"], {}).written == ((9, 7, 8),)


def test_a_single_byte_is_written_by_the_token_that_is_no_spelled_out_byte():
    ours = Spelling.of(sentencepiece("never"))
    comma, half = Prefixes(ours.ids_of_bytes(), [b",", b"\xe6"], {}, ours).written
    assert ours.name(comma[0]) == "," and ours._source.id_to_token(comma[0]) == ","
    assert ours._source.id_to_token(half[0]) == "<0xE6>"


def test_every_token_of_a_real_vocabulary_is_found_again_along_its_own_writing():
    ours, theirs = Spelling.of(byte_level()), Spelling.of(real("minimind"))
    prefixes = Prefixes(ours.ids_of_bytes(), theirs.pieces, {}, ours)
    text = [i for i, piece in enumerate(theirs.pieces) if piece]
    assert sorted(prefixes.order.tolist()) == text  # byte-level both: nothing is lost
    for i in text[::499]:
        for n in range(len(prefixes.written[i])):
            path = prefixes.written[i][:n]
            assert after(prefixes, *path)[i] == prefixes.written[i][n]
            start, stop = prefixes.stretch(path)
            same = [j for j in text if prefixes.written[j][:n] == path] if n else text
            assert sorted(prefixes.order[start:stop].tolist()) == same
    assert np.all(prefixes.first[text] == [prefixes.written[i][0] for i in text])
