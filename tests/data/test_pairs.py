"""Pairs of answers: the layouts that are read, and what is said of rows that are none."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from tinyr2.core.errors import ConfigError, DataError
from tinyr2.core.types import Message
from tinyr2.data.pairs import Pair, PairsConfig, fingerprint, load_pairs, sides

ASK, FOUR, FIVE = ({"role": r, "content": c} for r, c in (("user", "2+2?"), ("assistant", "4"), ("assistant", "5")))
SYSTEM = {"role": "system", "content": "Be short."}


@pytest.fixture
def load(tmp_path):
    def read(*rows: dict, **more) -> list[Pair]:
        (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        return load_pairs(PairsConfig(path=str(tmp_path / "pairs.jsonl"), **more))
    return read


def turns(*given: dict) -> tuple[Message, ...]:
    return tuple(Message(t["role"], t["content"]) for t in given)


@pytest.mark.parametrize("row", [
    {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
    {"prompt": [ASK], "chosen": [FOUR], "rejected": [FIVE]},
    {"prompt": "2+2?", "chosen": [FOUR], "rejected": [FIVE]},
    {"chosen": [ASK, FOUR], "rejected": [ASK, FIVE]},
    {"prompt": "2+2?", "chosen": [ASK, FOUR], "rejected": [ASK, FIVE]},
    {"prompt": [ASK], "chosen": [ASK, FOUR], "rejected": [ASK, FIVE]},
    {"prompt": None, "chosen": [ASK, FOUR], "rejected": [ASK, FIVE]},
    {"chosen": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}], "rejected": [ASK, FIVE]},
], ids=["text", "turns", "mixed", "implicit", "text and whole", "turns and whole", "null", "sharegpt"])
def test_every_layout_gives_the_same_pair(row, load):
    (pair,) = load(row)
    assert pair.problem.messages == turns(ASK)
    assert (pair.chosen, pair.rejected, pair.margin) == (turns(FOUR), turns(FIVE), None)
    assert (pair.problem.id, pair.problem.task, pair.problem.completion) == ("pairs:0", "pairs", None)
    assert dict(pair.problem.columns) == {}


def test_an_implicit_prompt_is_all_turns_but_the_last_also_where_the_answers_begin_alike(load):
    more = {"role": "user", "content": "And 3+3?"}
    (pair,) = load({"chosen": [SYSTEM, ASK, FOUR, more, {"role": "assistant", "content": "It is 6"}],
                    "rejected": [SYSTEM, ASK, FOUR, more, {"role": "assistant", "content": "It is 7"}]})
    assert pair.problem.messages == turns(SYSTEM, ASK, FOUR, more)
    assert pair.chosen == (Message("assistant", "It is 6"),)


def test_margins_other_columns_and_a_system_turn_are_carried(load):
    pairs = load({"question": "2+2?", "chosen": "4", "rejected": "5", "score": 2, "source": "exam"},
                 {"question": "3+3?", "chosen": "6", "rejected": "7", "score": None, "source": "book"},
                 columns={"prompt": "question", "margin": "score"}, system="Be short.")
    assert [p.margin for p in pairs] == [2.0, None]
    assert [p.problem.messages[0] for p in pairs] == [*turns(SYSTEM, SYSTEM)]
    assert [p.problem.columns["source"] for p in pairs] == ["exam", "book"]
    assert all(p.problem.columns.keys() == {"source"} for p in pairs)


def test_a_parquet_file_gives_what_a_jsonl_file_gives(load, tmp_path):
    rows = [{"chosen": [ASK, FOUR], "rejected": [ASK, FIVE], "margin": 0.5}] * 2
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    assert load_pairs(PairsConfig(path=str(tmp_path / "pairs.parquet"))) == load(*rows)
    assert len(load(*rows, limit=1)) == 1


def test_a_pairs_sides_are_worked_problems_with_ids_of_their_own(load):
    chosen, rejected = sides(load({"prompt": "2+2?", "chosen": "4", "rejected": "5"}))
    assert (chosen.id, rejected.id) == ("pairs:0:chosen", "pairs:0:rejected")
    assert (chosen.completion, rejected.completion) == (turns(FOUR), turns(FIVE))
    assert chosen.messages == rejected.messages == turns(ASK)


def test_the_fingerprint_sees_either_answer_their_order_and_the_margin(load):
    row = {"prompt": "2+2?", "chosen": "4", "rejected": "5", "margin": 1.0}
    changes = ({}, {"chosen": "four"}, {"rejected": "six"}, {"chosen": "5", "rejected": "4"}, {"margin": 2.0},
               {"prompt": "2 + 2?"})
    assert len({fingerprint(load(row | change)) for change in changes}) == len(changes)
    assert fingerprint(load(row)) == fingerprint(load(row))


def test_equal_answers_are_left_out_and_counted(load):
    same = {"prompt": "1+1?", "chosen": "2", "rejected": "2"}
    with pytest.warns(UserWarning, match="2 of 3 pairs have equal answers and are left out"):
        pairs = load(same, {"prompt": "2+2?", "chosen": "4", "rejected": "5"}, same)
    assert [p.problem.id for p in pairs] == ["pairs:1"]
    with pytest.raises(DataError, match="chosen and rejected are equal in all 1 rows"):
        load(same)


@pytest.mark.parametrize(("row", "message"), [
    ({"prompt": "2+2?", "chosen": "4", "rejetced": "5"}, "line 1: no column 'rejected'; did you mean 'rejetced'"),
    ({"prompt": "2+2?", "completion": "4"}, "no column 'chosen'; it has 'prompt', 'completion'; .*columns: {chosen: "),
    ({"chosen": "2+2? 4", "rejected": "2+2? 5"}, "answers without a prompt; add a column `prompt`"),
    ({"prompt": "2+2?", "chosen": [FOUR, ASK], "rejected": [FIVE, ASK]}, "'chosen': the last turn is the user's"),
    ({"chosen": [ASK, FOUR], "rejected": [SYSTEM, ASK, FIVE]}, "part at turn 1 of 2 and 3; a pair shares all turns"),
    ({"chosen": [ASK, FOUR], "rejected": [ASK, FIVE, ASK, FOUR]}, "part at turn 2 of 2 and 4"),
    ({"prompt": "3+3?", "chosen": [ASK, FOUR], "rejected": [ASK, FIVE]}, "do not begin with the prompt"),
    ({"prompt": "2+2?", "chosen": "", "rejected": "5"}, "'chosen': the assistant turn is empty"),
    ({"prompt": "2+2?", "chosen": "4", "rejected": None}, "'rejected': text or turns needed, got None"),
    ({"prompt": [FOUR], "chosen": "4", "rejected": "5"}, "the prompt has no user turn"),
    ({"prompt": "2+2?", "chosen": "4", "rejected": "5", "margin": "big"}, "'margin': a margin is a finite number"),
    ({"prompt": "2+2?", "chosen": "4", "rejected": "5", "margin": float("nan")}, "finite number or null, got nan"),
])
def test_a_row_that_is_no_pair_is_refused_with_its_place_and_a_cure(row, message, load):
    with pytest.raises(DataError, match=message) as caught:
        load(row)
    assert "; " in str(caught.value) and "pairs.jsonl, line 1" in str(caught.value)


def test_a_config_that_fits_no_data_is_refused(load, tmp_path):
    with pytest.raises(ValueError, match="'choosen' is no column of ours; did you mean 'chosen'"):
        PairsConfig(path="x.jsonl", columns={"choosen": "good"})
    with pytest.raises(DataError, match="no column 'better'"):
        load({"prompt": "2+2?", "chosen": "4", "rejected": "5"}, columns={"chosen": "better"})
    with pytest.raises(DataError, match="the dataset is empty"):
        load()
    with pytest.raises(DataError, match="no such file; did you mean pairs.jsonl"):
        load_pairs(PairsConfig(path=str(tmp_path / "pair.jsonl")))
    with pytest.raises(ConfigError, match="a file has no splits"):
        load_pairs(PairsConfig(path=str(tmp_path / "pairs.jsonl"), split="test"))
