import random

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tinyr2.rollouts.stopping import StopStrings
from tinyr2.tokens.build import train_tokenizer

BYTES = train_tokenizer(["the cat sat on the mat", "12 cats and 345 mats", "the end. the end"] * 3, vocab_size=290)
LETTERS = train_tokenizer(["the cat sat on the mat"] * 3, vocab_size=40, alphabet="corpus")


def wrapped(model, decoder):
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def sentence_piece():
    """Spaces as ▁, unknown characters as byte tokens, the text's first space dropped."""
    vocab = {"▁a": 0, "b": 1, "▁": 2, "<0xE2>": 3, "<0x82>": 4, "<0xAC>": 5, "<0x41>": 6, "�": 7}
    return wrapped(models.BPE(vocab, []), decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]))


def word_piece():
    return wrapped(models.WordPiece({"ab": 0, "##c": 1, "b": 2}, unk_token="b"), decoders.WordPiece(cleanup=False))


def ids_of(tokenizer, *pieces):
    """Each piece tokenized by itself: tokens cut where the test says."""
    return [i for piece in pieces for i in tokenizer.encode(piece, add_special_tokens=False)]


def finishes_at(stop, ids):
    """How many tokens the answer has when it finishes; None if it does not."""
    return next((n for n in range(1, len(ids) + 1) if stop.finished(ids[:n])), None)


def test_a_string_that_spans_tokens_ends_the_answer_at_its_last_token():
    ids = ids_of(BYTES, "q", "x", "Q", "z", "q")
    assert len(ids) == 5
    assert finishes_at(StopStrings(BYTES, ["xQz"]), ids) == 4
    assert finishes_at(StopStrings(BYTES, ["xQzz"]), ids) is None


def test_a_token_may_carry_text_before_and_beyond_the_string():
    ids = ids_of(BYTES, "q", "the", "q")
    assert len(ids) == 3
    assert finishes_at(StopStrings(BYTES, ["h"]), ids) == 2
    assert finishes_at(StopStrings(BYTES, ["qt"]), ids) == 2
    assert finishes_at(StopStrings(BYTES, ["eq"]), ids) == 3


def test_a_character_of_several_byte_tokens_is_complete_with_its_last_byte():
    ids = ids_of(BYTES, "x", "😀", "€")
    assert len(ids) == 1 + 4 + 3
    assert finishes_at(StopStrings(BYTES, ["😀"]), ids) == 5
    assert finishes_at(StopStrings(BYTES, ["x😀€"]), ids) == 8
    assert finishes_at(StopStrings(BYTES, ["😁", "\ufffd"]), ids) is None


def test_whichever_string_comes_first_ends_the_answer():
    ids = ids_of(BYTES, "a long sentence before", "Q", "W", "Q", "Z")
    stop = StopStrings(BYTES, ["QZ", "a string longer than the other one", "W"])
    assert finishes_at(stop, ids) == len(ids) - 2


def test_text_of_the_prompt_does_not_count():
    prompt, response = ids_of(BYTES, "Q", "W"), ids_of(BYTES, "W", "Q", "Q", "W")
    stop = StopStrings(BYTES, ["QW"])
    assert finishes_at(stop, prompt) == 2
    assert finishes_at(stop, response) == 4


def test_a_special_token_counts_with_its_name():
    ids = [*ids_of(BYTES, "a"), BYTES.eos_token_id]
    assert finishes_at(StopStrings(BYTES, [BYTES.eos_token]), ids) == 2


def test_an_id_beyond_the_vocabulary_adds_no_text():
    first, last = ids_of(BYTES, "Q", "W")
    assert finishes_at(StopStrings(BYTES, ["QW"]), [first, 10**6, last]) == 3


@pytest.mark.parametrize(("strings", "ids", "expected"), [
    (["b ab"], [1, 0, 1], 3), (["a a"], [0, 0], 2), (["b "], [1, 2, 2], 2), (["€"], [1, 3, 4, 5], 4),
    (["€b"], [4, 5, 3, 4, 5, 1], 6), (["bA"], [1, 6], 2), (["\ufffd"], [3, 4, 7], 3)])
def test_sentence_piece_tokens_are_read_as_within_a_text(strings, ids, expected):
    stop = StopStrings(sentence_piece(), strings)
    assert finishes_at(stop, ids) == expected


def test_word_pieces_are_joined_and_words_parted():
    stop = StopStrings(word_piece(), ["abc b"])
    assert finishes_at(stop, [2, 0, 1, 2]) == 4
    assert finishes_at(stop, [0, 2, 1, 2]) is None


@pytest.mark.parametrize("tokenizer", [BYTES, LETTERS])
def test_any_answer_finishes_where_its_whole_text_first_contains_a_string(tokenizer):
    rng = random.Random(0)
    ended = 0
    for _ in range(300):
        ids = rng.choices(range(len(tokenizer)), k=40)
        texts = [tokenizer.decode(ids[:n], clean_up_tokenization_spaces=False) for n in range(len(ids) + 1)]
        start = rng.randrange(30)
        strings = [s for s in (texts[-1][start:start + rng.randint(1, 9)], "ca") if s and "\ufffd" not in s]
        expected = next((n for n, text in enumerate(texts) if any(s in text for s in strings)), None)
        assert finishes_at(StopStrings(tokenizer, strings), ids) == expected
        ended += expected is not None
    assert ended > 100


class Counting:
    def __init__(self, tokenizer):
        self.tokenizer, self.calls = tokenizer, 0

    def __getattr__(self, name):
        self.calls += 1
        return getattr(self.tokenizer, name)


def test_a_token_is_decoded_once_however_often_it_comes():
    tokenizer = Counting(BYTES)
    stop = StopStrings(tokenizer, ["never"])
    ids = ids_of(BYTES, "the cat")
    finishes_at(stop, ids * 3)
    met = tokenizer.calls
    assert 0 < met <= 3 * len(set(ids))
    finishes_at(stop, ids * 50)
    assert tokenizer.calls == met


class Reading(list):
    """Ids that note how far back they are read."""

    def __init__(self, ids):
        super().__init__(ids)
        self.read = set()

    def __getitem__(self, at):
        self.read.add(at % len(self))
        return super().__getitem__(at)


def test_no_more_tokens_are_read_than_the_longest_string_has_bytes():
    ids = Reading(ids_of(BYTES, *"qxqxqxqxqxqxqx"))
    assert not StopStrings(BYTES, ["x€", "zzz"]).finished(ids)
    assert ids.read == {10, 11, 12, 13}


def test_without_strings_nothing_is_read():
    tokenizer, ids = Counting(BYTES), Reading(ids_of(BYTES, "the cat"))
    assert not StopStrings(tokenizer, ()).finished(ids)
    assert (tokenizer.calls, ids.read) == (0, set())
