"""Problems from files and hub datasets, and which of them a step gets.

In: a `DataConfig` naming a JSONL file, a parquet file or a hub dataset in one of TRL's layouts. Out: `Problem`s with
raw chat turns; a DataError names the file, the line and the cure. `draw` deals them out, epoch after epoch.
"""

import json
import re
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from pydantic import Field, field_validator

from tinyr2.core.config import Config, nearest
from tinyr2.core.errors import ConfigError, DataError
from tinyr2.core.rng import permutation
from tinyr2.core.types import Message, Problem

OURS = ("prompt", "completion", "messages", "answer", "solution")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SHAREGPT = {"human": "user", "gpt": "assistant"}

Row = dict[str, Any]


class DataConfig(Config):
    """Which rows, and what their columns mean.

    GSM8K: path: openai/gsm8k, name: main, columns: {prompt: question, completion: answer}, answer_after: "####".
    """

    path: str  # a .jsonl or .parquet file, or a hub id
    name: str | None = None  # a hub dataset's configuration
    split: str = "train"  # a hub dataset's split
    limit: int | None = Field(None, ge=1)  # the first rows only
    columns: dict[str, str] = {}  # ours -> the data's
    answer_after: str | None = Field(None, min_length=1)  # the gold answer follows this marker in the answer column
    system: str | None = Field(None, min_length=1)  # a system turn put before every prompt

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, columns: dict[str, str]) -> dict[str, str]:
        for ours in columns:
            if ours not in OURS:
                hint = nearest(ours, OURS)
                cure = f"did you mean {hint!r}? " if hint else ""
                raise ValueError(f"{ours!r} is no column of ours; {cure}write `ours: theirs`, where ours is one of "
                                 f"{', '.join(OURS)}")
        return columns


def load_problems(config: DataConfig) -> list[Problem]:
    """Every row as a Problem, in the data's order; the id is `<file stem or hub id:split>:<row>`, counted from 0.

    Layouts: `prompt`; `prompt` and `completion` (text, which becomes a user or assistant turn, or turns); `messages`,
    whose last turn, if an assistant's, is the completion. `answer`, or else `solution`, is the gold answer; a blank
    one is None. All other columns go to `Problem.columns`. DataError: missing file, malformed line, missing column,
    wrong type, empty content, a prompt that does not end with a user turn, no rows.
    """
    name, rows = _open(config)
    task = name.removesuffix(f":{config.split}")
    problems = [_problem(config, row, where, f"{name}:{i}", task)
                for i, (where, row) in enumerate(islice(rows, config.limit))]
    if not problems:
        raise DataError(f"{config.path}: the dataset is empty; it needs at least one row")
    return problems


def draw(problems: Sequence[Problem], n: int, step: int, seed: int) -> list[Problem]:
    """The `n` problems of step `step`, counted from 0.

    The steps cut one endless stream: epoch after epoch, each an order of its own that depends on `seed` and the epoch
    alone. So every epoch has each problem once, and `n` may exceed their number.
    """
    assert problems and n > 0 and step >= 0
    size, drawn = len(problems), []
    at, end = step * n, (step + 1) * n
    while at < end:
        epoch, first = divmod(at, size)
        order = permutation(size, seed, "data", epoch)[first:first + end - at]
        drawn += [problems[i] for i in order]
        at += len(order)
    return drawn


def fingerprint(problems: Sequence[Problem]) -> str:
    """16 hex digits over all that the problems hold, in their order."""
    digest = blake2b(digest_size=8)
    for p in problems:
        turns = [[(m.role, m.content) for m in part or ()] for part in (p.messages, p.completion)]
        text = json.dumps([p.id, p.task, turns, p.answer, sorted(p.columns.items())], default=repr)
        digest.update(text.encode() + b"\n")
    return digest.hexdigest()


def _open(config: DataConfig) -> tuple[str, Iterator[tuple[str, Row]]]:
    """What the ids begin with, and (where, row) for each row."""
    path = Path(config.path).expanduser()
    if path.suffix in (".jsonl", ".parquet"):
        if config.split != "train" or config.name is not None:
            raise ConfigError(f"{path}: a file has no splits and no configurations; leave out split and name, or give "
                              f"the file of the split {config.split!r}")
        if not path.is_file():
            hint = nearest(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else None
            cure = f"did you mean {hint}? " if hint else ""
            raise DataError(f"{path}: no such file; {cure}looked in {path.absolute().parent}")
        return path.stem, _jsonl(path) if path.suffix == ".jsonl" else _parquet(path)
    if path.exists() or not _HUB_ID.fullmatch(config.path):
        raise DataError(f"{path}: data is a .jsonl or .parquet file, or a hub id such as openai/gsm8k; convert it to "
                        f"one JSON object per line and name it .jsonl")
    return f"{config.path}:{config.split}", _hub(config)


def _jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except json.JSONDecodeError as error:
                raise DataError(f"{where}: not valid JSON: {error.msg} (column {error.colno}); write one JSON object "
                                f"per line") from error
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: not UTF-8 (byte {error.start + 1}); save the file as UTF-8") from error
            if not isinstance(row, dict):
                raise DataError(f"{where}: a {type(row).__name__}; write one JSON object per line")
            yield where, row


def _parquet(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024)
        for number, row in enumerate(row for batch in batches for row in batch.to_pylist()):
            yield f"{path}, row {number}", row
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: not a readable parquet file: {error}; write it again") from error


def _hub(config: DataConfig) -> Iterator[tuple[str, Row]]:
    import datasets  # half a second, which a run on local files does without

    try:
        rows = datasets.load_dataset(config.path, config.name, split=config.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{config.path}: no hub dataset that can be loaded (name {config.name}, split {config.split}): "
                        f"{reason}; check the spelling and the network, or give a local .jsonl or .parquet file"
                        ) from error
    for number, row in enumerate(rows):
        yield f"{config.path}, split {config.split}, row {number}", row


def _problem(config: DataConfig, row: Row, where: str, ident: str, task: str) -> Problem:
    source = _sources(config, row, where)
    if "prompt" in source:
        prompt = _turns(row, source["prompt"], "user", where)
        completion = _turns(row, source["completion"], "assistant", where) if "completion" in source else None
    else:
        turns = _turns(row, source["messages"], None, where)
        cut = len(turns) - 1 if turns[-1].role == "assistant" else len(turns)
        prompt, completion = turns[:cut], turns[cut:] or None
    if completion and [m.role for m in completion] != ["assistant"]:
        raise DataError(f"{where}: a completion is one assistant turn, this one has the roles "
                        f"{[m.role for m in completion]}; put the turns before the last answer into the prompt")
    consumed = {*config.columns.values(), "prompt", "completion", "messages", "answer"}
    return Problem(id=ident, task=task, messages=_with_system(config, prompt, where), completion=completion,
                   answer=_answer(config, row, source, where),
                   columns={k: v for k, v in row.items() if k not in consumed})


def _sources(config: DataConfig, row: Row, where: str) -> dict[str, str]:
    """Our column names that this row has, with the data's names for them."""
    for ours, theirs in config.columns.items():
        if theirs not in row:
            hint = nearest(theirs, row)
            cure = f"did you mean {hint!r}? " if hint else ""
            raise DataError(f"{where}: no column {theirs!r} (columns.{ours}); {cure}it has {_listed(row)}")
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
        raise DataError(f"{where}: no column `prompt` and none `messages`; it has {_listed(row)}; name yours with "
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


def _turns(row: Row, column: str, role: str | None, where: str) -> tuple[Message, ...]:
    """A column as turns: text becomes one turn of `role`; ShareGPT's `from` and `value` are understood."""
    value, where = row[column], f"{where}, column {column!r}"
    if isinstance(value, str) and role is not None:
        turns = (Message(role, value),)
    elif isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        turns = tuple(_message(turn, f"{where}, turn {i}") for i, turn in enumerate(value, 1))
    else:
        wanted = "turns" if role is None else "text or turns"
        raise DataError(f"{where}: {wanted} needed, got {value!r:.60}; turns are a list of objects with role and "
                        f"content")
    for turn in turns:
        if not turn.content.strip():
            raise DataError(f"{where}: the {turn.role} turn is empty; remove the row or fill it in")
    return turns


def _message(turn: Row, where: str) -> Message:
    if turn.get("from") is not None:
        turn = {"role": _SHAREGPT.get(turn["from"], turn["from"]), "content": turn.get("value")}
    for key in ("role", "content"):
        if not isinstance(turn.get(key), str):
            raise DataError(f"{where}: {key} must be text, got {turn.get(key)!r:.60}; a turn is "
                            f'{{"role": "user", "content": "…"}}')
    return Message(turn["role"], turn["content"])


def _with_system(config: DataConfig, prompt: tuple[Message, ...], where: str) -> tuple[Message, ...]:
    """The checked prompt, with the config's system turn."""
    roles = [m.role for m in prompt]
    if "user" not in roles:
        raise DataError(f"{where}: the prompt has no user turn (its roles: {roles}); add one: it is what the model "
                        f"answers")
    if roles[-1] != "user":
        raise DataError(f"{where}: the prompt ends with the {roles[-1]}'s turn (its roles: {roles}); the last turn "
                        f"must be the user's; an answer belongs into `completion`")
    if config.system is None:
        return prompt
    if roles[0] == "system":
        raise DataError(f"{where}: the row has a system turn of its own; leave `system` out of the config")
    return (Message("system", config.system), *prompt)


def _answer(config: DataConfig, row: Row, source: dict[str, str], where: str) -> str | None:
    column = source.get("answer") or source.get("solution")
    if column is None:
        if config.answer_after is not None:
            raise DataError(f"{where}: answer_after needs a column `answer` or `solution`; it has {_listed(row)}; name "
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


def _listed(row: Row) -> str:
    return ", ".join(map(repr, row)) or "no columns"
