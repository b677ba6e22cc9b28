"""Problems of several sources in one file, as a stage of a pipeline that others read.

In: where problems come from: files, hub datasets, generated tasks. Out: `data.jsonl`, one row for each problem, with
TRL's columns.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from tinyr2.core.config import Config
from tinyr2.core.errors import RunError
from tinyr2.core.files import write_atomic
from tinyr2.core.rng import permutation
from tinyr2.core.types import Message, Problem
from tinyr2.data.problems import DataConfig, load_problems
from tinyr2.report.console import Console

DATA = "data.jsonl"

# One source, or a list of them.
Sources = Annotated[tuple[DataConfig, ...], Field(min_length=1),
                    BeforeValidator(lambda value: (value,) if isinstance(value, dict | DataConfig) else value)]


class MixConfig(Config):
    """Everything that a `data` stage can be told."""

    sources: Sources
    solutions: bool = True  # with their worked solutions, where they have some
    shuffle: int | None = None  # the seed of one order for all; null: source by source
    output_dir: str


def mix(config: MixConfig, console: Console, *, overwrite: bool = False) -> dict:
    """Write the file; returns what it holds. RunError where it is there already."""
    path = Path(config.output_dir) / DATA
    if path.exists() and not overwrite:
        raise RunError(f"{path}: already there; --overwrite replaces it, or give another output_dir")
    problems = load_all(config.sources)
    if config.shuffle is not None:
        problems = [problems[i] for i in permutation(len(problems), config.shuffle, "mix")]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_rows(path, (row_of(p, p.completion if config.solutions else None) for p in problems))
    console.note(f"{path}: {len(problems):,} problems")
    return {"data": str(path), "problems": len(problems)}


def load_all(sources: Sequence[DataConfig]) -> list[Problem]:
    """The problems of all sources, one source after the other."""
    return [p for source in sources for p in load_problems(source)]


def row_of(problem: Problem, completion: Sequence[Message] | None) -> dict[str, Any]:
    """A problem as a row that `load_problems` reads; its `task` stays with it as a column."""
    row = {"task": problem.task, **problem.columns, "prompt": turns(problem.messages), "answer": problem.answer}
    return row if completion is None else row | {"completion": turns(completion)}


def turns(messages: Iterable[Message]) -> list[dict[str, str]]:
    """Messages as JSON has them."""
    return [{"role": m.role, "content": m.content} for m in messages]


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """A JSONL file, all at once."""
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
