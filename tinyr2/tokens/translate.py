"""A student's answer as its teacher would read it: the teacher's prompt, the teacher's tokens, and how they line up.

In: the two tokenizers, then raw messages with the token ids that the student wrote after them. Out: the same for the
teacher, with the spans of both sides that cover the same bytes, and the bytes that the teacher cannot spell.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from tinyr2.core.types import Message, Rollout
from tinyr2.tokens.align import Spans, tile
from tinyr2.tokens.chat import render_example, render_prompt
from tinyr2.tokens.prefixes import Prefixes
from tinyr2.tokens.roles import TAIL, Roles
from tinyr2.tokens.spelling import Encoded, Spelling

_PROBE = "zqx"  # an answer that no template's own text contains


@dataclass(frozen=True)
class Translation:
    """What the teacher reads in place of one answer."""

    prompt_ids: tuple[int, ...]  # the teacher's, from its own template
    response_ids: tuple[int, ...]  # (n_t,) the teacher's
    spans: Spans  # over the student's n_s response ids and these n_t
    bytes: int  # of the student's text; role tokens are none of it
    lost: tuple[tuple[int, int], ...]  # byte ranges of this text that the teacher's tokens do not spell
    unpaired: int  # the student's tokens that stand for no text and have no counterpart
    opened: int = 0  # of these, the first ones, which open the thought that the teacher's prompt has opened already


class Answer(NamedTuple):
    """What a student wrote; a Rollout is one too. prompt_ids: the student's, None: as its template renders them."""

    response_ids: Sequence[int]
    prompt_ids: Sequence[int] | None = None


@dataclass(frozen=True)
class _Row:
    """One answer among all: tokens [start, stop), and which of them are no text."""

    start: int
    stop: int
    prompt_ids: tuple[int, ...]  # the teacher's
    roles: tuple[tuple[int, int, tuple[int, ...]], ...]  # tokens [begin, end) and what the teacher says for them
    silent: tuple[int, ...]  # tokens without a counterpart
    opened: int  # of these, the first ones, which the teacher's prompt has already


class _Part(NamedTuple):
    """A run of text between two roles: tokens [begin, end) of the student."""

    begin: int
    end: int
    text: bytes
    opens: bool  # whether the answer begins here


class Translator:
    """From one tokenizer and template to another."""

    def __init__(self, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase,
                 roles: Mapping[str, tuple[str, str]] | None = None):
        """roles: `think_open`, `think_close` to (the student's text, the teacher's), beside the known ones.

        DataError: a tokenizer whose bytes cannot be recovered.
        """
        self._student, self._teacher, self._named = student, teacher, roles or {}
        self.student, self.teacher = Spelling.of(student), Spelling.of(teacher)

    @cached_property
    def roles(self) -> Roles:
        """End of turn and thoughts, on both sides."""
        return Roles.of(self._student, self._teacher, (self.student, self.teacher), self._named)

    @cached_property
    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """((p,), (p,)) int64: the student's and the teacher's ids of the same bytes, and then of the same roles.

        One to one; where several ids have the same bytes, the one that the tokenizer itself writes, else the smallest.
        """
        theirs = self.teacher.ids_of_bytes()
        found = {i: theirs[piece] for piece, i in self.student.ids_of_bytes().items() if piece in theirs}
        taken = set(found.values())
        by_role = {i: ids[0] for i, ids in self.roles.said.items() if len(ids) == 1}
        by_role |= {i: self.roles.end for i in self.roles.ends if self.roles.end is not None}
        for i, other in by_role.items():
            if i not in found and other not in taken:
                found[i] = other
                taken.add(other)
        return (np.fromiter(found.keys(), np.int64, len(found)), np.fromiter(found.values(), np.int64, len(found)))

    @cached_property
    def prefixes(self) -> Prefixes:
        """The teacher's vocabulary as the student writes it."""
        ours, theirs = self.student, self.teacher
        # a text of one that is a special token of the other's (<think>) is a role, too
        roles = {int(t): int(s) for s, t in zip(*self.pairs, strict=True) if not (theirs.pieces[t] and ours.pieces[s])}
        return Prefixes(ours.ids_of_bytes(), theirs.pieces, roles, ours)

    def translate(self, messages: Sequence[Message], response_ids: Sequence[int], *,
                  prompt_ids: Sequence[int] | None = None) -> Translation:
        """One answer; see `translate_all`."""
        return self.translate_all([(messages, Answer(response_ids, prompt_ids))])[0]

    def translate_all(self, items: Sequence[tuple[Sequence[Message], Rollout | Answer]]) -> list[Translation]:
        """Each answer for the teacher, whose template renders the messages.

        DataError: the teacher has no chat template, or it rejects the roles.
        """
        ids = [i for _, answer in items for i in answer.response_ids]
        known = np.minimum(np.array(ids, dtype=np.int64), self.student.vocab)
        found = [*map(self._pieces.__getitem__, known.tolist())]
        rows = self._rows(items, ids, self._marks[known].nonzero()[0].tolist(), found)
        lengths = np.fromiter(map(len, found), np.int64, len(found))
        whole, bytes_before = b"".join(found), np.append(0, lengths.cumsum())
        parts = [list(self._parts(row, whole, bytes_before)) for row in rows]
        flat = [p for own in parts for p in own]
        written = iter(self.teacher.encode_all([p.text for p in flat], opens=[p.opens for p in flat]))
        return _Page(rows, lengths, bytes_before).lined_up([[(p, next(written)) for p in own] for own in parts])

    @cached_property
    def _pieces(self) -> tuple[bytes, ...]:
        return (*self.student.pieces, b"")

    @cached_property
    def _marks(self) -> np.ndarray:
        """(vocab + 1,) bool: the student's ids that are more, or less, than text."""
        marks = np.array([not piece for piece in self._pieces])
        marks[list(self.roles.said)] = True
        return marks

    @cached_property
    def _opens(self) -> bool:
        """Whether the teacher's template lets an answer begin as a text does, so with the space of its first word."""
        if not self.teacher.prefixes:
            return True
        _, ids = render_example(self._teacher, (Message("user", "hello"),), (Message("assistant", _PROBE),))
        return b"".join(self.teacher.pieces[i] for i in ids).startswith(b" ")

    def _rows(self, items: Sequence[tuple[Sequence[Message], Rollout | Answer]], ids: list[int], marked: list[int],
              found: list[bytes]) -> list[_Row]:
        """Sets apart what is no text: in `found`, the bytes of each token, it then has none."""
        rows, prompts, stop, mark = [], {}, 0, 0
        for messages, answer in items:
            start, stop = stop, stop + len(answer.response_ids)
            mine, mark = mark, bisect_left(marked, stop, mark)
            key = (tuple(messages), None if answer.prompt_ids is None else tuple(answer.prompt_ids[-TAIL:]))
            if key not in prompts:
                prompts[key] = self._prompt(messages, answer.prompt_ids)
            prompt_ids, opened = prompts[key]
            first = self.student.first_piece(ids[start:stop])
            if first is not None:
                found[start + first[0]] = first[1]
            again = 0 if opened is None else self._opened_again(ids[start:stop], opened)
            roles, silent = self._set_apart(ids, start + again, stop, marked[mine:mark], found)
            silent = (*range(start, start + again), *silent)
            for k in (*silent, *(k for begin, end, _ in roles for k in range(begin, end))):
                found[k] = b""
            rows.append(_Row(start, stop, prompt_ids, tuple(roles), silent, again))
        return rows

    def _prompt(self, messages: Sequence[Message],
                student_ids: Sequence[int] | None) -> tuple[tuple[int, ...], str | None]:
        """(The teacher's prompt; where it alone has opened a thought, the white space after that).

        Where the student's alone has, the teacher's own opening is added.
        """
        prompt = render_prompt(self._teacher, messages)
        if student_ids is None:
            student_ids = render_prompt(self._student, messages) if self._student.chat_template else ()
        ours, theirs = (self.roles.opened(self._student, student_ids), self.roles.opened(self._teacher, prompt))
        if ours is not None and theirs is None:
            (space,) = self.teacher.encode_all([ours[1].encode()], opens=[False])
            prompt = (*prompt, *self.roles.opens[ours[0]], *space.ids)
        return prompt, theirs[1] if theirs is not None and ours is None else None

    def _opened_again(self, ids: Sequence[int], space: str) -> int:
        """How many of the first tokens open the thought that the teacher's prompt has opened, with its white space."""
        read, count = "", 0
        for n, i in enumerate(ids[:TAIL], 1):
            read = (read + self.student.name(i)).lstrip()
            if read in self.roles.opens:
                count = n
            if any(read == text + space for text in self.roles.opens):
                return n
        return count

    def _set_apart(self, ids: list[int], start: int, stop: int, marked: Sequence[int],
                   found: list[bytes]) -> tuple[list[tuple[int, int, tuple[int, ...]]], list[int]]:
        """(Roles with what the teacher says for them, tokens that it has nothing for), among tokens [start, stop)."""
        said = {k: self.roles.said.get(ids[k], ()) for k in marked if k >= start}
        if stop > start and ids[stop - 1] in self.roles.ends:
            said[stop - 1] = () if self.roles.end is None else (self.roles.end,)
        roles = [(k, k + 1, theirs) for k, theirs in said.items() if theirs]
        for text, theirs in self.roles.phrases.items():
            roles += [(begin, end, theirs) for begin, end in _runs(found, start, stop, text)]
        return sorted(roles), [k for k, theirs in said.items() if not theirs]

    def _parts(self, row: _Row, whole: bytes, bytes_before: np.ndarray) -> Iterator[_Part]:
        begin, opens = row.start, self._opens
        for role in (*row.roles, (row.stop, row.stop, ())):
            if role[0] > begin:
                text = whole[bytes_before[begin]:bytes_before[role[0]]]
                yield _Part(begin, role[0], text, opens)
                opens = opens and not text
            begin = role[1]


class _Page(NamedTuple):
    """All answers end to end, on one scale: a byte is a step, and so is a role.

    What begins an answer or follows a role is one step apart from what was before, so that a token of zero bytes there
    shares no cut with it.
    """

    rows: Sequence[_Row]
    lengths: np.ndarray  # (n,) int64 bytes of each of the student's tokens
    bytes_before: np.ndarray  # (n + 1,)

    def lined_up(self, parts: Sequence[Sequence[tuple[_Part, Encoded]]]) -> list[Translation]:
        """parts: of each answer, as the teacher writes them"""
        steps = self._steps()
        ids: list[int] = []
        ends, stops, lost, counts = [np.zeros(0, dtype=np.int64)], [], [], [0]
        for row, own in zip(self.rows, parts, strict=True):
            said = [(begin, end, None, theirs) for begin, end, theirs in row.roles]
            for begin, end, encoded, theirs in sorted([*said, *((p.begin, p.end, e, ()) for p, e in own)],
                                                      key=lambda part: part[0]):
                stops.append(int(steps[end - 1]))
                if encoded is None:
                    ids += theirs
                    ends.append(np.full(len(theirs), stops[-1]))
                    continue
                base = int(steps[begin] - self.lengths[begin])
                ids += encoded.ids
                ends.append(encoded.ends + base)
                lost += [(a + base, b + base) for a, b in encoded.lost]
            counts.append(len(ids))
        steps[[k for row in self.rows for k in row.silent]] = -1
        spans = tile(steps, np.concatenate(ends), stops=stops, lost=lost)
        return [self._translation(row, ids[a:b], own, s) for row, own, s, (a, b) in zip(
            self.rows, parts, self._split(spans, counts), pairwise(counts), strict=True)]

    def _steps(self) -> np.ndarray:
        """(n,) int64: where on the scale each of the student's tokens ends."""
        gaps = np.zeros(len(self.lengths) + 1, dtype=np.int64)
        for row in self.rows:
            gaps[row.start] += row.stop > row.start
            for begin, end, _ in row.roles:
                gaps[begin] += 1
                gaps[end] += end < row.stop
        return (self.lengths + gaps[:-1]).cumsum()

    def _split(self, spans: Spans, counts: Sequence[int]) -> Iterator[Spans]:
        """The spans of each answer, counted from 0."""
        firsts = [0]
        for start, stop in pairwise(counts):
            firsts.append(max(firsts[-1], int(spans.teacher[start:stop].max(initial=-1)) + 1))
        student = spans.student - np.repeat(firsts[:-1], [row.stop - row.start for row in self.rows])
        teacher = spans.teacher - np.repeat(firsts[:-1], np.diff(counts))
        student[spans.student < 0], teacher[spans.teacher < 0] = -1, -1
        for row, (a, b), (lo, hi) in zip(self.rows, pairwise(counts), pairwise(firsts), strict=True):
            yield Spans(student[row.start:row.stop], teacher[a:b], hi - lo, spans.sealed[lo:hi])

    def _translation(self, row: _Row, ids: list[int], parts: Sequence[tuple[_Part, Encoded]],
                     spans: Spans) -> Translation:
        begin = self.bytes_before[row.start]
        bases = [int(self.bytes_before[p.begin] - begin) for p, _ in parts]
        lost = [(a + base, b + base) for base, (_, e) in zip(bases, parts, strict=True) for a, b in e.lost]
        return Translation(row.prompt_ids, tuple(ids), spans, int(self.bytes_before[row.stop] - begin), tuple(lost),
                           len(row.silent), row.opened)


def _runs(found: Sequence[bytes], start: int, stop: int, text: bytes) -> Iterator[tuple[int, int]]:
    """The runs of tokens that spell `text` from the first byte of one to the last byte of another."""
    ends = [*accumulate(map(len, found[start:stop]), initial=0)]
    whole, at = b"".join(found[start:stop]), 0
    while (at := whole.find(text, at)) >= 0:
        begin, end = bisect_right(ends, at) - 1, bisect_left(ends, at + len(text))
        if ends[begin] == at and ends[end] == at + len(text):
            yield start + begin, start + end
        at += len(text)
