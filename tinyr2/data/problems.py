"""Problems from files, hub datasets and generated tasks, and which of them a step gets.

In: a `DataConfig` naming a JSONL file, a parquet file or a hub dataset in one of TRL's layouts, or a task that is
generated. Out: `Problem`s with raw chat turns; a DataError names the file, the line and the cure. `draw` deals them
out, epoch after epoch.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b
from itertools import islice
from typing import Any, TypeVar

from pydantic import Field, field_validator, model_validator

from tinyr2.core.config import Config, nearest
from tinyr2.core.errors import DataError
from tinyr2.core.rng import permutation
from tinyr2.core.types import Message, Problem
from tinyr2.data.generate import SPLITS, check_task, generate
from tinyr2.data.rows import Row, open_rows
from tinyr2.data.turns import known_columns, listed, turns, with_system

OURS = ("prompt", "completion", "messages", "answer", "solution")
GENERATED = 10_000  # problems of a generated task where the config has no limit
T = TypeVar("T")


class DataConfig(Config):
    """Which rows, and what their columns mean; or which generated task.

    GSM8K: path: openai/gsm8k, name: main, columns: {prompt: question, completion: answer}, answer_after: "####".
    Countdown: task: countdown, limit: 2000, options: {numbers: 4}; and to measure by, split: held_out.
    """

    path: str | None = None  # a .jsonl or .parquet file, or a hub id
    task: str | None = None  # in its place: signed_sums, countdown or reasoning_gym/<name>
    seed: int = 0  # of a task
    options: dict[str, Any] = {}  # of a task: how hard it is
    name: str | None = None  # a hub dataset's configuration
    split: str = "train"  # a hub dataset's split; a task has train and held_out, which share no problem
    limit: int | None = Field(None, ge=1)  # the first rows only; of a task, how many there are (10,000 if null)
    columns: dict[str, str] = {}  # ours -> the data's
    answer_after: str | None = Field(None, min_length=1)  # the gold answer follows this marker in the answer column
    system: str | None = Field(None, min_length=1)  # a system turn put before every prompt

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, columns: dict[str, str]) -> dict[str, str]:
        return known_columns(columns, OURS)

    @model_validator(mode="after")
    def _one_source(self) -> "DataConfig":
        if (self.path is None) == (self.task is None):
            raise ValueError("data has either a path or a task; give one of the two")
        if self.task is None:
            foreign = [k for k in ("seed", "options") if getattr(self, k) != type(self).model_fields[k].default]
            if foreign:
                raise ValueError(f"a path takes no {' and no '.join(foreign)}; leave it out, or give a task")
            return self
        foreign = [k for k in ("name", "columns", "answer_after") if getattr(self, k)]
        if foreign:
            raise ValueError(f"a task takes no {' and no '.join(foreign)}; leave it out, or give a path")
        if self.split not in SPLITS:
            raise ValueError(f"split {self.split!r}: a task has the splits {' and '.join(SPLITS)}; take one of them")
        check_task(self.task, self.options)
        return self

    @property
    def source(self) -> str:
        """The path, or the task's name: what messages call it."""
        return self.path or self.task

    @property
    def files(self) -> list[str]:
        """What is read: the path, or nothing where the problems are generated."""
        return [] if self.path is None else [self.path]


def load_problems(config: DataConfig) -> list[Problem]:
    """Every row as a Problem, in the data's order; the id is `<file stem or hub id:split>:<row>`, counted from 0.

    Those of a task have ids `<task>:<split>:<number>` and follow from split, options and seed; a longer limit adds to
    the end. ConfigError where the task has fewer than the limit.

    Layouts: `prompt`; `prompt` and `completion` (text, which becomes a user or assistant turn, or turns); `messages`,
    whose last turn, if an assistant's, is the completion. `answer`, or else `solution`, is the gold answer; a blank
    one is None. All other columns go to `Problem.columns`. DataError: missing file, malformed line, missing column,
    wrong type, empty content, a prompt that does not end with a user turn, no rows. A column `task` names the row's
    task; else the file does.
    """
    if config.task is not None:
        return _generated(config)
    name, rows = open_rows(config.path, config.name, config.split)
    task = name.removesuffix(f":{config.split}")
    problems = [_problem(config, row, where, f"{name}:{i}", task)
                for i, (where, row) in enumerate(islice(rows, config.limit))]
    if not problems:
        raise DataError(f"{config.path}: the dataset is empty; it needs at least one row")
    return problems


def draw(problems: Sequence[T], n: int, step: int, seed: int) -> list[T]:
    """The `n` problems of step `step`, counted from 0.

    The steps cut one endless stream: epoch after epoch, each an order of its own that depends on `seed` and the epoch
    alone. So every epoch has each problem once, and `n` may exceed their number.
    """
    assert n > 0 and step >= 0
    return stretch(problems, step * n, (step + 1) * n, seed, "data")


def stretch(problems: Sequence[T], at: int, end: int, seed: int, *path: str) -> list[T]:
    """Problems `at` to `end` (exclusive) of the endless stream that `seed` and `path` name."""
    assert problems and 0 <= at <= end
    size, drawn = len(problems), []
    while at < end:
        epoch, first = divmod(at, size)
        order = permutation(size, seed, *path, epoch)[first:first + end - at]
        drawn += [problems[i] for i in order]
        at += len(order)
    return drawn


def fingerprint(problems: Sequence[Problem]) -> str:
    """16 hex digits over all that the problems hold, in their order."""
    digest = blake2b(digest_size=8)
    for p in problems:
        said = [[(m.role, m.content) for m in part or ()] for part in (p.messages, p.completion)]
        text = json.dumps([p.id, p.task, said, p.answer, sorted(p.columns.items())], default=repr)
        digest.update(text.encode() + b"\n")
    return digest.hexdigest()


def _generated(config: DataConfig) -> list[Problem]:
    system = (Message("system", config.system),) if config.system is not None else ()
    problems = generate(config.task, config.options, config.split, config.limit or GENERATED, config.seed)
    return [replace(p, id=f"{config.task}:{config.split}:{i}", messages=(*system, *p.messages))
            for i, p in enumerate(problems)]


def _problem(config: DataConfig, row: Row, where: str, ident: str, task: str) -> Problem:
    source = _sources(config, row, where)
    if "prompt" in source:
        prompt = turns(row, source["prompt"], "user", where)
        completion = turns(row, source["completion"], "assistant", where) if "completion" in source else None
    else:
        said = turns(row, source["messages"], None, where)
        cut = len(said) - 1 if said[-1].role == "assistant" else len(said)
        prompt, completion = said[:cut], said[cut:] or None
    if completion and [m.role for m in completion] != ["assistant"]:
        raise DataError(f"{where}: a completion is one assistant turn, this one has the roles "
                        f"{[m.role for m in completion]}; put the turns before the last answer into the prompt")
    consumed = {*config.columns.values(), "prompt", "completion", "messages", "answer"}
    named = row.get("task")  # a file of several tasks says which
    return Problem(id=ident, task=named if isinstance(named, str) else task,
                   messages=with_system(config.system, prompt, where), completion=completion,
                   answer=_answer(config, row, source, where),
                   columns={k: v for k, v in row.items() if k not in consumed})


def _sources(config: DataConfig, row: Row, where: str) -> dict[str, str]:
    """Our column names that this row has, with the data's names for them."""
    for ours, theirs in config.columns.items():
        if theirs not in row:
            hint = nearest(theirs, row)
            cure = f"did you mean {hint!r}? " if hint else ""
            raise DataError(f"{where}: no column {theirs!r} (columns.{ours}); {cure}it has {listed(row)}")
    source = {ours: config.columns.get(ours, ours) for ours in OURS}
    # A row without a completion may also say so with null.
    source = {o: t for o, t in source.items() if t in row and (row[t] is not None or o != "completion")}
    if "prompt" in source and "messages" in source:
        chosen = [ours for ours in ("prompt", "messages") if ours in config.columns]
        if len(chosen) != 1:
            raise DataError(f"{where}: both `prompt` and `messages`; say which one is meant, e.g. with columns: "
                            f"{{prompt: prompt}}")
        source = {o: t for o, t in source.items() if o not in ("prompt", "messages") or o in chosen}
    if "prompt" not in source and "messages" not in source:
        raise DataError(f"{where}: no column `prompt` and none `messages`; it has {listed(row)}; name yours with "
                        f"{_mapping_hint(row)}")
    return source


def _mapping_hint(row: Row) -> str:
    if "instruction" in row:
        return "columns: {prompt: instruction, completion: output}, after joining any `input` to its instruction"
    if "conversations" in row:
        return "columns: {messages: conversations}"
    close = next((c for c in row for ours in ("prompt", "messages") if nearest(c, [ours])), None)
    text = close or next((c for c in ("question", "problem", "query", "input") if c in row), "their_name")
    return f"columns: {{prompt: {text}}}"


def _answer(config: DataConfig, row: Row, source: dict[str, str], where: str) -> str | None:
    column = source.get("answer") or source.get("solution")
    if column is None:
        if config.answer_after is not None:
            raise DataError(f"{where}: answer_after needs a column `answer` or `solution`; it has {listed(row)}; name "
                            f"yours with columns: {{answer: their_name}}")
        return None
    value = row[column]
    if value is None:
        return None
    if not isinstance(value, str | int | float):
        raise DataError(f"{where}, column {column!r}: an answer is text or a number, got {value!r:.60}; name another "
                        f"column with columns: {{answer: their_name}}")
    text = str(value)
    if config.answer_after is not None:
        _, marker, text = text.rpartition(config.answer_after)
        if not marker:
            raise DataError(f"{where}, column {column!r}: no {config.answer_after!r} (answer_after) in "
                            f"{str(value)[-60:]!r}; mend the row or the marker")
    return text.strip() or None
