"""Journals: append-only files of one strict JSON object per line.

In: rows. Out: a file whose whole lines survive a kill, and a cursor to which a resumed run cuts it back, so that an
undisturbed run and a resumed one write the same bytes. A line is whole when its newline is there.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinyr2.core.errors import DataError, RunError


class Journal:
    """One writer's handle on a journal; every row is with the operating system when `append` returns."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._file = self.path.open("ab", buffering=0)
        self._size = _whole_bytes(self.path)
        self._cut()  # a torn last line would swallow the next row

    @property
    def cursor(self) -> int:
        """Bytes of whole lines so far: what a checkpoint keeps and `truncate` takes."""
        return self._size

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row as `strict_json` spells it. An OSError (a full disk) leaves the journal as it was."""
        line = strict_json(row).encode() + b"\n"
        try:
            written = 0
            while written < len(line):
                written += self._file.write(line[written:])
        except OSError:
            self._cut()
            raise
        self._size += len(line)

    def truncate(self, cursor: int) -> None:
        """Forget every row after `cursor`, a value that `cursor` had; RunError where the file does not reach it."""
        if not 0 <= cursor <= self._size:
            raise RunError(f"{self.path}: has {self._size} bytes, the checkpoint was taken at {cursor}; the file was "
                           "cut or replaced since: resume from an older checkpoint, or start anew with --overwrite")
        if cursor and _byte_at(self.path, cursor - 1) != b"\n":
            raise RunError(f"{self.path}: no line ends at byte {cursor}, where the checkpoint was taken; the file was "
                           "edited since: resume from an older checkpoint, or start anew with --overwrite")
        self._size = cursor
        self._cut()
        self.sync()

    def sync(self) -> None:
        """Return when the rows are on the disk, not only with the operating system."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Give the file back; closing twice is harmless."""
        self._file.close()

    def _cut(self) -> None:
        self._file.truncate(self._size)


def strict_json(value: Any) -> str:
    """`strict(value)` as one line of ASCII: keys in their order, floats as the shortest text that reads back equal."""
    return json.dumps(strict(value), allow_nan=False)


def strict(value: Any) -> Any:
    """A copy of nested `value` that every JSON reader takes: NaN and the infinities become the strings "NaN",
    "Infinity" and "-Infinity"."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: strict(item) for key, item in value.items()}
    return [strict(item) for item in value] if isinstance(value, (list, tuple)) else value


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a journal. A last line without newline was torn by a kill and is left out; any other line that is no
    JSON object raises a DataError with its number."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file; name a run folder that has it")
    *lines, _torn = path.read_bytes().split(b"\n")
    return [_row(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"), parse_constant=_refuse)
    except ValueError as error:  # also UnicodeDecodeError
        raise DataError(f"{where}: not strict JSON ({error}); delete the line, or restore the file") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: a row is a JSON object, this is a {type(row).__name__}; delete the line, or restore "
                        "the file")
    return row


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


def _whole_bytes(path: Path) -> int:
    """Bytes up to and with the last newline, read from the end in blocks."""
    end = path.stat().st_size
    with path.open("rb") as file:
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            at = file.read(end - start).rfind(b"\n")
            if at >= 0:
                return start + at + 1
            end = start
    return 0


def _byte_at(path: Path, index: int) -> bytes:
    with path.open("rb") as file:
        file.seek(index)
        return file.read(1)
