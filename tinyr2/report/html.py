"""The one-file page: a run folder as report.html, readable years later without network, scripts or this program.

In: the run folder. Out: report.html beside its other files. Model text is hostile: it passes `clean` and autoescape.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, StrictUndefined

from tinyr2.core.files import write_atomic
from tinyr2.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Chart, Point, draw
from tinyr2.report.completions import Completion
from tinyr2.report.page import TEMPLATE
from tinyr2.report.run import RunView, read_run, report_data, result_rows
from tinyr2.report.table import format_value, result_table
from tinyr2.report.text import clean

__all__ = ["report_data", "write_report"]

Curves = Mapping[str, list[Point]]

_BOUNDS = (0.1, 0.5, 1.0, 2.0)  # nats of disagreement at which the color deepens
_MOST_TOKENS, _MOST_CHARACTERS, _MOST_EVENTS, _MOST_MARKS = 1500, 8000, 100, 30
_MACHINE = {"verb": "verb", "machine.platform": "system", "machine.cpu.model": "processor",
            "machine.cpu.cores_usable": "cores", "machine.git_commit": "commit"}  # of env.json, for the summary

# Charts in the order of the page; a metric stands in the first that takes it.
_CHARTS: tuple[tuple[str, Callable[[str], bool]], ...] = (
    ("loss", lambda name: name in ("loss", "eval_loss")),
    ("KL, nats per token", lambda name: name in ("kl", "eval_kl")),
    ("reward", lambda name: name in ("reward", "eval_reward")),
    ("reward parts", lambda name: name.startswith("rewards/") and name.endswith("/mean")),
    ("entropy, nats per token", lambda name: name in ("entropy", "eval_entropy")),
    ("completion length, tokens", lambda name: name.startswith("completions/") and name.endswith("_length")),
    ("shares of rollouts", lambda name: name in ("completions/clipped_ratio", "frac_reward_zero_std",
                                                  "rollouts/errored_ratio")),
    ("gradient norm", lambda name: name == "grad_norm"),
    ("actor/learner log-prob gap, nats", lambda name: name.startswith("sampling/sampling_logp_difference/")),
    ("learning rate", lambda name: name == "learning_rate"),
)


@dataclass(frozen=True)
class _Sample:
    """One completion as the template shows it; texts are clean, tokens are (text, class, tooltip)."""

    step: int
    about: str
    reward: str
    grade: str
    finish: str
    mean: str
    prompt: str
    completion: str
    tokens: list[tuple[str, str, str]]
    left_out: str


def write_report(run: Path) -> Path:
    """Write report.html into the run folder; every piece that the folder lacks is left out. Returns its path.

    RunError where `run` is no run folder, DataError where one of its files is damaged.
    """
    view = read_run(run)
    charts, more = _charts(view)
    rows = result_rows(view.result)
    samples = [_sample(completion) for completion in view.completions]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    html = environment.from_string(TEMPLATE).render(
        name=clean(view.name), facts=_facts(view), table=result_table(rows) if rows else None, links=_links(view),
        charts=charts, more=more, alarms=[_texts(row) for row in view.alarms], samples=samples,
        legend=_legend() if any(sample.tokens for sample in samples) else [],
        events=[_event(row) for row in reversed(view.events[-_MOST_EVENTS:])],
        config=clean(view.config or ""), env=_flat(view.env or {}), width=WIDTH, height=HEIGHT, left=LEFT, right=RIGHT,
        top=TOP, bottom=BOTTOM)
    path = Path(run) / "report.html"
    write_atomic(path, html.strip())
    return path


def _facts(view: RunView) -> list[tuple[str, str]]:
    env = view.env or {}
    command, flat = env.get("command"), dict(_flat(env))
    facts = [("status", view.status), ("steps", view.steps and f"{view.steps:,}"),
             ("seconds", view.seconds and f"{view.seconds:,.1f}"),
             ("command", " ".join(map(str, command)) if isinstance(command, list) else command),
             *((label, flat.get(key)) for key, label in _MACHINE.items())]
    return [(label, clean(str(value))) for label, value in facts if value and value != "null"]


def _links(view: RunView) -> dict[str, str]:
    """The pages of a result's rows, where it names them: by row, relative to this page."""
    pages = (view.result or {}).get("reports")
    return {clean(str(name)): quote(str(path)) for name, path in pages.items()} if isinstance(pages, Mapping) else {}


def _charts(view: RunView) -> tuple[list[Chart], list[Chart]]:
    """The charts that everyone wants, then those of all other metrics, all over one step axis."""
    if not view.curves:
        return [], []
    steps = [step for points in view.curves.values() for step in (points[0][0], points[-1][0])]
    axis = (min(steps), max(steps))
    marks = [row["step"] for row in view.alarms if isinstance(row.get("step"), (int, float))][-_MOST_MARKS:]
    dotted = {name for name in view.curves if name.startswith("eval_")}
    left, groups = dict(view.curves), []
    for title, takes in _CHARTS:
        groups.append((title, {name: left.pop(name) for name in list(left) if takes(name)}))
    held_out = [(name, {name: left.pop(name)}) for name in sorted(dotted & left.keys())]
    groups[3:3] = held_out  # beside the reward: the first thing to look at
    drawn = [[draw(clean(title), {clean(name): points for name, points in series.items()}, axis, marks, dotted)
              for title, series in part if series]
             for part in (groups, [(name, {name: points}) for name, points in left.items()])]
    return [chart for chart in drawn[0] if chart], [chart for chart in drawn[1] if chart]


def _sample(completion: Completion) -> _Sample:
    reward, values = completion.reward, completion.disagreement
    parts = ", ".join(f"{name} {format_value(name, value)}" for name, value in completion.reward_parts.items())
    about = [completion.problem_id, completion.author, parts,
             f"answer {completion.answer}" if completion.answer is not None else ""]
    text = clean(completion.completion)
    tokens = [_token(*pair) for pair in zip(completion.tokens or (), values, strict=True)] if values else []
    left_out = ""
    if len(tokens) > _MOST_TOKENS:
        left_out = f"{len(tokens) - _MOST_TOKENS:,} more tokens"
    elif not tokens and len(text) > _MOST_CHARACTERS:
        left_out = f"{len(text) - _MOST_CHARACTERS:,} more characters"
    return _Sample(
        step=completion.step, about=clean(" · ".join(part for part in about if part)),
        reward="no reward" if reward is None else f"reward {reward:.4g}",
        grade="" if reward is None else "good" if reward > 0 else "critical", finish=clean(completion.finish),
        mean=f"mean disagreement {fmean(values):+.3f}" if values else "",
        prompt=clean(completion.prompt)[-_MOST_CHARACTERS:], completion=text[:_MOST_CHARACTERS],
        tokens=tokens[:_MOST_TOKENS], left_out=left_out)


def _token(token: str, value: float) -> tuple[str, str, str]:
    """A token's text with its newlines made visible, its color class and its tooltip."""
    depth = sum(abs(value) >= bound for bound in _BOUNDS)
    name = f"{'p' if value > 0 else 'n'}{depth}" if depth else ""
    return clean(token).replace("\n", "↵\n") or "□", name, f"{value:+.3f} nats"


def _legend() -> list[tuple[str, str]]:
    deep = list(range(len(_BOUNDS), 0, -1))
    return [*((f"n{i}", f"≤ −{_BOUNDS[i - 1]:g}") for i in deep), ("", "0"),
            *((f"p{i}", f"≥ {_BOUNDS[i - 1]:g}") for i in reversed(deep))]


def _texts(row: Mapping[str, Any]) -> dict[str, str]:
    return {key: clean(str(row.get(key, ""))) for key in ("level", "name", "step", "evidence", "action")}


def _event(row: Mapping[str, Any]) -> tuple[str, str, str]:
    rest = {key: value for key, value in row.items() if key not in ("step", "event")}
    return (clean(str(row.get("step", ""))), clean(str(row.get("event", ""))),
            clean(" · ".join(f"{key} {value}" for key, value in rest.items())))


def _flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested mappings as dotted names, in their order."""
    pairs = []
    for key, item in value.items():
        if isinstance(item, Mapping):
            pairs += _flat(item, f"{prefix}{key}.")
        else:
            pairs.append((clean(f"{prefix}{key}"), clean(item if isinstance(item, str) else json.dumps(item))))
    return pairs
