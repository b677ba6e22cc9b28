import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config

from tinyr2.core.errors import ConfigError, DataError
from tinyr2.core.types import Message
from tinyr2.tokens.build import CHATML, train_tokenizer, trim_tokenizer
from tinyr2.tokens.chat import fingerprint, render_example, vocabulary_faults

SHARED = Path(os.environ.get("TINYR2_SHARED", Path(__file__).parents[3] / "shared")) / "tokenizers"
CORPUS = ["the cat sat on the mat, 12 cats and 345 mats", "a hat? the hat! the cat", "add 17 and 25: 42"] * 3
BYTES = train_tokenizer(CORPUS, vocab_size=300)
LETTERS = train_tokenizer(CORPUS, vocab_size=60, alphabet="corpus")
TURNS = (Message("system", "add"), Message("user", "the cat"))
ANSWER = (Message("assistant", "a hat"),)


def encoded(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def real(name):
    if not (SHARED / name).is_dir():
        pytest.skip(f"{SHARED} has no {name}")
    return AutoTokenizer.from_pretrained(SHARED / name)


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_any_text_round_trips_through_bytes(text):
    assert BYTES.decode(encoded(BYTES, text)) == text


@pytest.mark.parametrize("tokenizer", [BYTES, LETTERS])
def test_every_digit_is_a_token(tokenizer):
    assert tokenizer.convert_ids_to_tokens(encoded(tokenizer, "345")) == ["3", "4", "5"]
    assert not [t for t in tokenizer.get_vocab() if len(t) > 1 and any(c.isdigit() for c in t)]


def test_words_of_the_corpus_become_tokens():
    assert BYTES.tokenize("the cat") == ["the", "Ġcat"]
    assert LETTERS.tokenize("the cat") == ["the", " cat"]


def test_a_corpus_alphabet_has_no_symbol_that_the_corpus_lacks():
    alone = {t for t in LETTERS.get_vocab() if len(t) == 1}
    assert alone == set("".join(CORPUS))
    assert LETTERS.decode(encoded(LETTERS, CORPUS[0])) == CORPUS[0]
    assert LETTERS.convert_ids_to_tokens(encoded(LETTERS, "cZt")) == ["c", "<unk>", "t"]


def test_the_compact_template_costs_one_token_a_turn():
    prompt, response = render_example(LETTERS, TURNS, ANSWER)
    assert LETTERS.decode(prompt) == "<|system|>add<|user|>the cat<|assistant|>"
    assert LETTERS.decode(response) == "a hat<|end|>"
    assert response[-1] == LETTERS.eos_token_id != LETTERS.pad_token_id
    assert LETTERS.unk_token_id not in prompt + response


def test_bytes_come_with_chatml():
    prompt, response = render_example(BYTES, TURNS, ANSWER)
    assert BYTES.decode(prompt) == (
        "<|im_start|>system\nadd<|im_end|>\n<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n")
    assert BYTES.decode(response) == "a hat<|im_end|>"
    assert BYTES.convert_ids_to_tokens([0, 1, 2]) == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert (BYTES.pad_token_id, BYTES.eos_token_id) == (0, 2)


def test_a_template_of_one_s_own_brings_its_special_tokens_and_its_end():
    template = "{% for m in messages %}{{ '<|turn|>' + m['content'] + '<|stop|>' }}{% endfor %}"
    tokenizer = train_tokenizer(CORPUS, vocab_size=300, chat_template=template)
    assert tokenizer.eos_token == "<|stop|>"
    assert tokenizer.convert_tokens_to_ids(["<|turn|>", "<|stop|>"]) == [1, 2]


@pytest.mark.parametrize("alphabet", ["bytes", "corpus"])
def test_the_same_texts_give_the_same_tokenizer(alphabet):
    once = train_tokenizer(iter(CORPUS), vocab_size=290, alphabet=alphabet)
    assert fingerprint(once) == fingerprint(train_tokenizer(CORPUS, vocab_size=290, alphabet=alphabet))


@pytest.mark.parametrize("tokenizer", [BYTES, LETTERS])
@pytest.mark.parametrize("config", [None, Qwen3Config(), LlamaConfig()])
def test_a_saved_tokenizer_loads_the_same_beside_any_model_config(tokenizer, config, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    if config is not None:
        config.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert fingerprint(loaded) == fingerprint(tokenizer)
    assert render_example(loaded, TURNS, ANSWER) == render_example(tokenizer, TURNS, ANSWER)
    assert (loaded.eos_token_id, loaded.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


def test_vocab_size_is_kept_where_the_corpus_has_enough_to_merge():
    assert len(train_tokenizer(CORPUS, vocab_size=270)) == 270
    assert len(LETTERS) <= 60


@pytest.mark.parametrize(("settings_", "least"), [({"vocab_size": 100}, 259),
                                                  ({"vocab_size": 10, "alphabet": "corpus"}, 27)])
def test_a_size_below_the_alphabet_names_the_least_that_works(settings_, least):
    with pytest.raises(ConfigError, match=f"use at least {least}"):
        train_tokenizer(CORPUS, **settings_)
    assert len(train_tokenizer(CORPUS, **settings_ | {"vocab_size": least})) == least


def test_an_empty_corpus_is_refused():
    with pytest.raises(DataError, match="no text"):
        train_tokenizer(["", ""], vocab_size=300)


def test_a_template_with_letters_that_the_corpus_lacks_is_refused():
    with pytest.raises(DataError, match="characters that the corpus lacks"):
        train_tokenizer(["12"], vocab_size=60, alphabet="corpus", chat_template=CHATML)


@pytest.mark.parametrize("name", ["gpt2", "minimind"])
def test_a_trimmed_tokenizer_encodes_its_corpus_as_before(name):
    old = real(name)
    new, kept = trim_tokenizer(old, CORPUS, vocab_size=500)
    assert len(new) == len(kept) == 500
    for text in CORPUS:
        assert [kept[i] for i in encoded(new, text)] == encoded(old, text)
    assert new.convert_ids_to_tokens(list(range(500))) == old.convert_ids_to_tokens(kept)
    assert kept == sorted(kept)


@pytest.mark.parametrize("name", ["gpt2", "minimind"])
def test_a_trimmed_tokenizer_round_trips_any_text_and_keeps_special_tokens_and_template(name, tmp_path):
    old = real(name)
    new, kept = trim_tokenizer(old, CORPUS, vocab_size=320)
    text = "Zürich 你好 😀\x00\n\n  if x: 1999"
    assert new.decode(encoded(new, text)) == text
    assert new.special_tokens_map == old.special_tokens_map
    assert kept[new.eos_token_id] == old.eos_token_id
    assert [kept[i] for i in new.added_tokens_decoder] == sorted(old.added_tokens_decoder)
    (prompt, response), before = render_example(new, TURNS, ANSWER), render_example(old, TURNS, ANSWER)
    assert (new.decode(prompt), new.decode(response)) == tuple(map(old.decode, before))
    new.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert vocabulary_faults(new, loaded) == []
    assert fingerprint(new) == fingerprint(loaded)


def test_a_word_that_is_found_whole_survives_trimming_without_any_merge():
    state = json.loads(BYTES.backend_tokenizer.to_str())
    state["model"]["ignore_merges"] = True  # look a word up before merging it
    state["model"]["vocab"]["qqq"] = 300
    old = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))
    new, kept = trim_tokenizer(old, ["qqq"], vocab_size=262)
    assert new.tokenize("qqq") == ["qqq"]
    assert kept[encoded(new, "qqq")[0]] == 300


def test_trimming_keeps_the_most_used_tokens_first():
    tokenizer = train_tokenizer(["abcd", "wxyz"] * 3, vocab_size=265)  # 259, and ab, abc, abcd, wx, wxy, wxyz
    assert tokenizer.tokenize("abcd") + tokenizer.tokenize("wxyz") == ["abcd", "wxyz"]
    new, _ = trim_tokenizer(tokenizer, ["wxyz"] * 5 + ["abcd"], vocab_size=262)
    assert new.tokenize("wxyz") == ["wxyz"]
    assert new.tokenize("abcd") == ["a", "b", "c", "d"]


def test_trimming_renumbers_the_tokens_that_a_post_processor_adds():
    old = train_tokenizer(CORPUS, vocab_size=300)
    old.add_special_tokens({"bos_token": "<s>"})
    old.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 300)])
    assert old.encode("a")[0] == 300
    new, _ = trim_tokenizer(old, CORPUS, vocab_size=280)
    assert new.encode("a")[0] == new.bos_token_id == 279


def test_what_cannot_be_trimmed_is_refused():
    with pytest.raises(DataError, match="only a byte-level BPE"):
        trim_tokenizer(LETTERS, CORPUS, vocab_size=50)
    with pytest.raises(ConfigError, match="use at least 259"):
        trim_tokenizer(BYTES, CORPUS, vocab_size=258)
    with pytest.raises(DataError, match="no text to trim"):
        trim_tokenizer(BYTES, [""], vocab_size=290)
