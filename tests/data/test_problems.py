import json
import os
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyr2.core.config import build
from tinyr2.core.errors import ConfigError, DataError
from tinyr2.core.types import Message, Problem
from tinyr2.data.countdown import Countdown, countdown
from tinyr2.data.problems import DataConfig, draw, fingerprint, load_problems

SHARED = Path(os.environ.get("TINYR2_SHARED", Path(__file__).parents[3] / "shared")) / "data"
USER, ANSWER = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Be brief."}


def written(tmp_path, *rows, name="sums.jsonl"):
    path = tmp_path / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def loaded(path, **settings_):
    return load_problems(DataConfig(path=str(path), **settings_))


def problem(i):
    return Problem(id=f"p:{i}", task="p", messages=(Message("user", str(i)),))


@pytest.mark.parametrize(("row", "turns", "completion"), [
    ({"prompt": "2+2?"}, [USER], None),
    ({"prompt": [SYSTEM, USER]}, [SYSTEM, USER], None),
    ({"prompt": "2+2?", "completion": "4"}, [USER], [ANSWER]),
    ({"prompt": [USER], "completion": [ANSWER]}, [USER], [ANSWER]),
    ({"prompt": "2+2?", "completion": None}, [USER], None),
    ({"messages": [SYSTEM, USER, ANSWER]}, [SYSTEM, USER], [ANSWER]),
    ({"messages": [USER, ANSWER, USER, ANSWER]}, [USER, ANSWER, USER], [ANSWER]),
    ({"messages": [USER, ANSWER, USER]}, [USER, ANSWER, USER], None),
    ({"messages": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}, [USER], [ANSWER]),
])
def test_every_layout_gives_the_same_turns(row, turns, completion, tmp_path):
    [read] = loaded(written(tmp_path, row))
    assert read.messages == tuple(Message(**turn) for turn in turns)
    assert read.completion == (None if completion is None else tuple(Message(**turn) for turn in completion))


def test_ids_count_rows_and_other_columns_are_kept(tmp_path):
    path = written(tmp_path, {"prompt": "a", "answer": 7, "level": 1}, "", {"prompt": "b", "solution": " x ", "n": [2]})
    first, second = loaded(path)
    assert (first.id, first.task, first.answer, first.columns) == ("sums:0", "sums", "7", {"level": 1})
    assert (second.id, second.answer, second.columns) == ("sums:1", "x", {"solution": " x ", "n": [2]})


def test_columns_are_renamed_and_the_answer_is_cut_from_the_solution(tmp_path):
    path = written(tmp_path, {"question": "2+2?", "answer": "2+2=4 #### no\n#### 4", "id": 9})
    [read] = loaded(path, columns={"prompt": "question", "completion": "answer"}, answer_after="####")
    assert read.completion == (Message("assistant", "2+2=4 #### no\n#### 4"),)
    assert (read.answer, read.columns) == ("4", {"id": 9})


def test_blank_answers_are_missing_answers(tmp_path):
    rows = loaded(written(tmp_path, *({"prompt": "a", "answer": a} for a in (None, " ", 0, "0"))))
    assert [p.answer for p in rows] == [None, None, "0", "0"]


def test_a_system_turn_of_the_config_comes_first(tmp_path):
    [read] = loaded(written(tmp_path, {"prompt": "2+2?"}), system="Be brief.")
    assert read.messages == (Message("system", "Be brief."), Message("user", "2+2?"))


def test_limit_takes_the_first_rows_and_reads_no_further(tmp_path):
    path = written(tmp_path, {"prompt": "a"}, {"prompt": "b"}, "{broken")
    assert [p.messages[0].content for p in loaded(path, limit=2)] == ["a", "b"]


def test_parquet_reads_as_jsonl_does(tmp_path):
    rows = [{"prompt": [USER], "completion": [ANSWER], "answer": "4", "level": i} for i in range(3)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "sums.parquet")
    assert loaded(tmp_path / "sums.parquet") == loaded(written(tmp_path, *rows))


def test_a_hub_dataset_is_asked_for_by_name_and_split(monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or [{"prompt": "a"}])
    [read] = loaded("openai/gsm8k", name="main", split="test")
    assert asked == [(("openai/gsm8k", "main"), {"split": "test"})]
    assert (read.id, read.task) == ("openai/gsm8k:test:0", "openai/gsm8k")


def test_a_hub_dataset_without_network_says_what_to_do(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"nobody/nothing: no hub dataset.*check the spelling and the network"):
        loaded("nobody/nothing")


@pytest.mark.parametrize(("line", "said"), [
    ('{"prompt": ', r"line 2: not valid JSON: .* \(column \d+\)"),
    ("[1]", "line 2: a list; write one JSON object per line"),
    ({"promt": "a"}, r"line 2: no column `prompt` and none `messages`; it has 'promt'; .*columns: \{prompt: promt\}"),
    ({"question": "a", "answer": "b"}, r"it has 'question', 'answer'; name yours with columns: \{prompt: question\}"),
    ({"instruction": "a", "output": "b"}, r"columns: \{prompt: instruction, completion: output\}"),
    ({"conversations": [USER]}, r"columns: \{messages: conversations\}"),
    ({}, "it has no columns"),
    ({"prompt": 3}, "line 2, column 'prompt': text or turns needed, got 3"),
    ({"prompt": None}, "text or turns needed, got None"),
    ({"messages": "hi"}, "turns needed, got 'hi'; turns are a list"),
    ({"messages": []}, r"turns needed, got \[\]"),
    ({"messages": [USER, "hi"]}, "turns needed"),
    ({"messages": [USER, {"role": "assistant"}]}, "turn 2: content must be text, got None"),
    ({"messages": [{"content": "a"}]}, "turn 1: role must be text, got None"),
    ({"prompt": " \n"}, "line 2, column 'prompt': the user turn is empty"),
    ({"prompt": "a", "completion": ""}, "column 'completion': the assistant turn is empty"),
    ({"prompt": [SYSTEM]}, r"line 2: the prompt has no user turn \(its roles: \['system'\]\)"),
    ({"messages": [ANSWER]}, r"no user turn \(its roles: \[\]\)"),
    ({"prompt": [USER, ANSWER]}, "ends with the assistant's turn.*the last turn must be the user's"),
    ({"prompt": "a", "completion": [USER]}, "a completion is one assistant turn"),
    ({"prompt": "a", "completion": [ANSWER, ANSWER]}, "a completion is one assistant turn"),
    ({"prompt": "a", "messages": [USER]}, "both `prompt` and `messages`"),
    ({"prompt": "a", "answer": ["b"]}, "column 'answer': an answer is text or a number"),
])
def test_a_faulty_row_is_named_by_file_and_line(line, said, tmp_path):
    path = written(tmp_path, {"prompt": "fine"}, line)
    with pytest.raises(DataError, match=said) as error:
        loaded(path)
    assert str(error.value).startswith(f"{path}, line 2")


def test_rows_of_a_parquet_file_are_named_by_their_id(tmp_path):
    table = pyarrow.Table.from_pylist([{"prompt": "a"}, {"prompt": ""}])
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet, row 1, column 'prompt': the user turn is empty"):
        loaded(tmp_path / "x.parquet")


@pytest.mark.parametrize(("settings_", "said"), [
    ({"columns": {"prompt": "promt"}}, r"no column 'promt' \(columns.prompt\); did you mean 'prompt'\? it has"),
    ({"answer_after": "####"}, "answer_after needs a column `answer` or `solution`"),
])
def test_a_setting_that_does_not_fit_the_rows_is_named(settings_, said, tmp_path):
    with pytest.raises(DataError, match=said):
        loaded(written(tmp_path, {"prompt": "a"}), **settings_)


def test_an_answer_without_the_marker_is_named(tmp_path):
    with pytest.raises(DataError, match="line 1, column 'answer': no '####' \\(answer_after\\) in '5'"):
        loaded(written(tmp_path, {"prompt": "a", "answer": "5"}), answer_after="####")


def test_two_system_turns_are_refused(tmp_path):
    with pytest.raises(DataError, match="a system turn of its own; leave `system` out"):
        loaded(written(tmp_path, {"prompt": [SYSTEM, USER]}), system="Be long.")


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_an_empty_dataset_is_refused(text, tmp_path):
    with pytest.raises(DataError, match="the dataset is empty"):
        loaded(written(tmp_path, text))


def test_a_missing_file_names_its_neighbor(tmp_path):
    written(tmp_path, {"prompt": "a"})
    with pytest.raises(DataError, match=r"summs\.jsonl: no such file; did you mean sums\.jsonl\? looked in "):
        loaded(tmp_path / "summs.jsonl")
    with pytest.raises(DataError, match="no such file; looked in"):
        loaded(tmp_path / "nowhere" / "x.parquet")


def test_files_of_another_kind_are_refused(tmp_path):
    for name in ("x.json", "x.csv"):
        with pytest.raises(DataError, match=r"a \.jsonl or \.parquet file, or a hub id"):
            loaded(written(tmp_path, "[]", name=name))
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match="not a readable parquet file"):
        loaded(tmp_path / "x.parquet")
    (tmp_path / "x.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(DataError, match=r"line 1: not UTF-8 \(byte 13\)"):
        loaded(tmp_path / "x.jsonl")


def test_a_file_has_no_split(tmp_path):
    with pytest.raises(ConfigError, match="a file has no splits"):
        loaded(written(tmp_path, {"prompt": "a"}), split="test")


def test_a_misspelt_column_of_ours_names_its_neighbor():
    with pytest.raises(ConfigError, match="'promt' is no column of ours; did you mean 'prompt'"):
        build(DataConfig, {"path": "x.jsonl", "columns": {"promt": "question"}}, "here")


def test_a_generated_task_stands_in_the_place_of_a_file():
    config = build(DataConfig, {"task": "countdown", "limit": 5, "seed": 3, "options": {"numbers": 4},
                                "split": "held_out", "system": "Be brief."}, "here")
    problems = load_problems(config)
    assert [p.id for p in problems] == [f"countdown:held_out:{i}" for i in range(5)]
    assert {p.task for p in problems} == {"countdown"}
    made = countdown(Countdown(numbers=4), "held_out", 5, 3)
    assert [p.messages for p in problems] == [(Message("system", "Be brief."), *p.messages) for p in made]
    assert [replace(p, id="", messages=()) for p in problems] == [replace(p, id="", messages=()) for p in made]
    assert (config.source, config.files) == ("countdown", [])


def test_a_task_without_a_limit_has_ten_thousand_problems():
    assert len(load_problems(DataConfig(task="signed_sums", options={"digits": 4}))) == 10_000


def test_a_path_is_its_own_source():
    config = DataConfig(path="x.jsonl")
    assert (config.source, config.files) == ("x.jsonl", ["x.jsonl"])


@pytest.mark.parametrize(("raw", "said"), [
    ({}, "data has either a path or a task; give one of the two"),
    ({"path": "x.jsonl", "task": "countdown"}, "data has either a path or a task; give one of the two"),
    ({"path": "x.jsonl", "seed": 1, "options": {"a": 1}}, "a path takes no seed and no options; leave it out"),
    ({"task": "countdown", "columns": {"prompt": "a"}}, "a task takes no columns; leave it out"),
    ({"task": "countdown", "name": "main", "answer_after": "#"}, "a task takes no name and no answer_after"),
    ({"task": "countdown", "split": "test"}, "split 'test': a task has the splits train and held_out"),
    ({"task": "countdwn"}, "'countdwn' is no task; did you mean 'countdown'"),
    ({"task": "countdown", "options": {"numbrs": 4}}, "numbrs: unknown key; did you mean 'numbers'"),
])
def test_a_path_and_a_task_do_not_mix(raw, said):
    with pytest.raises(ConfigError, match=said):
        build(DataConfig, raw, "here")


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 13), n=st.integers(1, 20), seed=st.integers(0, 99))
def test_consecutive_steps_tile_epochs_exactly(size, n, seed):
    problems = [problem(i) for i in range(size)]
    stream = [p.id for step in range(2 * size) for p in draw(problems, n, step, seed)]
    assert len(stream) == 2 * size * n
    for epoch in range(2 * n):
        assert sorted(stream[epoch * size:(epoch + 1) * size]) == sorted(p.id for p in problems)


def test_draws_depend_on_step_and_seed_alone():
    problems = [problem(i) for i in range(50)]
    assert draw(problems, 8, 5, 0) == draw(problems, 8, 5, 0)
    assert draw(problems, 50, 0, 0) != draw(problems, 50, 1, 0)
    assert draw(problems, 50, 0, 0) != draw(problems, 50, 0, 1)
    assert draw(problems, 8, 5, 0) == (draw(problems, 16, 2, 0) + draw(problems, 16, 3, 0))[8:16]


def test_fingerprint_sees_every_part(tmp_path):
    row = {"prompt": "a", "completion": "b", "answer": "c", "level": 1}
    prints = [fingerprint(loaded(written(tmp_path, row | change)))
              for change in ({}, {"prompt": "z"}, {"completion": "z"}, {"answer": "z"}, {"level": 2}, {})]
    assert prints[0] == prints[-1]
    assert len(set(prints)) == 5
    both = [problem(0), problem(1)]
    assert fingerprint(both) != fingerprint(both[::-1])


def test_gsm8k_loads_with_solutions_and_answers():
    path = SHARED / "gsm8k_test.jsonl"
    if not path.is_file():
        pytest.skip(f"no {path}")
    problems = loaded(path, columns={"prompt": "question", "completion": "answer"}, answer_after="####")
    assert len(problems) == 1319
    assert problems[0].messages[0].content.startswith("Janet\u2019s ducks lay 16 eggs per day.")
    assert problems[0].completion[0].content.endswith("#### 18")
    assert [p.answer for p in problems[:5]] == ["18", "3", "70000", "540", "20"]
    assert (problems[7].id, dict(problems[7].columns)) == ("gsm8k_test:7", {})


def test_a_file_of_several_tasks_says_which_row_is_of_which(tmp_path):
    path = written(tmp_path, {"prompt": "2+2?", "task": "sums"}, {"prompt": "1 2 = 3"}, {"prompt": "?", "task": 7})
    assert [(p.task, p.columns.get("task")) for p in loaded(path)] == [("sums", "sums"), ("sums", None), ("sums", 7)]
    other = written(tmp_path, {"prompt": "?", "task": "a"}, {"prompt": "?"}, name="x.jsonl")
    assert [p.task for p in loaded(other)] == ["a", "x"]
