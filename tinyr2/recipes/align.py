"""`tinyr2 align`: how two tokenizers line up, and what each signal keeps of a text.

In: two tokenizers, and texts by kind: the built-in samples, or a file's. With two models also what they say of the
student's answers. Out: tables and drawings on the console, and the figures as JSON.
"""

import shutil
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from tinyr2.core.config import Config
from tinyr2.core.errors import DataError
from tinyr2.data.rows import open_rows
from tinyr2.recipes.align_models import ModelsConfig, compare_models
from tinyr2.recipes.build import read_tokenizer
from tinyr2.report.console import Console
from tinyr2.report.lineup import WIDTH, lineup_lines, lineup_table, roles_lines, worst_lines
from tinyr2.tokens.lineup import compare, line_up, lost_bytes, roles, vocabulary, worst
from tinyr2.tokens.samples import SAMPLES
from tinyr2.tokens.translate import Translator

COLUMNS = ("text", "prompt", "completion", "messages")  # of a row, those with text


class AlignConfig(Config):
    """Everything that `tinyr2 align` can be told."""

    student: str | None = None  # a tokenizer, by folder or hub name; None: the student model's
    teacher: str | None = None  # likewise
    data: str | None = None  # texts: .txt, .jsonl or .parquet; None: the built-in samples
    limit: int | None = Field(None, ge=1)  # of its rows
    models: ModelsConfig | None = None

    @model_validator(mode="after")
    def _two_sides(self) -> "AlignConfig":
        for side in ("student", "teacher"):
            if getattr(self, side) is None and self.models is None:
                raise ValueError(f"no tokenizer of the {side}: give A and B, two folders or hub names, or two models "
                                 "with --student and --teacher")
        return self

    @property
    def sides(self) -> tuple[str, str]:
        """Where the two tokenizers are."""
        return (self.student or self.models.student.path, self.teacher or self.models.teacher.path)


def align(config: AlignConfig, console: Console) -> dict[str, Any]:
    """Compare, print, and return what `--json` prints.

    DataError: no such tokenizer or file, a tokenizer whose bytes cannot be recovered, texts without a byte.
    """
    student, teacher = map(read_tokenizer, config.sides)
    same = student.backend_tokenizer.to_str() == teacher.backend_tokenizer.to_str()
    translator = Translator(student, teacher)
    texts = list(SAMPLES.items()) if config.data is None else read_texts(config.data, config.limit)
    lineups = line_up(translator, texts)
    found = {"student": config.sides[0], "teacher": config.sides[1], "same": same, **compare(lineups),
             "vocabulary": vocabulary(translator), "roles": roles(translator), "lost": lost_bytes(lineups),
             "worst": worst(lineups, translator)}
    width = min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)
    _show(found, console, width)
    for line in lineup_lines(lineups, translator, width):
        console.note(line)
    if config.models is not None:
        found["models"] = compare_models(config.models, translator, (student, teacher), console)
    return found


def read_texts(path: str, limit: int | None) -> list[tuple[str, str]]:
    """(Kind, text) of a .txt file, which is one text, or of each text in a file's rows; the kind is the file's name.

    DataError: no such file, a malformed one, rows without a column of text.
    """
    source = Path(path).expanduser()
    if source.suffix != ".txt":
        _, rows = open_rows(path, None, "train")
        return [(source.stem, text) for where, row in islice(rows, limit) for text in _texts_of(row, where)]
    if not source.is_file():
        raise DataError(f"{path}: no such file; looked in {source.absolute().parent}")
    try:
        return [(source.stem, source.read_bytes().decode())]
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start + 1}); save the file as UTF-8") from error


def _texts_of(row: Mapping[str, Any], where: str) -> list[str]:
    """TRL's columns, or else every text of the row."""
    values = [row[name] for name in COLUMNS if row.get(name)] or [v for v in row.values() if isinstance(v, str) and v]
    turns = [turn for value in values for turn in ([value] if isinstance(value, str) else value)]
    texts = [turn.get("content") or turn.get("value") if isinstance(turn, Mapping) else turn for turn in turns]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where}: no text; a row has {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}, each a text or turns "
                        "with role and content")
    return texts


def _show(found: Mapping[str, Any], console: Console, width: int) -> None:
    console.note(f"A, the student: {found['student']}\nB, the teacher: {found['teacher']}")
    if found["same"]:
        console.note("A and B are one tokenizer: every token has a partner, and nothing needs to be lined up")
    console.table(lineup_table(found))
    for line in (*roles_lines(found), *worst_lines(found, width)):
        console.note(line)
