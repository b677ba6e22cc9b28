import os

import pytest

from tinyr2.core.answers import Answers, key_of
from tinyr2.core.errors import DataError, RunError


def keep(path, **answers):
    journal = Answers(path)
    journal.add(answers, dict.fromkeys(answers, 3))
    return journal


def test_answers_are_found_again_by_key_and_by_the_next_process(tmp_path):
    journal = keep(tmp_path / "j", a=[1.5, None], b={"x": "ü"})
    journal.add({"c": 3}, {"c": 4})
    for one in (journal, Answers(tmp_path / "j")):
        assert (one["a"], one["b"], one["c"]) == ([1.5, None], {"x": "ü"}, 3)
        assert "a" in one and "z" not in one and (len(one), one.tokens) == (3, 10)


@pytest.mark.parametrize("cut", range(1, 20))
def test_a_line_that_a_kill_has_torn_is_dropped_and_the_next_follows_whole(tmp_path, cut):
    keep(tmp_path / "j", a=1, b=22222).close()
    data = (tmp_path / "j").read_bytes()
    (tmp_path / "j").write_bytes(data[:-cut])
    again = Answers(tmp_path / "j")
    assert "a" in again and "b" not in again
    again.add({"c": 3}, {"c": 1})
    third = Answers(tmp_path / "j")
    assert (third["a"], third["c"], len(third)) == (1, 3, 2)


def test_one_call_is_one_fsync(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    keep(tmp_path / "j", **{f"k{i}": i for i in range(50)})
    assert len(synced) == 1


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    journal = keep(tmp_path / "j", a=1)
    before = (tmp_path / "j").read_bytes()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        journal.add({"b": 2}, {"b": 1})
    assert (tmp_path / "j").read_bytes() == before and "b" not in journal


def test_who_the_answers_are_from_is_written_before_them(tmp_path):
    journal = Answers(tmp_path / "j")
    journal.describe({"model": "m"})
    journal.add({"a": 1}, {"a": 1})
    assert Answers(tmp_path / "j").about == {"model": "m"}
    with pytest.raises(AssertionError):
        journal.describe({"model": "n"})


def test_without_a_path_nothing_is_kept():
    journal = Answers(None)
    journal.add({"a": 1}, {"a": 1})
    assert "a" not in journal


@pytest.mark.parametrize("line", ["{", "[]", '{"key": "a"}', '{"key": "a", "tokens": "b", "answer": 1}'])
def test_a_line_that_is_no_answer_is_named(tmp_path, line):
    keep(tmp_path / "j", a=1).close()
    with open(tmp_path / "j", "a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match="j, line 2: no answer of a server"):
        Answers(tmp_path / "j")


def test_a_journal_without_its_folder_is_refused(tmp_path):
    with pytest.raises(RunError, match="is its folder there"):
        Answers(tmp_path / "nowhere" / "j")


def test_a_key_depends_on_every_part_and_on_its_place():
    keys = [key_of(*parts) for parts in [(1, 2), (2, 1), ((1, 2),), (1, 2, None), ("1", 2), (1.0, 2)]]
    assert len(set(keys)) == 6
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1})
