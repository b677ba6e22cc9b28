"""Texts as two tokenizers write them: which tokens cover the same bytes, and what each signal keeps of them.

In: a `Translator`, for its two tokenizers, and texts by kind. Out: the line-up of each text, and from these shares,
special tokens by role, lost bytes and the longest spans, as plain values for tables and JSON. Integers and bytes alone.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tinyr2.core.errors import DataError
from tinyr2.tokens.align import Spans, tile
from tinyr2.tokens.prefixes import Side
from tinyr2.tokens.spelling import Encoded, Spelling
from tinyr2.tokens.translate import Translator

Signal = Literal["exact", "chunk", "mapped", "marginal"]
SIGNALS: tuple[Signal, ...] = ("exact", "chunk", "mapped", "marginal")
WORST, LOST, NAMED = 5, 10, 20  # how many spans, lost texts and special tokens are named


@dataclass(frozen=True)
class Block:
    """Neighboring tokens of both sides that go together: a span, or what is in none."""

    student: slice
    teacher: slice
    aligned: bool

    @property
    def size(self) -> tuple[int, int]:
        """(Tokens of the student, tokens of the teacher)."""
        return self.student.stop - self.student.start, self.teacher.stop - self.teacher.start


@dataclass(frozen=True)
class Lineup:
    """One text as both tokenizers write it: n_s tokens of the student and n_t of the teacher."""

    kind: str
    text: bytes
    student: Encoded
    teacher: Encoded
    spans: Spans
    mapped: np.ndarray  # (n_s,) bool: alone in its span, against a token of the same bytes in the vocabularies' pairs
    marginal: np.ndarray  # (n_s,) bool: inside of one token of the teacher's, who has a distribution there

    def kept(self, signal: Signal) -> np.ndarray:
        """(n_s,) bool: the student's tokens that a signal speaks of; with `marginal`, those with a distribution."""
        own = {"mapped": self.mapped, "marginal": self.marginal}
        return own[signal] if signal in own else self.spans.kept(signal)

    def kept_bytes(self, signal: Signal) -> int:
        """How many bytes of the text those tokens are."""
        return int(np.diff(self.student.ends, prepend=0)[self.kept(signal)].sum())

    def blocks(self) -> list[Block]:
        """Both sides' tokens in order, cut into spans and what lies between them."""
        out, begin = [], (0, 0)
        ours, theirs = _runs(self.spans.student, self.spans.count), _runs(self.spans.teacher, self.spans.count)
        ends = (len(self.student.ids), len(self.teacher.ids))
        for a, b in zip([*ours, slice(ends[0], ends[0])], [*theirs, slice(ends[1], ends[1])], strict=True):
            if (a.start, b.start) != begin:
                out.append(Block(slice(begin[0], a.start), slice(begin[1], b.start), False))
            out.append(Block(a, b, True))
            begin = (a.stop, b.stop)
        return out[:-1]


def line_up(translator: Translator, texts: Sequence[tuple[str, str]]) -> list[Lineup]:
    """Each (kind, text) as both sides write it; DataError where there is no text at all."""
    kinds, raw = [kind for kind, _ in texts], [text.encode() for _, text in texts]
    if not any(raw):
        raise DataError("the texts have not one byte; give a file with text in it")
    ours, theirs = translator.student.encode_all(raw), translator.teacher.encode_all(raw)
    partner = np.full(translator.student.vocab, -1)
    partner[translator.pairs[0]] = translator.pairs[1]
    return [_lineup(*each, partner, translator) for each in zip(kinds, raw, ours, theirs, strict=True)]


def compare(lineups: Sequence[Lineup]) -> dict[str, Any]:
    """The shares (0 to 1) over all texts, and under `kinds` those of each kind."""
    kinds: dict[str, list[Lineup]] = {}
    for one in lineups:
        kinds.setdefault(one.kind, []).append(one)
    return {**shares(lineups), "kinds": {kind: shares(some) for kind, some in kinds.items()}}


def shares(lineups: Sequence[Lineup]) -> dict[str, Any]:
    """`bytes_covered`: the share of bytes in spans, and of each signal the share of student tokens and bytes kept.

    Of `marginal` these are the tokens with a distribution; what else is in spans it treats as `chunk` does.
    """
    tokens, size = sum(len(one.student.ids) for one in lineups), sum(len(one.text) for one in lineups)
    found: dict[str, Any] = {
        signal: {"tokens": sum(int(one.kept(signal).sum()) for one in lineups) / max(tokens, 1),
                 "bytes": sum(one.kept_bytes(signal) for one in lineups) / max(size, 1)} for signal in SIGNALS}
    return {"bytes_covered": found["chunk"]["bytes"], **found, "size": {
        "texts": len(lineups), "bytes": size, "student_tokens": tokens,
        "teacher_tokens": sum(len(one.teacher.ids) for one in lineups)}}


def vocabulary(translator: Translator) -> dict[str, Any]:
    """How many ids have a partner of the same bytes or role, and which share of either vocabulary that is."""
    shared, sizes = len(translator.pairs[0]), [_size(s) for s in (translator.student, translator.teacher)]
    return {"shared": shared, "student": sizes[0], "teacher": sizes[1],
            "student_share": shared / sizes[0], "teacher_share": shared / sizes[1]}


def roles(translator: Translator) -> dict[str, Any]:
    """What ends a turn, what opens and closes a thought, and the special tokens without a counterpart."""
    ours, theirs, found = translator.student, translator.teacher, translator.roles
    pairs = [{"role": "end", "student": _token(ours, i), "teacher": [_token(theirs, found.end)]}
             for i in found.ends if found.end is not None]
    pairs += [{"role": "think_open" if ours.name(i) in found.opens else "think_close", "student": _token(ours, i),
               "teacher": [_token(theirs, k) for k in ids]} for i, ids in found.said.items() if ids]
    paired = [{pair["student"]["id"] for pair in pairs}, {t["id"] for pair in pairs for t in pair["teacher"]}]
    alone = [sorted(side.special - known) for side, known in zip((ours, theirs), paired, strict=True)]
    return {"paired": pairs, "unpaired": {
        name: {"count": len(ids), "tokens": [_token(side, i) for i in ids[:NAMED]]}
        for name, side, ids in zip(("student", "teacher"), (ours, theirs), alone, strict=True)}}


def lost_bytes(lineups: Sequence[Lineup]) -> list[dict[str, Any]]:
    """The bytes that a side's tokens do not spell, most frequent first."""
    counts = Counter((side, one.kind, readable(one.text[a:b])) for one in lineups for side in ("student", "teacher")
                     for a, b in getattr(one, side).lost)
    return [{"side": side, "kind": kind, "text": text, "count": n}
            for (side, kind, text), n in counts.most_common(LOST)]


def worst(lineups: Sequence[Lineup], translator: Translator) -> list[dict[str, Any]]:
    """The spans of the most tokens, both sides counted; those of one token on either side are none of them."""
    found: dict[bytes, tuple[Lineup, Block]] = {}
    for one in lineups:
        for block in one.blocks():
            if block.aligned and block.size != (1, 1):
                found.setdefault(b"".join(tokens_of(one, block, translator)[0]), (one, block))
    longest = sorted(found.items(), key=lambda item: -sum(item[1][1].size))[:WORST]
    return [{"kind": one.kind, "text": readable(text)} | dict(zip(
        ("student", "teacher"), ([readable(t) for t in side] for side in tokens_of(one, block, translator)),
        strict=True)) for text, (one, block) in longest]


def tokens_of(one: Lineup, block: Block, translator: Translator) -> tuple[list[bytes], list[bytes]]:
    """The bytes of a block's tokens on either side: in a span those of the text, else those that the tokens spell."""
    out = []
    for encoded, where, spelling in ((one.student, block.student, translator.student),
                                     (one.teacher, block.teacher, translator.teacher)):
        begins = np.append(0, encoded.ends)
        out.append([one.text[begins[k]:begins[k + 1]] if block.aligned else
                    spelling.pieces[encoded.ids[k]] or spelling.name(encoded.ids[k]).encode()
                    for k in range(where.start, where.stop)])
    return out[0], out[1]


def readable(raw: bytes) -> str:
    r"""Bytes as text; what is no whole character reads `\xf0`."""
    return raw.decode(errors="backslashreplace")


def _lineup(kind: str, text: bytes, ours: Encoded, theirs: Encoded, partner: np.ndarray,
            translator: Translator) -> Lineup:
    spans = tile(ours.ends, theirs.ends, lost=_union([*ours.lost, *theirs.lost]))
    mapped = spans.kept("exact")
    first = np.zeros(spans.count + 1, dtype=np.int64)  # the teacher's token of a span that has one alone
    first[spans.teacher] = np.array(theirs.ids, dtype=np.int64)
    mapped &= partner[np.array(ours.ids, dtype=np.int64)] == first[spans.student]
    _, held = translator.prefixes.held(spans, Side(ours.ids, translator.student.pieces),
                                       Side(theirs.ids, translator.teacher.pieces))
    return Lineup(kind, text, ours, theirs, spans, mapped, np.array([*held, False])[spans.student])


def _runs(span: np.ndarray, count: int) -> list[slice]:
    """The tokens of each span, which lie side by side."""
    inside = (span >= 0).nonzero()[0]
    first = np.searchsorted(span[inside], np.arange(count))
    last = np.searchsorted(span[inside], np.arange(count), side="right") - 1
    return [slice(int(a), int(b) + 1) for a, b in zip(inside[first], inside[last], strict=True)]


def _union(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The ranges in order, those that touch as one."""
    out: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(stop, out[-1][1]))
        else:
            out.append((start, stop))
    return out


def _size(spelling: Spelling) -> int:
    return sum(1 for piece in spelling.pieces if piece) + len(spelling.special)


def _token(spelling: Spelling, i: int) -> dict[str, Any]:
    return {"id": i, "token": spelling.name(i)}
