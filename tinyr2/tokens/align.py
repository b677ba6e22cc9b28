"""How the tokens of two tokenizers lie over the same bytes: spans that both cut off at the same places.

In: for either side the byte at which each token ends. Out: spans, the smallest runs of tokens on both sides that cover
the same bytes, in order. Integers alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class Spans:
    """m spans over n_s tokens of the student and n_t of the teacher; each has a token on either side.

    "ab|c|d" against "a|b|cd": student (0, 1, 1), teacher (0, 0, 1), count 2.
    """

    student: np.ndarray  # (n_s,) int64, the span of each token, never falling; -1: in none
    teacher: np.ndarray  # (n_t,) int64, likewise
    count: int
    sealed: np.ndarray | None = None  # (m,) bool, spans that never join the next one; None: the last alone

    @property
    def one_to_one(self) -> np.ndarray:
        """(m,) bool: one token on either side."""
        return (self._sizes(self.student) == 1) & (self._sizes(self.teacher) == 1)

    def kept(self, signal: Literal["exact", "chunk"]) -> np.ndarray:
        """(n_s,) bool: the student's tokens that a signal speaks of.

        `exact`: both boundaries are those of one token of the teacher; `chunk`: every token in a span.
        """
        if signal == "chunk":
            return self.student >= 0
        return np.append(self.one_to_one, False)[self.student]

    def merged(self, closes: np.ndarray, ends: np.ndarray | None = None) -> "Spans":
        """Spans joined until one closes: span i and i + 1 become one where `closes[i]` is false.

        closes (m,) bool    ends (m,) bool, spans that close besides the sealed ones, like the last of an answer
        The last span closes, and so do the sealed ones: those before lost bytes, before and at a token's role.
        """
        shut = closes | self._sealed() if ends is None else closes | self._sealed() | ends
        new = np.append(np.cumsum(shut) - shut, -1)  # how many closed before each span; -1 stays -1
        return Spans(new[self.student], new[self.teacher], int(shut.sum()), self._sealed()[shut])

    def _sealed(self) -> np.ndarray:
        last = np.arange(self.count) == self.count - 1
        return last if self.sealed is None else self.sealed | last

    def _sizes(self, side: np.ndarray) -> np.ndarray:
        return np.bincount(side[side >= 0], minlength=self.count)


def tile(student_ends: np.ndarray, teacher_ends: np.ndarray, *, stops: Sequence[int] | np.ndarray = (),
         lost: Sequence[tuple[int, int]] = ()) -> Spans:
    """The spans between the bytes at which both sides cut.

    student_ends (n_s,), teacher_ends (n_t,) int64, the byte at which each token ends, never falling; -1: in no span
    stops: bytes, in order, at which a span ends in any case, and is sealed
    lost: byte ranges [start, stop), in order and apart, that the two sides do not spell alike: tokens that touch one,
    and what shares a span with them, are in no span. A token of zero bytes goes with the bytes before its end, or
    stands alone if both sides cut before it.
    """
    ours, theirs, stops = _cuts(student_ends), _cuts(teacher_ends), _cuts(np.asarray(stops, dtype=np.int64))
    cuts = np.intersect1d(ours, theirs, assume_unique=True)
    if len(stops):
        cuts = np.union1d(cuts, stops)
    # Span k ends at cuts[k]; the one behind the last cut is no span.
    student, teacher = np.searchsorted(cuts, student_ends), np.searchsorted(cuts, teacher_ends)
    student[student_ends < 0], teacher[teacher_ends < 0] = len(cuts), len(cuts)
    whole = np.zeros(len(cuts) + 1, dtype=bool)
    whole[:-1] = ((np.bincount(student, minlength=len(cuts) + 1) > 0)
                  & (np.bincount(teacher, minlength=len(cuts) + 1) > 0))[:-1]
    broken = np.zeros(len(cuts) + 2, dtype=np.int64)
    starts, ends = np.array(lost, dtype=np.int64).reshape(-1, 2).T
    np.add.at(broken, np.searchsorted(cuts, starts, side="right"), 1)
    np.subtract.at(broken, np.searchsorted(cuts, ends) + 1, 1)
    whole &= broken.cumsum()[:-1] == 0
    sealed = np.isin(cuts, stops, assume_unique=True) | ~whole[1:]
    number = np.where(whole, np.cumsum(whole) - 1, -1)
    return Spans(number[student], number[teacher], int(whole.sum()), sealed[whole[:-1]])


def _cuts(ends: np.ndarray) -> np.ndarray:
    """The different ends, in order."""
    ends = ends[ends >= 0]
    return ends[np.append(True, ends[1:] != ends[:-1])] if len(ends) else ends
