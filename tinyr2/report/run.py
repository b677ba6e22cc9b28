"""A run folder, read: each of its pieces is optional, and what is there is brought into one value.

In: the folder. Out: `RunView`, from which page and JSON are made, and `report_data`, its JSON twin.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tinyr2.core.errors import DataError, RunError
from tinyr2.report.charts import Point
from tinyr2.report.completions import Completion, completion_files, read_completions
from tinyr2.report.jsonl import read_jsonl, strict

Rows = list[dict[str, Any]]

_PIECES = ("config.resolved.yaml", "env.json", "metrics.jsonl", "timing.jsonl", "events.jsonl", "completions",
           "checkpoints", "final", "result.json")
_SAMPLES = 24
_SAMPLES_PER_STEP = 6  # so that 24 samples show several steps
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass(frozen=True, kw_only=True)
class RunView:
    """What a run folder holds; None or empty where a piece is missing."""

    name: str
    status: str  # how it ended ("finished", "stopped", "halted"), or "unfinished" and how far it came
    steps: int | None  # the last step in metrics.jsonl
    seconds: float | None
    config: str | None  # the resolved YAML
    env: dict[str, Any] | None
    result: dict[str, Any] | None
    curves: dict[str, list[Point]]  # metric → (step, value) in the order of the steps
    alarms: Rows  # the events that carry evidence
    events: Rows  # the others
    completions: list[Completion]  # newest steps first, at most 24


def read_run(run: Path) -> RunView:
    """Read a run folder. RunError where it is none, DataError where a piece is damaged."""
    run = Path(run)
    if not run.is_dir():
        raise RunError(f"{run}: no such run folder; `tinyr2 runs` lists those that are there")
    if not any((run / piece).exists() for piece in _PIECES):
        raise RunError(f"{run}: not a run folder, it has none of {', '.join(_PIECES)}; name the folder given as the "
                       "output of a run")
    events = _rows(run / "events.jsonl")
    curves = _curves(run / "metrics.jsonl")
    result = _json(run / "result.json")
    steps = max((int(points[-1][0]) for points in curves.values()), default=None)
    config = run / "config.resolved.yaml"
    return RunView(
        name=run.resolve().name, status=_status(run, events, steps), steps=steps, seconds=_seconds(run, result),
        config=config.read_text(encoding="utf-8") if config.is_file() else None, env=_json(run / "env.json"),
        result=result, curves=curves, alarms=[row for row in events if "evidence" in row],
        events=[row for row in events if "evidence" not in row], completions=_newest(run / "completions"))


def report_data(run: Path) -> dict[str, Any]:
    """The report as one strict JSON object: what the page shows, each curve as its first, last, lowest and highest."""
    view = read_run(run)
    return strict({
        "run": view.name, "status": view.status, "steps": view.steps, "seconds": view.seconds, "result": view.result,
        "metrics": {name: _span(points) for name, points in view.curves.items()}, "alarms": view.alarms,
        "events": view.events, "completions": [asdict(completion) for completion in view.completions],
        "env": view.env, "config": view.config})


def result_rows(result: Mapping[str, Any] | None) -> dict[str, Mapping[str, Any]]:
    """The rows of a result's table; none where it has no table."""
    rows = (result or {}).get("rows")
    if not isinstance(rows, Mapping):
        return {}
    return {str(name): row for name, row in rows.items() if isinstance(row, Mapping)}


def _json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}); restore the file or delete it") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: holds a {type(value).__name__}, an object is needed; restore the file or delete it")
    return value


def _rows(path: Path) -> Rows:
    return read_jsonl(path) if path.is_file() else []


def _curves(path: Path) -> dict[str, list[Point]]:
    curves: dict[str, list[Point]] = {}
    for number, row in enumerate(_rows(path), 1):
        step = row.get("step")
        if isinstance(step, bool) or not isinstance(step, (int, float)):
            raise DataError(f"{path}, line {number}: a row of metrics needs a number as `step`; delete the line")
        for name, value in row.items():
            if isinstance(value, str):
                value = _NON_FINITE.get(value)
            if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
                curves.setdefault(name, []).append((step, float(value)))
    return {name: sorted(points, key=lambda point: point[0]) for name, points in curves.items()}


def _status(run: Path, events: Rows, steps: int | None) -> str:
    """How the run says it ended, or else how far it came."""
    if events and events[-1].get("event") == "ended":
        return str(events[-1].get("ending"))
    saved = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    known = [f"last step {steps}"] if steps is not None else []
    known += [f"newest checkpoint {saved[-1]}"] if saved else []
    return " · ".join(["unfinished", *known])


def _seconds(run: Path, result: dict[str, Any] | None) -> float | None:
    """The result's own figure, or else the sum of what timing.jsonl has for the steps and their evaluations."""
    if result is not None and isinstance(result.get("seconds"), (int, float)):
        return float(result["seconds"])
    timed = [row[name] for row in _rows(run / "timing.jsonl") for name in ("step_s", "eval_s")
             if isinstance(row.get(name), (int, float))]
    return float(sum(timed)) if timed else None


def _newest(folder: Path) -> list[Completion]:
    found: list[Completion] = []
    for path in reversed(completion_files(folder)):
        found += read_completions(path)[:_SAMPLES_PER_STEP]
        if len(found) >= _SAMPLES:
            break
    return found[:_SAMPLES]


def _span(points: list[Point]) -> dict[str, float | int]:
    finite = [value for _, value in points if math.isfinite(value)]
    span = {"first": points[0][1], "last": points[-1][1], "last_step": points[-1][0], "count": len(points)}
    return {**span, "min": min(finite), "max": max(finite)} if finite else span
