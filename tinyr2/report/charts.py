"""Charts: curves as the coordinates of a small SVG, so that the page's template draws (and escapes) everything.

In: named series of (step, value). Out: `Chart`, whose numbers are pixels of a 360 × 190 view box and whose texts are
plain. Bounded in size: a long curve keeps the lowest and the highest point of each stretch, so that no spike is lost.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Point = tuple[float, float]  # step, value; the value may be NaN or infinite

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 48, 350, 10, 166  # the plot inside the view box
_MOST_POINTS = 400
_LOG_SPAN = 100.0  # a positive curve that spans more is drawn on a logarithmic axis


@dataclass(frozen=True)
class Line:
    """One curve. Where a value is not finite the line breaks."""

    name: str
    paths: tuple[str, ...]  # each the `points` of a polyline: "48,10 350,166"
    dots: tuple[tuple[str, str, str], ...]  # x, y and label of single measurements; dense curves have none
    last: str  # the newest finite value
    missing: int  # values that were not finite


@dataclass(frozen=True)
class Chart:
    """One small chart; positions are pixels as text, labels plain text."""

    title: str
    lines: tuple[Line, ...]
    x_ticks: tuple[tuple[str, str], ...]
    y_ticks: tuple[tuple[str, str], ...]
    marks: tuple[str, ...]  # x of vertical lines: alarms
    logarithmic: bool


def draw(title: str, series: Mapping[str, Sequence[Point]], steps: tuple[float, float],
         marks: Sequence[float] = (), dotted: frozenset[str] | set[str] = frozenset()) -> Chart | None:
    """A chart of `series` over the step axis `steps` (first, last); None where no value is finite.

    dotted: names of series that are single measurements (evaluations) and get a dot each.
    """
    values = [y for points in series.values() for _, y in points if math.isfinite(y)]
    if not values:
        return None
    logarithmic = min(values) > 0 and max(values) > _LOG_SPAN * min(values)
    low, high, y_ticks = _log_axis(values) if logarithmic else _linear_axis(min(values), max(values))
    scale = math.log10 if logarithmic else float

    def x_of(step: float) -> float:
        return LEFT + (RIGHT - LEFT) * ((step - steps[0]) / (steps[1] - steps[0]) if steps[1] > steps[0] else 0.5)

    def y_of(value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (scale(value) - low) / (high - low)

    lines = []
    for name, points in series.items():
        pixels = [(x_of(x), y_of(y) if math.isfinite(y) else math.nan) for x, y in points]
        dots = [(f"{px:.1f}", f"{py:.1f}", f"step {x:g}: {short(y)}")
                for (px, py), (x, y) in zip(pixels, points, strict=True)
                if math.isfinite(py) and (name in dotted or len(points) == 1)]
        finite = [y for _, y in points if math.isfinite(y)]
        lines.append(Line(name, tuple(_paths(_thin(pixels))), tuple(dots), short(finite[-1]) if finite else "–",
                          len(points) - len(finite)))
    first, last, x_labels = _linear_axis(*steps, whole=True)
    x_ticks = tuple((f"{x_of(x):.1f}", f"{x:,.0f}") for x in x_labels if steps[0] <= x <= steps[1])
    return Chart(title, tuple(lines), x_ticks, tuple((f"{y_of(y):.1f}", short(y)) for y in y_ticks),
                 tuple(f"{x_of(x):.1f}" for x in marks if steps[0] <= x <= steps[1]), logarithmic)


def short(value: float) -> str:
    """A number in few characters: 0.0312, 1.25, 340, 12k, 3.1e-07."""
    size = abs(value)
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if 1e12 > size >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.3g}{unit}"
    return f"{value:.2g}" if size < 1e-3 or size >= 1e12 else f"{value:.4g}" if size >= 100 else f"{value:.3g}"


def _linear_axis(low: float, high: float, whole: bool = False) -> tuple[float, float, list[float]]:
    """Bounds and three to six round ticks inside them; a flat curve gets room around it."""
    if high <= low:
        room = abs(low) * 0.1 or 1.0
        low, high = low - room, high + room
    raw = max(1.0, (high - low) / 4) if whole else (high - low) / 4
    unit = 10.0 ** math.floor(math.log10(raw))
    pace = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= raw * 0.999 and not (whole and unit * m % 1))
    first, last = math.ceil(low / pace - 1e-9), math.floor(high / pace + 1e-9)
    return low, high, [i * pace for i in range(first, last + 1)]


def _log_axis(values: Sequence[float]) -> tuple[float, float, list[float]]:
    """Bounds as exponents of ten, and a tick at each power inside them (every n-th, where there are many)."""
    low, high = math.log10(min(values)), math.log10(max(values))
    first, last = math.ceil(low - 1e-9), math.floor(high + 1e-9)
    return low, high, [10.0 ** i for i in range(first, last + 1, max(1, math.ceil((last - first) / 5)))]


def _thin(pixels: list[Point]) -> list[Point]:
    """At most about `_MOST_POINTS`: of each stretch the lowest and the highest, in their order."""
    if len(pixels) <= _MOST_POINTS:
        return pixels
    stretch = math.ceil(len(pixels) / (_MOST_POINTS // 2))
    kept = []
    for start in range(0, len(pixels), stretch):
        part = [p for p in pixels[start:start + stretch] if math.isfinite(p[1])]
        if part:
            low, high = min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])
            kept += [low] if low == high else sorted((low, high))
        else:
            kept.append(pixels[start])
    return kept


def _paths(pixels: list[Point]) -> list[str]:
    """The runs of finite points, each as an SVG `points` text."""
    runs: list[list[str]] = [[]]
    for x, y in pixels:
        if math.isfinite(y):
            runs[-1].append(f"{x:.1f},{y:.1f}")
        elif runs[-1]:
            runs.append([])
    return [" ".join(run) for run in runs if len(run) > 1]
