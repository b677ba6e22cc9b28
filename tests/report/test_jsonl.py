import json
import math

import pytest

from tinyr2.core.errors import DataError, RunError
from tinyr2.report.jsonl import Journal, read_jsonl


def refuse(constant):
    raise AssertionError(f"{constant} is not strict JSON")


def test_rows_come_back_with_their_key_order_and_exact_floats(tmp_path):
    row = {"step": 1, "loss": 0.1 + 0.2, "tiny": 5e-324, "a": None, "nested": {"z": [1.5, True], "b": "数"}}
    journal = Journal(tmp_path / "m.jsonl")
    journal.append(row)
    assert (tmp_path / "m.jsonl").read_bytes().startswith(b'{"step": 1, "loss": 0.30000000000000004, "tiny": 5e-324,')
    assert read_jsonl(tmp_path / "m.jsonl") == [row]
    assert list(read_jsonl(tmp_path / "m.jsonl")[0]) == list(row)


def test_values_that_are_not_finite_are_strings_so_that_each_line_is_strict_json(tmp_path):
    journal = Journal(tmp_path / "m.jsonl")
    journal.append({"a": math.nan, "b": [math.inf, {"c": -math.inf}], "d": 1.0})
    line = (tmp_path / "m.jsonl").read_text()
    assert json.loads(line, parse_constant=refuse) == {"a": "NaN", "b": ["Infinity", {"c": "-Infinity"}], "d": 1.0}


def test_text_with_newlines_and_lone_surrogates_stays_one_line(tmp_path):
    journal = Journal(tmp_path / "m.jsonl")
    journal.append({"text": "a\nb\u2028c\ud800"})
    assert (tmp_path / "m.jsonl").read_bytes().count(b"\n") == 1
    assert read_jsonl(tmp_path / "m.jsonl") == [{"text": "a\nb\u2028c\ud800"}]


def test_truncation_to_a_cursor_gives_the_bytes_of_an_undisturbed_run(tmp_path):
    straight, resumed = Journal(tmp_path / "a.jsonl"), Journal(tmp_path / "b.jsonl")
    for step in range(5):
        straight.append({"step": step, "loss": 1 / (step + 3)})
    for step in range(3):
        resumed.append({"step": step, "loss": 1 / (step + 3)})
    cursor = resumed.cursor
    resumed.append({"step": 3, "loss": 99.0})
    resumed.close()
    resumed = Journal(tmp_path / "b.jsonl")
    resumed.truncate(cursor)
    assert resumed.cursor == cursor == (tmp_path / "b.jsonl").stat().st_size
    for step in (3, 4):
        resumed.append({"step": step, "loss": 1 / (step + 3)})
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert straight.cursor == resumed.cursor


def test_a_torn_last_line_is_not_read_and_not_written_onto(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "lo')
    assert read_jsonl(path) == [{"step": 1}]
    journal = Journal(path)
    assert journal.cursor == 12
    journal.append({"step": 2})
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]


def test_a_torn_tail_longer_than_a_read_block_is_cut_too(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"a": 1}\n' + b"\0" * 200_000)
    assert Journal(path).cursor == 9 and path.read_bytes() == b'{"a": 1}\n'
    path.write_bytes(b"\0" * 200_000)
    assert Journal(path).cursor == 0 and path.read_bytes() == b""


@pytest.mark.parametrize("line", [b'{"step": 2, "lo', b"[1, 2]", b'{"a": NaN}', b"", b"\xff\xfe"])
def test_a_bad_line_elsewhere_is_named_by_its_number(tmp_path, line):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"m\.jsonl, line 2: "):
        read_jsonl(path)


def test_a_cursor_that_does_not_fit_the_file_is_refused_and_nothing_is_cut(tmp_path):
    path = tmp_path / "m.jsonl"
    journal = Journal(path)
    journal.append({"step": 1})
    for cursor in (5, 500, -1):
        with pytest.raises(RunError, match="resume from an older checkpoint"):
            journal.truncate(cursor)
    assert read_jsonl(path) == [{"step": 1}]


def test_a_full_disk_leaves_whole_lines_only(tmp_path):
    path = tmp_path / "m.jsonl"
    journal = Journal(path)
    journal.append({"step": 1})
    real = journal._file

    class Full:
        def __init__(self):
            self.left = 5

        def write(self, data):
            if not self.left:
                raise OSError(28, "No space left on device")
            count, self.left = real.write(data[:self.left]), 0
            return count

        def truncate(self, size):
            return real.truncate(size)

    journal._file = Full()
    with pytest.raises(OSError, match="No space"):
        journal.append({"step": 2})
    journal._file = real
    journal.append({"step": 3})
    assert read_jsonl(path) == [{"step": 1}, {"step": 3}]


def test_a_missing_file_is_the_users_fault(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_jsonl(tmp_path / "none.jsonl")
