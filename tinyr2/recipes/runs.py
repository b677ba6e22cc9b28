"""`tinyr2 runs`: which runs there are, how they stand, and on with one.

In: a folder. Out: a row for each run below it; or a run that goes on from its newest checkpoint.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import chdir, suppress
from functools import partial
from pathlib import Path
from typing import Any

from tinyr2.core import config as configs
from tinyr2.core.errors import DataError, RunError, UserError
from tinyr2.core.files import LOCK
from tinyr2.recipes.pipeline import LEDGER, Ledger, PipelineConfig, pipeline
from tinyr2.recipes.run import CONFIG, ENV
from tinyr2.recipes.stages import Verbs
from tinyr2.report.console import Console
from tinyr2.report.jsonl import read_jsonl
from tinyr2.report.table import Row, Table, format_value

_INSIDE = ("checkpoints", "completions", "final", "best")  # of a run: nothing to look for there
_SHOWN = ("loss", "kl", "reward")


def list_runs(folder: Path, console: Console) -> dict:
    """Print the runs in `folder` and below it, newest first; returns what `--json` prints.

    A damaged run is a row that says so. RunError where there is no such folder.
    """
    if not folder.is_dir():
        raise RunError(f"{folder}: no such folder; give the one that holds your runs: tinyr2 runs FOLDER")
    rows = sorted((_row(run) for run in _find(folder)), key=lambda row: -(row["started"] or 0.0))
    if rows:
        console.table(_table(rows))
        for row in rows:
            if "error" in row:
                console.note(f"damaged: {row['error']}")
    else:
        console.note(f"no runs in {folder}")
    return {"runs": rows}


def resume_run(run: Path, console: Console, verbs: Verbs) -> dict:
    """Go on with a run from its newest checkpoint; one that is finished is left as it is.

    verbs: the training verbs by name; a pipeline is known here. The folder may have moved since. Returns what the
    run's verb returns. RunError where there is nothing to resume.
    """
    if not (run / CONFIG).is_file():
        raise RunError(f"{run}: no run to resume here (no {CONFIG}); `tinyr2 runs` lists those that are there")
    verb, all_verbs = _env(run).get("verb"), {**verbs, "pipeline": (PipelineConfig, partial(pipeline, verbs=verbs))}
    if verb not in all_verbs:
        whole = (run.absolute().parent / LEDGER).is_file()
        cure = f"resume the pipeline that it is a stage of: {run.absolute().parent}" if whole else "start it anew"
        raise RunError(f"{run}: a run of {verb!r} cannot be resumed, only one of {', '.join(all_verbs)}; {cure}")
    if _status(run) == "finished":
        console.note(f"{run}: finished already, nothing to resume")
        return {"ending": "finished", "run": str(run)} | (
            {"model": str(run / "final")} if (run / "final").is_dir() else {})
    config_class, recipe = all_verbs[verb]
    run = run.absolute()
    started_in = Path(_env(run).get("cwd") or ".")
    # paths in the config are relative to where the run was started
    with chdir(started_in if started_in.is_dir() else "."):
        raw = configs.read(run / CONFIG)
        if Path(raw.get("output_dir") or ".").resolve() != run.resolve():  # else as it was: a pipeline's stages read it
            raw |= {"output_dir": str(run)}
        return recipe(configs.build(config_class, raw, str(run / CONFIG)), console, resume=True)


def _find(folder: Path) -> Iterator[Path]:
    for path, inside, files in os.walk(folder):
        if CONFIG in files:
            yield Path(path)
        inside[:] = sorted(name for name in inside if name not in _INSIDE and not name.startswith("."))


def _row(run: Path) -> dict[str, Any]:
    row = {"run": str(run), "verb": None, "status": "damaged", "step": None, "max_steps": None, "metrics": {},
           "started": None, "bytes": _size(run)}
    try:
        env = _env(run)
        row |= {"verb": env.get("verb"), "started": env.get("started"), "max_steps": _max_steps(run)}
        metrics = _last_values(run)
        step = len(Ledger(run).stages) if env.get("verb") == "pipeline" else metrics.pop("step", 0)
        return row | {"status": _status(run), "step": step, "metrics": metrics}
    except (UserError, OSError) as error:
        return row | {"error": str(error)}


def _status(run: Path) -> str:
    """running, finished, stopped, halted, or crashed: not running, and no word of how it ended."""
    if _is_held(run / LOCK):
        return "running"
    events = read_jsonl(run / "events.jsonl") if (run / "events.jsonl").is_file() else []
    return events[-1].get("ending", "crashed") if events and events[-1].get("event") == "ended" else "crashed"


def _is_held(lock: Path) -> bool:
    """Whether a live process holds the run. For the instant of asking, no writer can take it."""
    if not lock.is_file():
        return False
    with lock.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _env(run: Path) -> dict[str, Any]:
    path = run / ENV
    try:
        env = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}); restore it, or start the run anew") from error
    if not isinstance(env, dict):
        raise DataError(f"{path}: holds a {type(env).__name__}, an object is needed; restore it, or start the run anew")
    return env


def _max_steps(run: Path) -> int | None:
    config = configs.read(run / CONFIG)
    train, stages = config.get("train"), config.get("stages")
    if isinstance(stages, list):
        return len(stages)
    return train.get("max_steps") if isinstance(train, dict) else None


def _last_values(run: Path) -> dict[str, Any]:
    """The newest value of each metric; not every row has all of them."""
    last: dict[str, Any] = {}
    if (run / "metrics.jsonl").is_file():
        for row in read_jsonl(run / "metrics.jsonl"):
            last |= row
    return last


def _size(run: Path) -> int:
    total = 0
    for path, _, files in os.walk(run):
        for name in files:
            with suppress(FileNotFoundError):  # a run at work removes old checkpoints
                total += os.lstat(os.path.join(path, name)).st_size
    return total


def _table(rows: list[dict[str, Any]]) -> Table:
    evals = list(dict.fromkeys(name for row in rows for name in row["metrics"] if name.startswith("eval_")))[:2]
    names = [name for name in (*_SHOWN, *evals) if any(name in row["metrics"] for row in rows)]
    columns = ("verb", "status", "step", *names, "started", "MiB")
    return Table(columns, tuple(Row(row["run"], _cells(row, names)) for row in rows))


def _cells(row: dict[str, Any], names: list[str]) -> tuple[str, ...]:
    started = "–" if row["started"] is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(row["started"]))
    step = "–" if row["step"] is None else f"{row['step']}/{row['max_steps'] or '–'}"
    return (row["verb"] or "–", row["status"], step, *(format_value(n, row["metrics"].get(n)) for n in names), started,
            f"{row['bytes'] / 2**20:,.1f}")
