"""A run folder: opened for one writer, filled while the run goes, read by anyone.

In: a verb and its config. Out: config.resolved.yaml, env.json, metrics.jsonl, timing.jsonl, events.jsonl,
completions/, checkpoints/, final/ and report.html.
"""

import hashlib
import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from tinyr2.core import config as configs
from tinyr2.core.config import Config
from tinyr2.core.errors import RunError
from tinyr2.core.files import recover_folders, replace_folder, single_writer, write_atomic
from tinyr2.recipes.machine import describe_machine
from tinyr2.report.completions import Completion, write_completions
from tinyr2.report.console import Console
from tinyr2.report.html import write_report
from tinyr2.report.jsonl import Journal
from tinyr2.train.health import Alarm
from tinyr2.train.loop import StepResult

CONFIG, ENV = "config.resolved.yaml", "env.json"
JOURNALS = ("metrics", "timing", "events")
_OURS = str(Path(__file__).parents[1])  # a virtual environment inside the project is not ours


class Run:
    """One run's folder and console; what the training loop writes to."""

    def __init__(self, folder: Path, console: Console, total: int,
                 show: Callable[[int, StepResult], list[Completion]] | None):
        self.folder, self.console = folder, console
        self._total, self._show = total, show
        self._at_end: list[Callable[[], None]] = []
        self._journals = {name: Journal(folder / f"{name}.jsonl") for name in JOURNALS}

    @property
    def checkpoints(self) -> Path:
        """Where the run's checkpoints lie."""
        return self.folder / "checkpoints"

    def record(self, metrics: dict, timing: dict, alarms: Sequence[Alarm]) -> None:
        """One finished step."""
        self._journals["metrics"].append(metrics)
        self._journals["timing"].append(timing)
        for alarm in alarms:
            self._journals["events"].append(alarm.row())
            self.console.alarm(alarm.row())
        self.console.progress(metrics["step"], self._total, metrics)

    def completions(self, step: int, result: StepResult) -> None:
        """A look at what was written in `step`."""
        if self._show is None or not result.rollouts:
            return
        rows = self._show(step, result)
        try:
            write_completions(self.folder / "completions", step, rows)
        except OSError as error:  # a look at the text is not worth a run
            self.console.note(f"step {step}: completions were not written: {error}")
        if rows:
            self.console.sample(rows[0])

    def event(self, name: str, **facts: Any) -> None:
        """Something that a reader of the run should know."""
        row = {"event": name, "name": name, **facts}
        self._journals["events"].append(row)
        if "evidence" in facts:
            self.console.alarm(row)

    def cursors(self) -> dict[str, int]:
        """Sizes of the journals, on the disk."""
        for journal in self._journals.values():
            journal.sync()
        return {f"{name}.jsonl": journal.cursor for name, journal in self._journals.items()}

    def rewind(self, cursors: Mapping[str, int]) -> None:
        """Cut the journals back to what a checkpoint knew; without one, to nothing."""
        for name, journal in self._journals.items():
            journal.truncate(cursors.get(f"{name}.jsonl", 0))

    def commit(self, name: str, write: Callable[[Path], None]) -> None:
        """Make the folder `name` by `write`, all at once; what stood there is replaced."""
        tmp = self.folder / f".tmp-{name}-{uuid4().hex[:8]}"
        write(tmp)
        replace_folder(tmp, self.folder / name)

    def at_end(self, tell: Callable[[], None]) -> None:
        """Call `tell` once, before the run notes how it ended, or when it breaks off."""
        self._at_end.append(tell)

    def finish(self, ending: str) -> Path:
        """Note how it ended, and write the report."""
        self._tell_all()
        self.event("ended", ending=ending)
        self.console.end_progress()
        report = write_report(self.folder)
        self.console.note(f"{ending}: {self.folder} · report {report}")
        return report

    def close(self) -> None:
        """Give the files back."""
        self._tell_all()
        for journal in self._journals.values():
            journal.close()


    def _tell_all(self) -> None:
        tells, self._at_end = self._at_end, []
        for tell in tells:
            tell()


def refuse_taken(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """RunError where `folder` holds something that nobody asked to resume or overwrite, or resume finds no run."""
    # a run that was killed before its config stood leaves a lock, perhaps a torn temporary file, and nothing to resume
    taken = folder.exists() and (not folder.is_dir() or any(
        p.name != "lock" and not p.name.startswith(".") for p in folder.iterdir()))
    if taken and not folder.is_dir():
        raise RunError(f"{folder}: a file, not a run folder; give another output_dir")
    if resume and overwrite:
        raise RunError("--resume goes on with a run and --overwrite deletes it; give one of them")
    if resume and not (folder / CONFIG).is_file():
        raise RunError(f"{folder}: no run to resume here (no {CONFIG}); start it without --resume")
    if taken and not resume and not overwrite:
        raise RunError(f"{folder}: already holds something; --resume goes on with that run, --overwrite deletes it and "
                       "starts anew, or give another output_dir")
    if taken and overwrite and not (folder / CONFIG).is_file():
        raise RunError(f"{folder}: not a run folder (no {CONFIG}), so --overwrite will not delete it; give another "
                       "output_dir")


def refuse_own_input(folder: Path, inputs: Sequence[str]) -> None:
    """RunError where --overwrite would delete something that the run reads."""
    for name in inputs:
        if Path(name).exists() and Path(name).resolve().is_relative_to(folder.resolve()):
            raise RunError(f"{folder}: --overwrite would delete {name}, which this run reads; give another output_dir")


def refuse_changed(folder: Path, config: Config) -> None:
    """RunError that names every lasting setting in which `config` differs from what the run was started with."""
    before, now = (configs.lasting(config, raw) for raw in (configs.read(folder / CONFIG),
                                                            config.model_dump(mode="json")))
    changed = changed_settings(before, now)
    if changed:
        raise RunError(f"{folder}: resumed with another config: {'; '.join(changed)}. Resume with the settings it was "
                       "started with (tinyr2 runs resume reads them), or start a new run in another output_dir")


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The settings, output_dir apart, in which two configs differ, each with both values."""
    old, new = _flat(dict(before)), _flat(dict(now))
    return [f"{key}: {old.get(key)} before, {new.get(key)} now" for key in dict.fromkeys([*old, *new])
            if old.get(key) != new.get(key) and key != "output_dir"]


def clear_run(folder: Path) -> None:
    """Delete what a run left in its folder, which is held."""
    # the config goes last: a folder without one would be nobody's, and could not be overwritten again
    for path in sorted(folder.iterdir(), key=lambda p: p.name == CONFIG):
        if path.name != "lock":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_env(folder: Path, verb: str) -> None:
    """Note beside a run what was asked for, where, when, and on which machine."""
    facts = {"verb": verb, "command": sys.argv, "cwd": os.getcwd(), "started": time.time(),
             "machine": describe_machine()}
    write_atomic(folder / ENV, json.dumps(facts, indent=2) + "\n")


def _flat(raw: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(raw, dict):
        return {prefix: raw}
    return {key: value for name, inner in raw.items()
            for key, value in _flat(inner, f"{prefix}.{name}" if prefix else name).items()}


@contextmanager
def open_run(config: Config, verb: str, console: Console, *, total: int, resume: bool, overwrite: bool,
             show: Callable[[int, StepResult], list[Completion]] | None = None) -> Iterator[Run]:
    """The run folder `config.output_dir`, held until the block ends."""
    folder = Path(config.output_dir)
    refuse_taken(folder, resume=resume, overwrite=overwrite)
    if resume:
        refuse_changed(folder, config)
    folder.mkdir(parents=True, exist_ok=True)
    with single_writer(folder):
        if overwrite:
            clear_run(folder)
        if not resume or changed_settings(configs.read(folder / CONFIG), config.model_dump(mode="json")):
            write_atomic(folder / CONFIG, configs.dump(config))  # first: with it alone the run can be resumed
        if not resume or not (folder / ENV).is_file():
            write_env(folder, verb)
        recover_folders(folder)
        for leftover in folder.glob(".*"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        run = Run(folder, console, total, show)
        try:
            with _told_once(console):
                yield run
        finally:
            run.close()


def identity(config: Config) -> str:
    """Hash of all lasting settings but where the run is written."""
    raw = configs.lasting(config, config.model_dump(mode="json"))
    raw.pop("output_dir")
    return hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def _told_once(console: Console) -> Iterator[None]:
    """Warnings of our own go to the console, each once: a slower path announces itself there."""
    told: set[str] = set()
    before = warnings.showwarning

    def tell(message, category, filename, lineno, file=None, line=None):
        text = str(message)
        if not filename.startswith(_OURS):
            before(message, category, filename, lineno, file, line)
        elif text not in told:
            told.add(text)
            console.note(f"note: {text}")

    warnings.showwarning = tell
    try:
        yield
    finally:
        warnings.showwarning = before
