"""What a row's columns say: chat turns, raw.

In: one row of a file or dataset. Out: turns with roles; a DataError names the row, the column and the cure.
"""

from collections.abc import Sequence

from tinyr2.core.config import nearest
from tinyr2.core.errors import DataError
from tinyr2.core.types import Message
from tinyr2.data.rows import Row

_SHAREGPT = {"human": "user", "gpt": "assistant"}


def known_columns(columns: dict[str, str], known: Sequence[str]) -> dict[str, str]:
    """The mapping as it is; ValueError where it names a column of ours that is not among the `known`."""
    for ours in columns:
        if ours not in known:
            hint = nearest(ours, known)
            cure = f"did you mean {hint!r}? " if hint else ""
            raise ValueError(f"{ours!r} is no column of ours; {cure}write `ours: theirs`, where ours is one of "
                             f"{', '.join(known)}")
    return columns


def turns(row: Row, column: str, role: str | None, where: str) -> tuple[Message, ...]:
    """A column as turns: text becomes one turn of `role`; ShareGPT's `from` and `value` are understood."""
    value, where = row[column], f"{where}, column {column!r}"
    if isinstance(value, str) and role is not None:
        found = (Message(role, value),)
    elif isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        found = tuple(_message(turn, f"{where}, turn {i}") for i, turn in enumerate(value, 1))
    else:
        wanted = "turns" if role is None else "text or turns"
        raise DataError(f"{where}: {wanted} needed, got {value!r:.60}; turns are a list of objects with role and "
                        f"content")
    for turn in found:
        if not turn.content.strip():
            raise DataError(f"{where}: the {turn.role} turn is empty; remove the row or fill it in")
    return found


def _message(turn: Row, where: str) -> Message:
    if turn.get("from") is not None:
        turn = {"role": _SHAREGPT.get(turn["from"], turn["from"]), "content": turn.get("value")}
    for key in ("role", "content"):
        if not isinstance(turn.get(key), str):
            raise DataError(f"{where}: {key} must be text, got {turn.get(key)!r:.60}; a turn is "
                            f'{{"role": "user", "content": "…"}}')
    return Message(turn["role"], turn["content"])


def with_system(system: str | None, prompt: tuple[Message, ...], where: str) -> tuple[Message, ...]:
    """The checked prompt, with the system turn that the config asks for, if any."""
    roles = [m.role for m in prompt]
    if "user" not in roles:
        raise DataError(f"{where}: the prompt has no user turn (its roles: {roles}); add one: it is what the model "
                        f"answers")
    if roles[-1] != "user":
        raise DataError(f"{where}: the prompt ends with the {roles[-1]}'s turn (its roles: {roles}); the last turn "
                        f"must be the user's; an answer belongs into `completion`")
    if system is None:
        return prompt
    if roles[0] == "system":
        raise DataError(f"{where}: the row has a system turn of its own; leave `system` out of the config")
    return (Message("system", system), *prompt)


def listed(row: Row) -> str:
    """The row's columns, for a message."""
    return ", ".join(map(repr, row)) or "no columns"
