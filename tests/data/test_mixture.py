"""Mixing sources: exact shares after any number of steps, every problem once an epoch, and long rows dropped whole."""

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyr2.core.config import build
from tinyr2.core.errors import ConfigError, DataError
from tinyr2.core.types import Message, Problem
from tinyr2.data.mixture import Mixture, MixtureConfig, drop_long, load_mixture, source_of, turns
from tinyr2.tokens.build import train_tokenizer
from tinyr2.tokens.chat import render_example

TOKENIZER = train_tokenizer(["0123456789", "ab"], vocab_size=20, alphabet="corpus")


def problem(name: str, i: int, completion: str = "a") -> Problem:
    return Problem(id=f"{name}/{i}", task=name, messages=(Message("user", "1"),),
                   completion=(Message("assistant", completion),))


def mixture(shares: dict[str, int], sizes: dict[str, int]) -> Mixture:
    return Mixture.of([problem(name, i) for name, size in sizes.items() for i in range(size)], shares)


# --- the ratio


def test_a_round_of_one_to_four_spreads_the_turns():
    assert Counter(turns({"long": 1, "short": 4})) == {"long": 1, "short": 4}
    assert turns({"a": 2, "b": 2}) == ("a", "b", "a", "b")
    assert turns({"a": 3}) == ("a", "a", "a")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=5))
def test_after_any_turn_each_source_has_its_quota_rounded_down_or_up(shares):
    named = {str(i): share for i, share in enumerate(shares)}
    order, total = turns(named), sum(shares)
    for t in range(total + 1):
        had = Counter(order[:t])
        assert all(t * share // total <= had[name] <= -(-t * share // total) for name, share in named.items())


@pytest.mark.parametrize("n", [1, 3, 7, 16])
def test_the_remainder_is_carried_over_steps(n):
    mixed, seen = mixture({"long": 1, "short": 4}, {"long": 3, "short": 50}), Counter()
    for step in range(12):
        dealt = mixed.deal(n, step, seed=0)
        assert len(dealt) == n
        seen.update(map(source_of, dealt))
        assert abs(seen["long"] - (step + 1) * n / 5) < 1
    if 12 * n % 5 == 0:
        assert seen["short"] == 4 * seen["long"]


def test_every_source_comes_epoch_by_epoch_whatever_the_steps_are():
    mixed = mixture({"long": 1, "short": 2}, {"long": 4, "short": 5})
    stream = mixed.deal(60, 0, seed=3)
    assert [p for step in range(12) for p in mixed.deal(5, step, seed=3)] == stream
    for name, size in (("long", 4), ("short", 5)):
        own = [p.id for p in stream if source_of(p) == name]
        epochs = [own[i:i + size] for i in range(0, len(own), size)]
        assert all(len(set(epoch)) == len(epoch) for epoch in epochs) and epochs[0] != epochs[1]
    assert mixed.deal(5, 7, seed=4) != mixed.deal(5, 7, seed=3)


# --- the rows


def test_long_rows_are_dropped_whole_and_counted_by_source():
    rows = [problem("long", i, "a" * length) for i, length in enumerate((2, 9, 5, 30))]
    rows += [problem("short", i, "b" * i) for i in (1, 2)]
    assert len(render_example(TOKENIZER, rows[2].messages, rows[2].completion)[1]) == 6  # and the end
    kept, dropped = drop_long(rows, TOKENIZER, 6)
    assert kept == [rows[0], rows[2], *rows[4:]] and dropped == {"long": 2, "short": 0}
    assert drop_long(rows, TOKENIZER, None) == (rows, {"long": 0, "short": 0})
    prompt = len(render_example(TOKENIZER, rows[0].messages, rows[0].completion)[0])
    assert drop_long(rows, TOKENIZER, None, context=prompt + 10)[1] == {"long": 1, "short": 0}


def test_a_source_of_which_nothing_is_left_is_named():
    rows = [problem("long", i, "a" * 9) for i in range(3)] + [problem("short", 0)]
    with pytest.raises(DataError, match=r"mixture.sources.long: each of its 3 rows is longer than 4 tokens"):
        drop_long(rows, TOKENIZER, 4)


def test_rows_without_a_completion_or_that_no_template_writes_are_left_to_the_checks():
    bare = Problem(id="long/0", task="t", messages=(Message("user", "1"),))
    odd = Problem(id="long/1", task="t", messages=(Message("nobody", "1"),), completion=(Message("assistant", "a"),))
    assert drop_long([bare, odd], TOKENIZER, 1)[0] == [bare, odd]


def test_problems_carry_their_source_so_that_files_of_one_name_stay_apart(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data.jsonl").write_text(json.dumps({"prompt": name, "completion": "x"}) + "\n")
    config = MixtureConfig(sources={name: {"path": str(tmp_path / name / "data.jsonl")} for name in ("one", "two")})
    loaded = load_mixture(config)
    assert [(p.id, source_of(p), p.messages[0].content) for p in loaded] == [
        ("one/data:0", "one", "one"), ("two/data:0", "two", "two")]
    assert config.files == [str(tmp_path / name / "data.jsonl") for name in ("one", "two")]


# --- the config


SOURCES = {"long": {"path": "l.jsonl"}, "short": {"path": "s.jsonl"}}


def test_two_sources_are_mixed_one_to_four_unless_told_otherwise():
    assert MixtureConfig(sources=SOURCES).shares == {"long": 1, "short": 4}
    assert MixtureConfig(sources=SOURCES, ratio={"long": 3, "short": 2}).shares == {"long": 3, "short": 2}
    assert MixtureConfig(sources={"long": SOURCES["long"]}).shares == {"long": 1}


@pytest.mark.parametrize(("raw", "message"), [
    ({"sources": {}}, "sources: at least 1"),
    ({"sources": SOURCES | {"third": {"path": "t.jsonl"}}}, "ratio: 3 sources have no usual one"),
    ({"sources": SOURCES, "ratio": {"long": 1, "shrt": 4}}, "give a whole number to each of long, short"),
    ({"sources": SOURCES, "ratio": {"long": 1}}, "ratio: short has no place in it"),
    ({"sources": SOURCES, "ratio": {"long": 1, "short": 0}}, "a whole number of 1 or more"),
    ({"sources": SOURCES, "ratio": {"long": 0.2, "short": 0.8}}, "ratio.long"),
    ({"sources": {"a/b": {"path": "l.jsonl"}}}, "take a name without one"),
    ({"sources": {"long": {"pth": "l.jsonl"}}}, "sources.long.pth: unknown key; did you mean 'path'"),
    ({"sources": SOURCES, "max_completion_length": 0}, "max_completion_length"),
])
def test_a_mixture_that_cannot_be_made_is_refused(raw, message):
    with pytest.raises(ConfigError, match=message):
        build(MixtureConfig, raw, "test")
