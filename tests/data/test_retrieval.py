"""Passages by BM25: the formula with loops, order, files and their faults."""

import builtins
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from tinyr2.core.errors import ConfigError, DataError
from tinyr2.data.retrieval import Corpus, Passage, Retriever, mean_pooled, words
from tinyr2.tokens.build import train_tokenizer

TEXTS = ("the cat sat on the mat", "the dog sat", "a cat and a dog met a cat", "prime numbers: 2 3 5 7")


def corpus(*texts):
    return Corpus(texts=texts, ids=tuple(f"book:{i}" for i in range(len(texts))))


def bm25(query, texts, k1=1.5, b=0.75):
    """BM25 of Robertson and Zaragoza 2009 with Lucene's idf, word by word."""
    docs = [Counter(text.replace(":", "").split()) for text in texts]
    mean = sum(sum(d.values()) for d in docs) / len(docs)
    scores = []
    for d in docs:
        score = 0.0
        for w in query.split():
            n = sum(w in other for other in docs)
            idf = math.log(1 + (len(docs) - n + 0.5) / (n + 0.5))
            score += idf * d[w] / (d[w] + k1 * (1 - b + b * sum(d.values()) / mean))
        scores.append(score)
    return scores


@pytest.mark.parametrize("query", ["cat", "the cat", "dog sat", "a a prime", "cat cat dog 5 unknown"])
def test_scores_are_bm25s(query):
    expected = bm25(query, TEXTS)
    found = Retriever(corpus(*TEXTS)).top(query, 4)
    assert {p.id: p.score for p in found} == {
        f"book:{i}": pytest.approx(s, rel=1e-14) for i, s in enumerate(expected) if s > 0}
    assert [p.score for p in found] == sorted((p.score for p in found), reverse=True)


def test_a_hand_computed_score():
    # 4 passages of 6, 3, 8 and 6 words, mean 5.75; "dog" is in 2 of them, idf log(1 + 2.5 / 2.5) = log 2
    short = math.log(2) / (1 + 1.5 * (0.25 + 0.75 * 3 / 5.75))
    long = math.log(2) / (1 + 1.5 * (0.25 + 0.75 * 8 / 5.75))
    assert Retriever(corpus(*TEXTS)).top("Dog!", 3) == [
        Passage("the dog sat", pytest.approx(short), "book:1"),
        Passage("a cat and a dog met a cat", pytest.approx(long), "book:2")]


def test_equal_passages_stand_in_the_corpus_order():
    found = Retriever(corpus("b a", "x", "a b", "a c", "a b")).top("a b", 3)
    assert [p.id for p in found] == ["book:0", "book:2", "book:4"]
    assert len({p.score for p in found}) == 1


def test_what_shares_no_word_is_not_found_and_k_is_the_most():
    retriever = Retriever(corpus(*TEXTS))
    assert retriever.top("zebra", 3) == [] and retriever.top("", 3) == [] and retriever.top("?!", 3) == []
    assert retriever.texts("the cat", 1) == ["the cat sat on the mat"]
    assert len(retriever.top("the cat", 10)) == 3


def test_words_are_of_any_script_and_digits_count():
    assert words("Straße_7 naïve, 3.5 ÉTÉ") == ["strasse", "7", "naïve", "3", "5", "été"]
    assert words("学习 deep学習です") == ["学", "习", "deep", "学", "習", "で", "す"]


def test_paragraphs_of_a_text_file_are_passages(tmp_path):
    (tmp_path / "notes.txt").write_text("\ufeffone\ntwo\n\n \n three \n\n\n", encoding="utf-8")
    found = Corpus.read(str(tmp_path / "notes.txt"))
    assert found == Corpus(texts=("one\ntwo", "three"), ids=("notes:0", "notes:1"))


def test_rows_bring_their_text_and_may_bring_an_id(tmp_path):
    rows = [{"text": " one "}, {"text": "two", "id": 17}]
    (tmp_path / "notes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert Corpus.read(str(tmp_path / "notes.jsonl")) == Corpus(texts=("one", "two"), ids=("notes:0", "17"))


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.txt", b"", "the corpus is empty; it needs at least one passage"),
    ("a.txt", b"x\xff", r"not UTF-8 \(byte 2\)"),
    ("a.txt", None, "cannot be read: No such file or directory; looked in"),
    ("a.md", b"x", "convert it to one of them"),
    ("a.jsonl", b'{"text": "x"}\n{"body": "y"}', "line 2: no text in the column text, got None; the row has 'body'"),
    ("a.jsonl", b'{"text": " "}', "line 1: no text in the column text"),
    ("a.jsonl", b'{"text"', "line 1: not valid JSON")])
def test_a_corpus_that_cannot_be_read_says_where_and_why(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        Corpus.read(str(tmp_path / name))


def test_a_corpus_without_words_is_refused():
    with pytest.raises(DataError, match="no word to be found by"):
        Retriever(corpus("…", "--"))


def test_without_the_package_the_cure_is_named(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **more):
        if name == "bm25s":
            raise ImportError(name)
        return real(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ConfigError, match=r"pip install tinyr2\[retrieval\]"):
        Retriever(corpus("a"))


def test_the_fingerprint_knows_texts_ids_and_their_order():
    found = {c.fingerprint for c in (corpus("a", "b"), corpus("b", "a"), corpus("ab", ""),
                                     Corpus(texts=("a", "b"), ids=("x", "y")))}
    assert len(found) == 4 and corpus("a", "b").fingerprint in found


def letters(texts):
    """(n, 26): how often each letter stands in a text."""
    return np.array([[text.count(chr(97 + i)) for i in range(26)] for text in texts], dtype=float)


def test_a_hybrid_score_is_the_weighted_mean_of_cosine_and_of_bm25_over_its_best():
    texts = ("ab", "a b", "abc")
    lexical = bm25("a b", texts)
    cosine = [1.0, 1.0, 2 / math.sqrt(6)]
    found = Retriever(corpus(*texts), embed=letters, dense_weight=0.25).top("a b", 3)
    assert [p.id for p in found] == ["book:1", "book:0", "book:2"]
    assert [p.score for p in found] == pytest.approx([0.25 * cosine[i] + 0.75 * lexical[i] / max(lexical)
                                                      for i in (1, 0, 2)])


def test_hybrid_retrieval_finds_what_shares_no_word():
    found = Retriever(corpus("ab", "zz"), embed=letters).top("b a", 2)
    assert [(p.text, p.score) for p in found] == [("ab", pytest.approx(0.5))]


def test_a_models_embedding_is_the_mean_of_its_states_whatever_stands_beside_it(tmp_path):
    tokenizer = train_tokenizer(["the cat sat on the mat"], vocab_size=280)
    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=300, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                                 intermediate_size=16, max_position_embeddings=16)).eval()
    tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    embed = mean_pooled(str(tmp_path), torch.device("cpu"))
    found = embed(["cat", "the cat sat on the mat", "the dog " * 20])
    for text, vector in zip(["cat", "the cat sat on the mat", "the dog " * 20], found, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"][:16]])
        np.testing.assert_allclose(vector, model(ids).last_hidden_state[0].mean(0).detach().numpy(), atol=1e-6)


def test_a_folder_without_a_model_cannot_embed(tmp_path):
    with pytest.raises(DataError, match="no model to embed with"):
        mean_pooled(str(tmp_path), torch.device("cpu"))
