"""How the tokens of one vocabulary go on in another: what a teacher's next token says of a student's.

In: the pieces of two vocabularies as bytes, and ids that stand for the same role. Out: after any bytes of a token that
are read already, the teacher's tokens that go on from there, and the student's token that each of them begins with.
Integers and bytes alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tinyr2.tokens.byte_order import byte_order


@dataclass(frozen=True)
class Continuations:
    """After some bytes of a token: its k possible endings.

    After "1", of a vocabulary with "1", "12", "123" and "2": tokens "12" and "123", both begin with the student's "2".
    """

    ids: np.ndarray  # (k,) int64, the teacher's tokens that are longer than these bytes
    firsts: np.ndarray  # (k,) int64, the student's token that the rest begins with; -1: it has none
    ended: np.ndarray  # (e,) int64, the teacher's tokens that are exactly these bytes


class Prefixes:
    """The teacher's vocabulary, as a tree of bytes, over the student's."""

    def __init__(self, student: Mapping[bytes, int], teacher: Sequence[bytes], roles: Mapping[int, int]):
        """student: the id of each byte string    teacher: its pieces by id, b"" for what is no text
        roles: the teacher's ids to the student's, of tokens that stand for the same without being text
        """
        self._student, self._teacher, self._roles = student, teacher, roles
        self._longest = max(map(len, student), default=0)
        self._order, self._from, self._to = byte_order(teacher)
        self._of_bytes: dict[bytes, list[int]] = {}
        for i, piece in enumerate(teacher):
            if piece:
                self._of_bytes.setdefault(piece, []).append(i)
        self._known: dict[bytes, Continuations] = {}

    def after(self, read: bytes) -> Continuations:
        """The continuations once `read` has been read of a token; of b"", all tokens and roles."""
        if read not in self._known:
            self._known[read] = self._anything() if not read else self._longer(read)
        return self._known[read]

    def _anything(self) -> Continuations:
        ids = [i for i, piece in enumerate(self._teacher) if piece and i not in self._roles]
        firsts = [self._first(self._teacher[i]) for i in ids]
        return Continuations(np.array([*ids, *self._roles]), np.array([*firsts, *self._roles.values()]),
                             np.zeros(0, dtype=np.int64))

    def _longer(self, read: bytes) -> Continuations:
        ended = self._of_bytes.get(read, [])
        if ended:
            ids = self._order[self._from[ended[0]]:self._to[ended[0]]]
        else:  # bytes inside of a token that are none by themselves
            ids = np.array([i for i, piece in enumerate(self._teacher)
                            if len(piece) > len(read) and piece.startswith(read)], dtype=np.int64)
        firsts = [self._first(self._teacher[i][len(read):]) for i in ids]
        return Continuations(ids, np.array(firsts, dtype=np.int64), np.array(ended, dtype=np.int64))

    def _first(self, text: bytes) -> int:
        """The longest token of the student's that `text` begins with; -1: none."""
        for n in range(min(self._longest, len(text)), 0, -1):
            if (found := self._student.get(text[:n])) is not None:
                return found
        return -1
