"""Completions as files: what the model wrote at each step, one parquet per step.

In: completions with their rewards and, where a teacher looked, its disagreement per token. Out:
`completions/step-00000012.parquet`, readable by pandas and datasets, and read back here.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from tinyr2.core.errors import DataError
from tinyr2.core.files import write_atomic

if TYPE_CHECKING:  # names alone: to read a report need not load torch
    from tinyr2.core.types import Author, Finish

_TEXTS = pa.list_(pa.string())
_SCHEMA = pa.schema([
    ("step", pa.int64()), ("problem_id", pa.string()), ("author", pa.string()), ("prompt", pa.string()),
    ("completion", pa.string()), ("finish", pa.string()), ("reward", pa.float64()),
    ("reward_parts", pa.map_(pa.string(), pa.float64())), ("answer", pa.string()), ("tokens", _TEXTS),
    ("disagreement", pa.list_(pa.float64())), ("error", pa.string())])


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One completion of n tokens, as a person wants to read it.

    Completion(step=12, problem_id="train:17", author="student", prompt="2+2?", completion="4", finish="stop",
               reward=1.0, tokens=["4", "<eos>"], disagreement=[0.1, 0.0])
    """

    step: int
    problem_id: str
    author: "Author"
    prompt: str
    completion: str
    finish: "Finish"
    reward: float | None = None
    reward_parts: Mapping[str, float | None] = field(default_factory=dict)
    answer: str | None = None
    tokens: list[str] | None = None  # (n,) the text of each token
    disagreement: list[float] | None = None  # (n,) learner_logp - teacher_logp, or the KL at the token, in nats
    error: str | None = None  # why it was not graded

    def __post_init__(self):
        if self.disagreement is not None and len(self.disagreement) != len(self.tokens or ()):
            raise DataError(f"disagreement: {len(self.disagreement)} values, {len(self.tokens or ())} tokens")


assert _SCHEMA.names == [f.name for f in fields(Completion)]


def write_completions(folder: Path, step: int, rows: Iterable[Completion]) -> Path:
    """Write the completions of `step`, all at once: after a crash the file is whole or absent. Returns its path."""
    rows = list(rows)
    wrong = next((row.step for row in rows if row.step != step), None)
    assert wrong is None, f"a completion of step {wrong} among those of step {step}"
    table = pa.Table.from_pylist([_encodable(asdict(row)) for row in rows], schema=_SCHEMA)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.parquet"
    write_atomic(path, sink.getvalue().to_pybytes())
    return path


def completion_files(folder: Path) -> list[Path]:
    """The files of `folder` in the order of their steps; none where there is no folder."""
    return sorted(folder.glob("step-*.parquet"))


def read_completions(path: Path) -> list[Completion]:
    """The completions of one file, or of all files of a folder in the order of their steps."""
    if path.is_dir():
        return [row for file in completion_files(path) for row in read_completions(file)]
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as parquet ({error}); delete it, the run does not need it") from error
    if table.schema.names != _SCHEMA.names:
        raise DataError(f"{path}: has columns {table.schema.names}, completions have {_SCHEMA.names}; delete it, the "
                        "run does not need it")
    return [Completion(**{**row, "reward_parts": dict(row["reward_parts"])}) for row in table.to_pylist()]


def _encodable(value: Any) -> Any:
    """`value` with lone surrogates (JSON can spell them, UTF-8 cannot) as the text of their escapes."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, Mapping):
        return {_encodable(key): _encodable(item) for key, item in value.items()}
    return [_encodable(item) for item in value] if isinstance(value, list) else value
