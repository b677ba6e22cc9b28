"""Data stages: problems of several sources in one file."""

import io
from pathlib import Path

import pytest

from tinyr2.core.config import build
from tinyr2.core.errors import ConfigError, RunError
from tinyr2.data.problems import DataConfig, load_problems
from tinyr2.recipes.mix import MixConfig, mix
from tinyr2.report.console import Console

SUMS = {"task": "signed_sums", "limit": 6, "options": {"terms": 2, "digits": 2}}
COUNTDOWN = {"task": "countdown", "limit": 4}


def go(folder: Path, *, overwrite: bool = False, **changes) -> list:
    raw = {"sources": [SUMS, COUNTDOWN], "output_dir": str(folder)} | changes
    result = mix(build(MixConfig, raw, "test"), Console(plain=True, stream=io.StringIO()), overwrite=overwrite)
    problems = load_problems(DataConfig(path=result["data"]))
    assert result["problems"] == len(problems)
    return problems


def contents(problems) -> list[tuple]:
    return [(p.messages, p.completion, p.answer) for p in problems]


def test_rows_are_those_of_the_sources_one_after_the_other_with_solutions_and_columns(tmp_path):
    sources = [p for raw in (SUMS, COUNTDOWN) for p in load_problems(DataConfig(**raw))]
    found = go(tmp_path)
    assert contents(found) == contents(sources)
    assert found[-1].columns["numbers"] == sources[-1].columns["numbers"]


def test_solutions_are_left_out_where_none_are_wanted(tmp_path):
    assert {p.completion for p in go(tmp_path, solutions=False)} == {None}


def test_a_seed_shuffles_all_sources_into_one_order(tmp_path):
    plain, first, second = (go(tmp_path / str(seed), shuffle=seed) for seed in (None, 0, 1))
    assert contents(first) != contents(plain) != contents(second) != contents(first)
    assert sorted(map(str, contents(first))) == sorted(map(str, contents(plain)))


def test_one_source_needs_no_list_and_none_is_refused(tmp_path):
    assert len(go(tmp_path, sources=SUMS)) == 6
    with pytest.raises(ConfigError, match="sources"):
        go(tmp_path / "x", sources=[])


def test_a_file_that_is_there_is_replaced_only_when_asked_for(tmp_path):
    go(tmp_path)
    with pytest.raises(RunError, match="already there; --overwrite"):
        go(tmp_path, sources=SUMS)
    assert len(go(tmp_path, sources=SUMS, overwrite=True)) == 6
