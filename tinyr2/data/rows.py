"""Rows of a JSONL file, a parquet file or a hub dataset, one dict each.

In: a path or a hub id. Out: the rows in order, each with its place; a DataError names the file, the line and the cure.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from tinyr2.core.config import nearest
from tinyr2.core.errors import ConfigError, DataError

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")

Row = dict[str, Any]


def open_rows(source: str, name: str | None, split: str) -> tuple[str, Iterator[tuple[str, Row]]]:
    """What the ids begin with, and (where, row) for each row; where is the place for messages.

    source: a .jsonl or .parquet file, or a hub id with its configuration `name` and its split. DataError: no such file
    or dataset, a file of another kind; later, from the iterator, a malformed line.
    """
    path = Path(source).expanduser()
    if path.suffix in (".jsonl", ".parquet"):
        if split != "train" or name is not None:
            raise ConfigError(f"{path}: a file has no splits and no configurations; leave out split and name, or give "
                              f"the file of the split {split!r}")
        if not path.is_file():
            hint = nearest(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else None
            cure = f"did you mean {hint}? " if hint else ""
            raise DataError(f"{path}: no such file; {cure}looked in {path.absolute().parent}")
        return path.stem, _jsonl(path) if path.suffix == ".jsonl" else _parquet(path)
    if path.exists() or not _HUB_ID.fullmatch(source):
        raise DataError(f"{path}: data is a .jsonl or .parquet file, or a hub id such as openai/gsm8k; convert it to "
                        f"one JSON object per line and name it .jsonl")
    return f"{source}:{split}", _hub(source, name, split)


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


def _hub(source: str, name: str | None, split: str) -> Iterator[tuple[str, Row]]:
    import datasets  # half a second, which a run on local files does without

    try:
        rows = datasets.load_dataset(source, name, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{source}: no hub dataset that can be loaded (name {name}, split {split}): "
                        f"{reason}; check the spelling and the network, or give a local .jsonl or .parquet file"
                        ) from error
    for number, row in enumerate(rows):
        yield f"{source}, split {split}, row {number}", row
