from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tinyr2.core.errors import DataError
from tinyr2.report.completions import Completion, read_completions, write_completions

FULL = Completion(step=3, problem_id="train:1", author="student", prompt="2+2?", completion="4\n", finish="stop",
                  reward=0.5, reward_parts={"exact_answer": 1.0, "format": None}, answer="4", tokens=["4", "\n"],
                  disagreement=[0.25, -1.5])
BARE = Completion(step=3, problem_id="train:2", author="teacher", prompt="", completion="", finish="length")


def test_completions_come_back_as_they_were_written(tmp_path):
    path = write_completions(tmp_path, 3, [FULL, BARE])
    assert path.name == "step-00000003.parquet"
    assert read_completions(tmp_path) == [FULL, BARE] == read_completions(path)


def test_missing_is_none_and_not_zero(tmp_path):
    write_completions(tmp_path, 3, [BARE])
    (row,) = pq.read_table(tmp_path / "step-00000003.parquet").to_pylist()
    assert (row["reward"], row["answer"], row["tokens"], row["disagreement"]) == (None, None, None, None)


def test_a_folder_is_read_in_the_order_of_its_steps_and_a_step_is_replaced_whole(tmp_path):
    for step in (10, 9, 100):
        write_completions(tmp_path, step, [replace(BARE, step=step), replace(BARE, step=step)])
    write_completions(tmp_path, 10, [replace(BARE, step=10, problem_id="new")])
    assert [row.step for row in read_completions(tmp_path)] == [9, 9, 10, 100, 100]
    assert [row.problem_id for row in read_completions(tmp_path) if row.step == 10] == ["new"]


def test_an_empty_step_is_an_empty_file(tmp_path):
    assert read_completions(write_completions(tmp_path, 1, [])) == []


def test_a_crash_while_writing_leaves_no_file_that_readers_take(tmp_path, monkeypatch):
    write_completions(tmp_path, 3, [FULL])

    def die(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", die)
    for step in (3, 4):
        with pytest.raises(KeyboardInterrupt):
            write_completions(tmp_path, step, [replace(BARE, step=step)])
    assert read_completions(tmp_path) == [FULL]


def test_text_that_utf8_cannot_hold_is_kept_as_its_escape(tmp_path):
    write_completions(tmp_path, 3, [replace(BARE, prompt="a\ud800b", reward_parts={"\ud800": 1.0})])
    (row,) = read_completions(tmp_path)
    assert (row.prompt, row.reward_parts) == ("a\\ud800b", {"\\ud800": 1.0})


def test_disagreement_needs_one_value_for_each_token():
    with pytest.raises(DataError, match="3 values, 2 tokens"):
        replace(FULL, disagreement=[0.0, 0.0, 0.0])


def test_a_damaged_or_foreign_file_is_named(tmp_path):
    (tmp_path / "step-00000001.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match=r"step-00000001\.parquet.*delete it"):
        read_completions(tmp_path)
    pq.write_table(pa.table({"x": [1]}), tmp_path / "step-00000001.parquet")
    with pytest.raises(DataError, match="has columns"):
        read_completions(tmp_path)
