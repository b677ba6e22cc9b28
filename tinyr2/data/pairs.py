"""Pairs of answers, of which one was preferred.

In: a `PairsConfig` naming a JSONL file, a parquet file or a hub dataset in one of TRL's preference layouts. Out:
`Pair`s with raw chat turns; a DataError names the file, the line and the cure.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

from pydantic import Field, field_validator

from tinyr2.core.config import Config, nearest
from tinyr2.core.errors import DataError
from tinyr2.core.types import Message, Problem
from tinyr2.data import problems
from tinyr2.data.rows import Row, open_rows
from tinyr2.data.turns import known_columns, listed, turns, with_system

OURS = ("prompt", "chosen", "rejected", "margin")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A prompt with two answers.

    Pair(problem=p, chosen=(Message("assistant", "4"),), rejected=(Message("assistant", "5"),))
    """

    problem: Problem  # its messages are the prompt; it has no completion of its own
    chosen: tuple[Message, ...]  # one assistant turn
    rejected: tuple[Message, ...]
    margin: float | None = None  # by how much the chosen one is better, where the data says so


class PairsConfig(Config):
    """Which rows, and what their columns mean.

    UltraFeedback: path: trl-lib/ultrafeedback_binarized.
    """

    path: str  # a .jsonl or .parquet file, or a hub id
    name: str | None = None  # a hub dataset's configuration
    split: str = "train"  # a hub dataset's split
    limit: int | None = Field(None, ge=1)  # the first rows only
    columns: dict[str, str] = {}  # ours -> the data's
    system: str | None = Field(None, min_length=1)  # a system turn put before every prompt

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, columns: dict[str, str]) -> dict[str, str]:
        return known_columns(columns, OURS)


def load_pairs(config: PairsConfig) -> list[Pair]:
    """Every row as a Pair, in the data's order; ids as `load_problems` gives them.

    Layouts: `prompt`, `chosen` and `rejected`, each text (which becomes a user or assistant turn) or turns; `chosen`
    and `rejected` alone, as whole conversations that share all turns but the last. A `prompt` beside whole
    conversations must stand in them. `margin`, a number or null, is read where it is there; all other columns go to
    `Problem.columns`. Pairs of equal answers say nothing: they are left out, with a warning that counts them.

    DataError: missing file, malformed line, missing column, wrong type, empty content, an answer that is not one
    assistant turn, conversations that part earlier, no pairs.
    """
    name, rows = open_rows(config.path, config.name, config.split)
    task = name.removesuffix(f":{config.split}")
    pairs = [_pair(config, row, where, Problem(id=f"{name}:{i}", task=task, messages=()))
             for i, (where, row) in enumerate(islice(rows, config.limit))]
    if not pairs:
        raise DataError(f"{config.path}: the dataset is empty; it needs at least one row")
    kept = [p for p in pairs if p.chosen != p.rejected]
    if not kept:
        raise DataError(f"{config.path}: chosen and rejected are equal in all {len(pairs)} rows; give pairs of "
                        "different answers")
    if len(kept) < len(pairs):
        warnings.warn(f"{config.path}: {len(pairs) - len(kept)} of {len(pairs)} pairs have equal answers and are left "
                      "out", stacklevel=2)
    return kept


def sides(pairs: Sequence[Pair]) -> list[Problem]:
    """Two worked problems for each pair, the chosen answer first; their ids say which."""
    return [replace(p.problem, id=f"{p.problem.id}:{side}", completion=getattr(p, side))
            for p in pairs for side in ("chosen", "rejected")]


def fingerprint(pairs: Sequence[Pair]) -> str:
    """16 hex digits over all that the pairs hold, in their order."""
    return problems.fingerprint([replace(p, columns={**p.columns, "margin": pair.margin})
                                 for pair in pairs for p in sides([pair])])


def _pair(config: PairsConfig, row: Row, where: str, bare: Problem) -> Pair:
    column = _columns(config, row, where)
    answers = {side: turns(row, column[side], "assistant", where) for side in ("chosen", "rejected")}
    given = turns(row, column["prompt"], "user", where) if "prompt" in column else None
    for side, said in answers.items():
        if said[-1].role != "assistant":
            raise DataError(f"{where}, column {column[side]!r}: the last turn is the {said[-1].role}'s (roles: "
                            f"{[m.role for m in said]}); it must be the assistant's: it is the answer that is judged")
    if given is None or any(len(said) > 1 for said in answers.values()):
        prompt = _shared_prompt(given, answers["chosen"], answers["rejected"], where)
    else:
        prompt = given
    consumed = {config.columns.get(ours, ours) for ours in OURS}
    rest = {k: v for k, v in row.items() if k not in consumed}
    return Pair(problem=replace(bare, messages=with_system(config.system, prompt, where), columns=rest),
                chosen=answers["chosen"][-1:], rejected=answers["rejected"][-1:],
                margin=_margin(row, column["margin"], where) if "margin" in column else None)


def _columns(config: PairsConfig, row: Row, where: str) -> dict[str, str]:
    """Our column names that this row has, with the data's names for them."""
    names = {ours: config.columns.get(ours, ours) for ours in OURS}
    lacking = [o for o, theirs in names.items()
               if theirs not in row and (o in ("chosen", "rejected") or o in config.columns)]
    if lacking:
        theirs = names[lacking[0]]
        hint = nearest(theirs, row)
        cure = f"did you mean {hint!r}? " if hint else ""
        raise DataError(f"{where}: no column {theirs!r}; {cure}it has {listed(row)}; a pair has chosen and "
                        f"rejected, and yours are named with columns: {{{lacking[0]}: their_name}}")
    return {o: t for o, t in names.items() if t in row and (row[t] is not None or o in ("chosen", "rejected"))}


def _shared_prompt(given: tuple[Message, ...] | None, chosen: tuple[Message, ...], rejected: tuple[Message, ...],
                   where: str) -> tuple[Message, ...]:
    """The turns that two whole conversations share: all but their last."""
    prompt = chosen[:-1]
    if not prompt and len(rejected) == 1:
        raise DataError(f"{where}: answers without a prompt; add a column `prompt`, or give chosen and rejected as "
                        "whole conversations, a list of turns each")
    if prompt != rejected[:-1]:
        shared = next((i for i, (a, b) in enumerate(zip(prompt, rejected[:-1], strict=False)) if a != b),
                      min(len(chosen), len(rejected)) - 1)
        raise DataError(f"{where}: chosen and rejected part at turn {shared + 1} of {len(chosen)} and {len(rejected)}; "
                        "a pair shares all turns but the last, so cut both where they part")
    if given is not None and given != prompt and not (len(given) == 1 and given[0] in prompt):
        raise DataError(f"{where}: chosen and rejected are whole conversations that do not begin with the prompt; drop "
                        "the column `prompt`, or give answers of one turn")
    return prompt


def _margin(row: Row, column: str, where: str) -> float:
    value = row[column]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{where}, column {column!r}: a margin is a finite number or null, got {value!r:.60}; mend the "
                        "row, or drop the column")
    return float(value)
