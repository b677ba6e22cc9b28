"""Result tables: named rows of measured values, formatted once for console and page.

In: `{"rows": {name: {column: value}}}`, as result.json has it. Out: a `Table` of texts, and its plain form.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tinyr2.report.text import clean

Values = Mapping[str, Any]

_LABELS = {"pass_at_1": "pass@1", "tokens_per_s": "tokens/s", "peak_mib": "peak MiB"}


@dataclass(frozen=True)
class Row:
    """One line of a table. Row("teacher", ("1,002,960", "97.3%"))"""

    name: str
    cells: tuple[str, ...]  # one per column


@dataclass(frozen=True)
class Table:
    """Column names and rows, all of them texts ready to print. The row names have a column of their own, unnamed."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    title: str = ""

    def __post_init__(self):
        for row in self.rows:
            count = len(row.cells)
            assert count == len(self.columns), f"{row.name}: {count} cells, {len(self.columns)} columns"


def result_table(rows: Mapping[str, Values], title: str = "") -> Table:
    """A table of measured rows: columns in the order in which they first occur, `low` and `high` as one interval.

    Values that are no single figure or word (a list with a verdict for each problem) are left out.
    """
    keys = list(dict.fromkeys(key for values in rows.values() for key, value in values.items()
                              if not isinstance(value, (Mapping, list, tuple))))
    paired = "low" in keys and all(("high" in values) == ("low" in values) for values in rows.values())
    if paired:
        keys.remove("high")
    columns = tuple("95% interval" if key == "low" and paired else _LABELS.get(key, clean(key)) for key in keys)
    return Table(columns, tuple(Row(clean(name), tuple(_cell(key, values, paired) for key in keys))
                                for name, values in rows.items()), title)


def to_text(table: Table) -> str:
    """The table as aligned plain lines: names to the left, values to the right."""
    grid = [("", *table.columns), *((row.name, *row.cells) for row in table.rows)]
    widths = [max(len(line[i]) for line in grid) for i in range(len(grid[0]))]
    lines = ["  ".join(text.ljust(width) if i == 0 else text.rjust(width)
                       for i, (text, width) in enumerate(zip(line, widths, strict=True))) for line in grid]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in ([table.title] if table.title else []) + lines)


def format_value(key: str, value: Any) -> str:
    """One value as a person reads it: shares in percent, counts with thousands, other numbers to four figures."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return clean(str(value))
    if _is_share(key) and 0 <= value <= 1:
        return f"{value:.1%}"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if key in ("seconds", "tokens_per_s", "peak_mib") else f"{value:.4g}"


def _cell(key: str, values: Values, paired: bool) -> str:
    if key == "low" and paired and values.get("low") is not None:
        return f"{format_value('low', values['low'])} – {format_value('high', values['high'])}"
    return format_value(key, values.get(key))


def _is_share(key: str) -> bool:
    return key in ("low", "high") or key.startswith(("pass_at_", "maj_at_", "pass@", "maj@"))
