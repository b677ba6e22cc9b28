"""A teacher's vocabulary as the student would write it: what a teacher's next token says of a student's.

In: the pieces of two vocabularies as bytes, ids that stand for the same role, and the student's tokenizer. Out: each of
the teacher's tokens as tokens of the student's, and all of them in the order of these, so that those that begin with
the same tokens lie side by side; of a text, the spans that are one of the teacher's tokens. Integers and bytes alone.
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tinyr2.tokens.align import Spans
from tinyr2.tokens.spelling import Spelling

END, LOST = -1, -2  # after a writing's last token: nothing is left of the piece; what is left cannot be written


class Side(NamedTuple):
    """A text as one tokenizer's ids, and this tokenizer's pieces by id; ids beyond these are no text."""

    ids: Sequence[int]
    pieces: Sequence[bytes]

    def piece(self, i: int) -> bytes:
        """The bytes of an id."""
        return self.pieces[i] if i < len(self.pieces) else b""


class Prefixes:
    """The teacher's tokens, by how the student writes them.

    Of "1", "12", "123" and "2" for a student with "1", "2", "3" and "23": 1 END, 1 2 END, 1 23 END, 2 END. After its
    "1", the teacher's token may end (it was "1"), or go on with the student's "2" ("12") or "23" ("123").
    """

    written: tuple[tuple[int, ...], ...]  # (V_t) by the teacher's id; () for what the student cannot begin
    first: np.ndarray  # (V_t,) int64, the first token of each writing; LOST where it has none
    order: np.ndarray  # (n,) int64, the teacher's tokens that have a writing, in the order of these
    tokens: np.ndarray  # int64, their writings end to end, each with its END or LOST
    begins: np.ndarray  # (n,) int64, where in `tokens` each one begins

    def __init__(self, student: Mapping[bytes, int], teacher: Sequence[bytes], roles: Mapping[int, int],
                 writer: Spelling | None = None):
        """student: the id of each byte string    teacher: its pieces by id, b"" for what is no text
        roles: the teacher's ids to the student's, of tokens that stand for the same without being text on both sides
        writer: the student's tokenizer; without it, and for what it writes otherwise than inside of a text (WordPiece
        the end of a word), the longest token that fits is taken, one after another
        """
        texts = [i for i, piece in enumerate(teacher) if piece and i not in roles]
        written: list[tuple[int, ...]] = [()] * len(teacher)
        for i, tokens in zip(texts, _written(student, [teacher[i] for i in texts], writer), strict=True):
            written[i] = tokens if tokens != (LOST,) else ()
        for i, token in roles.items():
            written[i] = (token,)
        self.written = tuple(written)
        self.first = np.array([w[0] if w else LOST for w in self.written], dtype=np.int64)
        order = sorted((i for i, w in enumerate(self.written) if w), key=self.written.__getitem__)
        self._keys = [self.written[i] for i in order]
        self.order = np.array(order, dtype=np.int64)
        closed = [w if w[-1] == LOST else (*w, END) for w in self._keys]
        self.tokens = np.fromiter((t for w in closed for t in w), np.int64)
        self.begins = np.cumsum([0, *map(len, closed)])[:-1]

    def stretch(self, path: tuple[int, ...]) -> tuple[int, int]:
        """The places [start, stop) in `order` of the tokens that the student writes with `path` first."""
        if not path:
            return 0, len(self.order)
        return bisect_left(self._keys, path), bisect_left(self._keys, (*path[:-1], path[-1] + 1))

    def held(self, spans: Spans, student: Side, teacher: Side) -> tuple[list[int], list[bool]]:
        """(m,) the teacher's first token of each span; (m,) whether it is the only one, and what the student wrote.

        Of the student's tokens in such a span the teacher has a distribution.
        """
        inside = (spans.teacher >= 0).nonzero()[0]
        _, at, sizes = np.unique(spans.teacher[inside], return_index=True, return_counts=True)
        begins = inside[at].tolist()
        ours: list[list[int]] = [[] for _ in begins]
        for k, token in zip(spans.student.tolist(), student.ids, strict=True):
            if k >= 0:
                ours[k].append(token)
        return begins, [size == 1 and self._says(Side(mine, student.pieces), teacher.ids[t], teacher)
                        for mine, t, size in zip(ours, begins, sizes.tolist(), strict=True)]

    def _says(self, student: Side, token: int, teacher: Side) -> bool:
        """Whether tokens of the student's are one of the teacher's: the same text, or the same role.

        The first token of a text need not be, where its space is no text.
        """
        written, piece = self.written[token], teacher.piece(token)
        if not written or written == tuple(student.ids):
            return bool(written)
        return len(student.ids) == 1 if not piece else b"".join(map(student.piece, student.ids)) == piece


def _written(student: Mapping[bytes, int], pieces: Sequence[bytes],
             writer: Spelling | None) -> Iterator[tuple[int, ...]]:
    most = max(map(len, student), default=0)
    if writer is None:
        yield from (_longest(student, most, piece) for piece in pieces)
        return
    for piece, encoded in zip(pieces, writer.encode_all(pieces, opens=[False] * len(pieces)), strict=True):
        spelled = b"".join(map(writer.pieces.__getitem__, encoded.ids))
        yield encoded.ids if spelled == piece else _longest(student, most, piece)


def _longest(student: Mapping[bytes, int], most: int, piece: bytes) -> tuple[int, ...]:
    """The longest token that fits, one after another; most: bytes that a token has at most."""
    out, at = [], 0
    while at < len(piece):
        stop = next((s for s in range(min(len(piece), at + most), at, -1) if piece[at:s] in student), None)
        out.append(LOST if stop is None else student[piece[at:stop]])
        at = len(piece) if stop is None else stop
    return tuple(out)
