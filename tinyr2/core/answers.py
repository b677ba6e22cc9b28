"""The journal of a server's answers, so that each is asked for once, also after a kill.

In: answers under keys that say all that they depend on. Out: those answers, by key. The file has one strict JSON object
per line, and a line is whole when its newline is there: {"about": …}, then {"key": …, "tokens": …, "answer": …}.
"""

import json
import os
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from tinyr2.core.errors import DataError, RunError


def key_of(*parts: Any) -> str:
    """32 hex digits for a question: everything that its answer depends on, as JSON values."""
    whole = json.dumps(parts, sort_keys=True, allow_nan=False)
    return blake2b(whole.encode(), digest_size=16).hexdigest()


class Answers:
    """One writer's handle; without a path nothing is kept. Answers stay on the disk and are read when asked for."""

    def __init__(self, path: str | Path | None) -> None:
        self.path = None if path is None else Path(path)
        self.about: dict[str, Any] | None = None  # of whom the answers are
        self.tokens = 0  # sent for the answers
        self._at: dict[str, tuple[int, int]] = {}  # key → first byte, bytes
        self._file = None
        if self.path is not None:
            self._open(self.path)

    def __len__(self) -> int:
        return len(self._at)

    def __contains__(self, key: str) -> bool:
        return key in self._at

    def __getitem__(self, key: str) -> Any:
        """The answer; KeyError where there is none."""
        start, length = self._at[key]
        return json.loads(os.pread(self._file.fileno(), length, start))["answer"]

    def describe(self, about: Mapping[str, Any]) -> None:
        """Write down of whom the answers are; once, before the first."""
        assert self.about is None and not self._at, "the answers are somebody else's already"
        self.about = dict(about)
        self._append([{"about": self.about}])

    def add(self, answers: Mapping[str, Any], tokens: Mapping[str, int]) -> None:
        """Keep JSON values, with the tokens that were sent for each; on the disk, all at once, when this returns."""
        rows = [{"key": key, "tokens": tokens[key], "answer": answer} for key, answer in answers.items()]
        for row, place in zip(rows, self._append(rows), strict=False):
            self._at[row["key"]] = place
            self.tokens += row["tokens"]

    def close(self) -> None:
        """Give the file back; closing twice is harmless."""
        if self._file is not None:
            self._file.close()

    def _open(self, path: Path) -> None:
        try:
            self._file = path.open("a+b", buffering=0)
        except OSError as error:
            raise RunError(f"{path}: cannot be opened ({error.strerror}); is its folder there and writable?") from error
        self._file.seek(0)
        end = 0
        for number, line in enumerate(iter(self._file.readline, b""), 1):
            if not line.endswith(b"\n"):  # torn by a kill
                break
            self._read(line, end, f"{path}, line {number}")
            end += len(line)
        self._file.truncate(end)

    def _read(self, line: bytes, start: int, where: str) -> None:
        try:
            row = json.loads(line)
            if "about" in row:
                self.about = dict(row["about"])
            else:
                self._at[row["key"]] = (start, len(line))
                self.tokens += row["tokens"]
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{where}: no answer of a server ({type(error).__name__}: {error}); delete the line, or "
                            "restore the file") from error

    def _append(self, rows: list[dict[str, Any]]) -> list[tuple[int, int]]:
        """Write whole lines and sync; where each begins and how long it is. An OSError leaves the file as it was."""
        if self._file is None or not rows:
            return []
        lines = [json.dumps(row, allow_nan=False).encode() + b"\n" for row in rows]
        size = self._file.seek(0, os.SEEK_END)
        try:
            data = memoryview(b"".join(lines))
            while data:
                data = data[self._file.write(data):]
            os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(size)
            raise
        places = []
        for line in lines:
            places.append((size, len(line)))
            size += len(line)
        return places
