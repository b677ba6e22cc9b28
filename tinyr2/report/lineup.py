r"""How two tokenizers line up, as tables and as drawings for a terminal.

In: line-ups (`tokens/lineup.py`) and the values made of them. Out: a `Table`, and lines of text. A drawing is measured
in a terminal's cells, of which a Chinese character has two; what has no cell of its own (joiners, combining marks,
skin tones) is written as an escape, so that no terminal joins it to its neighbor.
"""

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len, set_cell_size

from tinyr2.report.table import Row, Table
from tinyr2.report.text import clean
from tinyr2.tokens.lineup import SIGNALS, Block, Lineup, readable, tokens_of
from tinyr2.tokens.translate import Translator

SPAN, INNER = "┃", "╎"  # between spans, between the tokens of one
MANY, NONE = "~", "×"  # under a span of several tokens, under what is in no span
WIDTH, ROWS = 100, 2  # cells of a line, and lines of a drawing
_SEEN = {" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍", "": "∅"}
_JOINED = {"Mn", "Me", "Mc", "Cf", "Cc", "Cs", "Co", "Cn", "Zl", "Zp"}  # categories without a cell that is theirs alone


@dataclass(frozen=True)
class _Drawn:
    """A block as three texts of one width in cells."""

    student: str
    teacher: str
    mark: str


def lineup_table(found: Mapping[str, Any]) -> Table:
    """A row for each kind of text and one for all; what each signal keeps of A's tokens and of the bytes.

    Narrow enough for a terminal of 80 cells; the bytes covered are those that `chunk` keeps, and `marginal` has those
    with a distribution.
    """
    columns = ("of A", "of B", *SIGNALS)
    rows = {**found["kinds"], "all": found} if len(found["kinds"]) > 1 else found["kinds"]
    return Table(columns, tuple(Row(clean(kind), _cells(one)) for kind, one in rows.items()),
                 "tokens; % of A's/of the bytes that a signal keeps (marginal: has distributions)")


def roles_lines(found: Mapping[str, Any]) -> list[str]:
    """The vocabulary that both share, special tokens by role, those without a counterpart, and lost bytes."""
    v, roles = found["vocabulary"], found["roles"]
    lines = [f"mapped vocabulary: {v['shared']:,} tokens, {v['student_share']:.1%} of A's {v['student']:,} and "
             f"{v['teacher_share']:.1%} of B's {v['teacher']:,}", "special tokens by role:"]
    lines += [f"  {pair['role']:<12} {_named(pair['student'])} → {' '.join(map(_named, pair['teacher']))}"
              for pair in roles["paired"]] or ["  none"]
    for side, label in (("student", "A"), ("teacher", "B")):
        alone = roles["unpaired"][side]
        more = f" and {alone['count'] - len(alone['tokens'])} more" if alone["count"] > len(alone["tokens"]) else ""
        if alone["count"]:
            lines.append(f"  only {label:<7} {', '.join(map(_named, alone['tokens']))}{more}")
    lines.append("lost bytes: none" if not found["lost"] else "lost bytes, which a side's tokens do not spell:")
    return lines + [f"  {'A' if lost['side'] == 'student' else 'B'}, {clean(lost['kind'])}: {shown(lost['text'])}"
                    + (f" ({lost['count']} times)" if lost["count"] > 1 else "") for lost in found["lost"]]


def worst_lines(found: Mapping[str, Any], width: int = WIDTH) -> list[str]:
    """The longest spans, both sides' tokens shown; no line is wider than `width` cells."""
    lines = ["longest spans:" if found["worst"] else "longest spans: none, every span is one token on either side"]
    for one in found["worst"]:
        lines.append(f"  {clean(one['kind'])}, {len(one['student'])} to {len(one['teacher'])} tokens")
        lines += [f"    {label} {_cut(INNER.join(map(shown, one[side])), width - 6)}"
                  for label, side in (("A", "student"), ("B", "teacher"))]
    return lines


def lineup_lines(lineups: Sequence[Lineup], translator: Translator, width: int = WIDTH) -> list[str]:
    """One line of the first text of each kind, A's tokens above B's.

    It is the text's line with the most tokens outside spans of one token each. width: cells, at most
    """
    firsts: dict[str, Lineup] = {}
    for one in lineups:
        firsts.setdefault(one.kind, one)
    lines = [f"{SPAN} both cut here   {INNER} one of them does   {MANY} a span of several tokens   {NONE} in no span"]
    for kind, one in firsts.items():
        lines += ["", f"{clean(kind)}:", *_draw(one, translator, width)]
    return lines


def shown(text: str) -> str:
    """`text` with every character in cells of its own: spaces and ends of lines as signs, others as escapes."""
    return "".join(_SEEN.get(c) or (_escape(c) if _joins(c) else c) for c in text) or _SEEN[""]


def _draw(one: Lineup, translator: Translator, width: int) -> Iterator[str]:
    rows: list[list[_Drawn]] = [[]]
    for block in _telling(one):
        drawn = _drawn(one, block, translator, width - 4)
        if sum(cell_len(d.mark) + 1 for d in (*rows[-1], drawn)) > width - 3 and rows[-1]:
            if len(rows) == ROWS:
                break
            rows.append([])
        rows[-1].append(drawn)
    for row in rows:
        yield f"A {SPAN}{SPAN.join(d.student for d in row)}{SPAN}"
        yield f"B {SPAN}{SPAN.join(d.teacher for d in row)}{SPAN}"
        marks = " ".join(d.mark for d in row).rstrip()
        if marks:
            yield f"   {marks}"


def _telling(one: Lineup) -> list[Block]:
    """The blocks that begin in the most telling line of the text, the first of the best."""
    lines: dict[int, list[Block]] = {}
    for block in one.blocks():
        begin = int(one.student.ends[block.student.start - 1]) if block.student.start else 0
        lines.setdefault(one.text.count(b"\n", 0, begin), []).append(block)
    return max(lines.values(), key=lambda line: sum(b.size[0] for b in line if b.size != (1, 1) or not b.aligned),
               default=[])


def _drawn(one: Lineup, block: Block, translator: Translator, most: int) -> _Drawn:
    sides = [INNER.join(shown(readable(token)) for token in side) for side in tokens_of(one, block, translator)]
    width = min(max(map(cell_len, sides)), most)
    mark = " " if block.aligned and block.size == (1, 1) else MANY if block.aligned else NONE
    return _Drawn(*(set_cell_size(_cut(side, width), width) for side in sides), mark * width)


def _cut(text: str, most: int) -> str:
    return text if cell_len(text) <= most else f"{set_cell_size(text, most - 1)}…"


def _cells(one: Mapping[str, Any]) -> tuple[str, ...]:
    size = one["size"]
    return (f"{size['student_tokens']:,}", f"{size['teacher_tokens']:,}",
            *("/".join(_percent(one[signal][unit]) for unit in ("tokens", "bytes")) for signal in SIGNALS))


def _percent(share: float) -> str:
    return "100" if share == 1 else f"{100 * share:.1f}"


def _named(token: Mapping[str, Any]) -> str:
    return f"{shown(token['token'])} ({token['id']})"


def _joins(c: str) -> bool:
    return (unicodedata.category(c) in _JOINED or unicodedata.bidirectional(c) in ("R", "AL")
            or 0x1F3FB <= ord(c) <= 0x1F3FF or 0x1F1E6 <= ord(c) <= 0x1F1FF)


def _escape(c: str) -> str:
    return c.encode("ascii", "backslashreplace").decode() if ord(c) > 0x7E else f"\\x{ord(c):02x}"
