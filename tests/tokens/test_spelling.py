import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers

from tests.tokens import makers
from tinyr2.core.errors import DataError
from tinyr2.tokens.spelling import Spelling

TEXT = "the cat sat, 12 cats"
BYTES, PREPEND, FIRST = (Spelling.of(t) for t in (
    makers.byte_level(), makers.sentencepiece(), makers.sentencepiece("first")))
GEMMA, UNIGRAM, WORDPIECE = (Spelling.of(t) for t in (
    makers.sentencepiece("never"), makers.unigram(), makers.wordpiece()))
LETTERS = Spelling.of(makers.characters())


@pytest.fixture(scope="module", params=makers.KINDS)
def known(request):
    """A tokenizer of each kind, and its spelling."""
    tokenizer = makers.tokenizer_of(request.param)
    return tokenizer, Spelling.of(tokenizer)


def names(spelling, encoded):
    return [spelling._source.id_to_token(i) for i in encoded.ids]


def told(spelling, text):
    encoded = spelling.encode(text.encode())
    return names(spelling, encoded), encoded.ends.tolist(), encoded.lost


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=40))
@pytest.mark.parametrize("spelling", [BYTES, PREPEND, GEMMA])
def test_any_bytes_round_trip(spelling, text):
    encoded = spelling.encode(text)
    if "▁".encode() in text:  # SentencePiece reads this letter as a space
        return
    again, ends = spelling.spell(encoded.ids)
    assert encoded.lost == () and again == text and ends.tolist() == encoded.ends.tolist()


@pytest.mark.parametrize("kind", ["bytes", "gpt2"])
def test_the_letter_of_a_byte_is_read_as_that_byte(kind):
    tokenizer, cut = makers.tokenizer_of(kind), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spelling, seen = Spelling.of(tokenizer), set()
    for code in {*range(0x800), *range(0x800, 0x110000, 0x40)} - {*range(0xD800, 0xE000)}:
        letters = "".join(word for word, _ in cut.pre_tokenize_str(chr(code)))
        for letter, byte in zip(letters, chr(code).encode(), strict=True):
            assert spelling.pieces[tokenizer.convert_tokens_to_ids(letter)] == bytes([byte])
            seen.add(byte)
    assert len(seen) == 243  # all that UTF-8 has


def test_ids_read_as_they_are_decoded(known):
    (tokenizer, spelling), rng = known, random.Random(0)
    for _ in range(300):
        ids = [rng.randrange(spelling.vocab) for _ in range(rng.randrange(6))]
        spelled, ends = spelling.spell(ids)
        decoded = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert spelled.decode(errors="replace") == decoded or "\ufffd" in decoded
        assert len(ends) == len(ids) and (len(ids) == 0 or ends[-1] == len(spelled))


def test_a_text_is_written_as_the_tokenizer_writes_it(known):
    tokenizer, spelling = known
    for text in (TEXT, " hat? the\n\n hat!", "café größer привет 漢字 🙂 e\u0301", ""):
        assert list(spelling.encode(text.encode()).ids) == tokenizer.encode(text, add_special_tokens=False)


def test_names_of_special_tokens_in_a_text_are_text(known):
    tokenizer, spelling = known
    special = [tokenizer.convert_ids_to_tokens(i) for i in spelling.special if i != tokenizer.unk_token_id]
    for name in special:
        encoded = spelling.encode(f"a {name}</s> {name}".encode())
        assert spelling.special.isdisjoint(set(encoded.ids) - {tokenizer.unk_token_id})


def test_a_vocabulary_that_looks_words_up_finds_no_special_token_by_its_name():
    tokenizer = makers.of_pieces(*"</s>ax")
    assert tokenizer.encode("a</s>") == [9, 2]
    assert told(Spelling.of(tokenizer), "a</s>") == (["a", "<", "/", "s", ">"], [1, 2, 3, 4, 5], ())


def test_a_prefix_space_is_no_text():
    assert told(PREPEND, "the cat") == (["▁the", "▁cat"], [3, 7], ())
    assert told(PREPEND, " the") == (["▁", "▁the"], [0, 4], ())
    assert told(FIRST, "the cat") == (["▁the", "▁cat"], [3, 7], ())
    assert told(GEMMA, " the") == (["▁the"], [4], ())


def test_a_space_that_metaspace_does_not_write_is_lost():
    assert told(FIRST, " the cat") == (["▁the", "▁cat"], [4, 8], ((0, 1),))


def test_what_goes_on_gets_no_prefix_space():
    for spelling in (PREPEND, FIRST):
        (encoded,) = spelling.encode_all([b" the cat"], opens=[False])
        assert (names(spelling, encoded), encoded.ends.tolist(), encoded.lost) == (["▁the", "▁cat"], [4, 8], ())


def test_the_first_word_of_a_byte_level_tokenizer_may_have_a_prefix_space():
    tokenizer = makers.byte_level(321)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    spelling = Spelling.of(tokenizer)
    assert told(spelling, "the cat") == (["Ġthe", "Ġcat"], [3, 7], ())
    assert told(spelling, " the cat") == (["Ġthe", "Ġcat"], [4, 8], ())
    assert spelling.spell(spelling.encode(b"the").ids)[0] == b" the" == tokenizer.decode(
        spelling.encode(b"the").ids).encode()


def test_a_character_that_no_token_holds_falls_back_to_its_bytes():
    assert told(PREPEND, "漢🙂") == (["▁漢", "<0xF0>", "<0x9F>", "<0x99>", "<0x82>"], [3, 4, 5, 6, 7], ())
    assert PREPEND.spell([PREPEND.encode("🙂".encode()).ids[1]])[0] == b"\xf0"


def test_bytes_that_are_no_character_become_tokens_of_one_byte():
    cut = "🙂".encode()[:3]
    for spelling in (BYTES, PREPEND, GEMMA):
        encoded = spelling.encode(b"the" + cut + b"cat\xff")
        assert encoded.lost == () and spelling.spell(encoded.ids)[0] == b"the" + cut + b"cat\xff"


def test_where_there_is_no_token_for_a_byte_it_is_lost():
    encoded = LETTERS.encode(b"the \xf0\x9fcat")
    assert names(LETTERS, encoded) == ["the", " ", "c", "at"]
    assert (encoded.ends.tolist(), encoded.lost) == ([3, 4, 7, 9], ((4, 6),))


def test_an_unknown_character_is_lost_and_its_neighbors_are_not():
    assert told(LETTERS, "the 🙂cat") == (["the", " ", "<unk>", "c", "at"], [3, 4, 8, 9, 11], ((4, 8),))
    assert told(UNIGRAM, "a🙂 a") == (["▁a", "<unk>", "▁a"], [1, 5, 7], ((1, 5),))


def test_wordpiece_spells_the_one_space_that_it_decodes():
    assert told(WORDPIECE, "the cat") == (["the", "cat"], [3, 7], ())
    assert told(WORDPIECE, "the  cat, 12") == (["the", "cat", ",", "12"], [3, 8, 9, 12], ((3, 4),))
    assert told(WORDPIECE, "the,cat ") == (["the", ",", "cat"], [3, 4, 7], ((4, 8),))


@pytest.mark.parametrize(("steps", "text", "lost"), [
    ((normalizers.NFC,), "the e\u0301 cat", ((4, 7),)),
    ((normalizers.NFKC,), "the ﬁ cat é", ((4, 7),)),
    ((normalizers.Lowercase,), "the Hat cat É", ((3, 7), (12, 14))),
    ((normalizers.NFD, normalizers.StripAccents), "the thé cat", ((3, 8),)),
    ((normalizers.Strip,), " the cat hat  ", ((0, 1), (12, 14))),
    ((normalizers.NFC,), "the é cat", ()),
])
def test_what_a_normalizer_changes_is_lost_and_the_rest_is_exact(steps, text, lost):
    spelling, raw = Spelling.of(makers.normalized(*steps)), text.encode()
    encoded = spelling.encode(raw)
    assert encoded.lost == lost
    starts = encoded.ends - np.diff(encoded.ends, prepend=0)
    exact = [i for i, (a, b) in enumerate(zip(starts, encoded.ends, strict=True))
             if not any(x < b and y > a or a == b == y for x, y in lost)]
    assert len(exact) >= 2
    for i in exact:
        assert spelling.pieces[encoded.ids[i]] == raw[starts[i]:encoded.ends[i]]


def test_an_added_token_that_is_not_special_is_text():
    tokenizer = makers.byte_level(322)
    tokenizer.add_tokens([AddedToken("<ü>", special=False)])
    spelling, i = Spelling.of(tokenizer), len(tokenizer) - 1
    assert spelling.pieces[i] == "<ü>".encode() and i not in spelling.special
    assert told(spelling, "the<ü>") == (["the", "<ü>"], [3, 7], ())


def test_special_tokens_and_ids_without_a_token_have_no_bytes():
    the = BYTES.encode(b"the").ids[0]
    text, ends = BYTES.spell([1, the, BYTES.vocab + 7, the])
    assert (text, ends.tolist()) == (b"thethe", [0, 3, 3, 6])
    assert BYTES.special == {0, 1, 2} and BYTES.pieces[:3] == (b"", b"", b"")


def test_where_ids_read_alike_the_one_that_is_written_stands_for_them():
    a = PREPEND.encode(b"hat").ids
    assert PREPEND.ids_of_bytes()[b"a"] == makers.sentencepiece().convert_tokens_to_ids("a") not in a
    assert PREPEND.pieces.index(b"a") == PREPEND.ids_of_bytes()[b"a"]


def test_the_tokenizer_itself_stays_as_it_was():
    tokenizer = makers.byte_level(323)
    before = tokenizer.backend_tokenizer.to_str()
    Spelling.of(tokenizer).encode(b"the <|im_end|>")
    assert tokenizer.backend_tokenizer.to_str() == before
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in tokenizer.encode("<|im_end|>")


def test_a_tokenizer_that_glues_its_tokens_otherwise_is_refused():
    tokenizer = makers.byte_level(324)
    tokenizer.backend_tokenizer.decoder = decoders.BPEDecoder(suffix="Ġ")
    with pytest.raises(DataError, match="cannot be recovered.*; take a tokenizer"):
        Spelling.of(tokenizer)


def test_a_tokenizer_that_does_not_write_back_what_it_reads_is_refused():
    tokenizer = makers.byte_level(325)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("a", "b")
    assert Spelling.of(tokenizer).encode(b"cat").lost == ((1, 2),)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex("."), "b")
    with pytest.raises(DataError, match="cannot round-trip.*; mend"):
        Spelling.of(tokenizer)


def test_a_slow_tokenizer_is_refused():
    class Slow:
        name_or_path, is_fast = "slow", False
    with pytest.raises(DataError, match="slow: a Slow has no tokenizer.json.*; convert it"):
        Spelling.of(Slow())
