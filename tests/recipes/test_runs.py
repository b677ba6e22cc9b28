"""`tinyr2 runs`: how a run stands is read from its folder, and a run goes on with the settings it has."""

import io
import json
import os
import shutil
from pathlib import Path

import pytest

from tinyr2.core.config import Config, dump
from tinyr2.core.errors import ConfigError, RunError
from tinyr2.core.files import single_writer
from tinyr2.recipes.runs import list_runs, resume_run
from tinyr2.report.console import Console


class Steps(Config):
    max_steps: int = 10


class Settings(Config):
    train: Steps = Steps()
    output_dir: str


def make(folder: Path, *, ending: str | None = "finished", started: float = 0.0, verb: str = "sft",
         rows: tuple[dict, ...] = ({"step": 1, "loss": 2.0, "eval_pass@1": 0.25}, {"step": 2, "loss": 1.5})) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.resolved.yaml").write_text(dump(Settings(output_dir=str(folder))))
    (folder / "env.json").write_text(json.dumps({"verb": verb, "started": started}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    events = [{"event": "alarm", "step": 1}] + ([{"event": "ended", "ending": ending}] if ending else [])
    (folder / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in events))
    return folder


def listed(folder: Path) -> tuple[dict[str, dict], str]:
    stream = io.StringIO()
    rows = list_runs(folder, Console(stream=stream, plain=True))["runs"]
    return {Path(row["run"]).name: row for row in rows}, stream.getvalue()


def quiet() -> Console:
    return Console(stream=io.StringIO(), plain=True)


def test_a_row_has_verb_status_step_newest_metrics_start_and_size(tmp_path):
    run = make(tmp_path / "a", started=86400.0)
    row = listed(tmp_path)[0]["a"]
    size = sum(p.stat().st_size for p in run.iterdir())
    assert row == {"run": str(run), "verb": "sft", "status": "finished", "step": 2, "max_steps": 10,
                   "metrics": {"loss": 1.5, "eval_pass@1": 0.25}, "started": 86400.0, "bytes": size}


@pytest.mark.parametrize(("ending", "status"), [
    ("finished", "finished"), ("stopped", "stopped"), ("halted", "halted"), (None, "crashed")])
def test_the_last_event_tells_how_a_run_ended_and_silence_is_a_crash(tmp_path, ending, status):
    make(tmp_path / "a", ending=ending)
    assert listed(tmp_path)[0]["a"]["status"] == status


def test_a_run_is_running_while_its_lock_is_held_and_looking_does_not_take_it(tmp_path):
    run = make(tmp_path / "a", ending=None)
    with single_writer(run):
        assert listed(tmp_path)[0]["a"]["status"] == "running"
    assert listed(tmp_path)[0]["a"]["status"] == "crashed"
    with single_writer(run):  # asking left no lock behind
        pass


def test_runs_are_found_below_newest_first_and_models_are_not_runs(tmp_path):
    make(tmp_path / "old", started=1.0)
    make(tmp_path / "nested" / "new", started=3.0)
    make(tmp_path / "old" / "checkpoints" / "hidden", started=9.0)
    (tmp_path / "model").mkdir()
    rows, shown = listed(tmp_path)
    assert list(rows) == ["new", "old"]
    assert shown.index("new") < shown.index("old")


def test_a_damaged_run_is_a_row_that_says_so_and_hides_no_other(tmp_path):
    make(tmp_path / "good")
    (make(tmp_path / "bad") / "metrics.jsonl").write_text("{\n")
    (make(tmp_path / "worse") / "env.json").write_text("[")
    rows, shown = listed(tmp_path)
    assert {name: row["status"] for name, row in rows.items()} == {
        "good": "finished", "bad": "damaged", "worse": "damaged"}
    assert "metrics.jsonl, line 1" in rows["bad"]["error"]
    assert "env.json" in rows["worse"]["error"]
    assert f"damaged: {rows['bad']['error']}\n" in shown


def test_a_run_that_has_taken_no_step_is_listed_at_step_zero(tmp_path):
    make(tmp_path / "a", ending=None, rows=())
    assert listed(tmp_path)[0]["a"]["step"] == 0


def test_a_folder_without_runs_says_so_and_a_missing_one_is_an_error(tmp_path):
    assert listed(tmp_path) == ({}, f"no runs in {tmp_path}\n")
    with pytest.raises(RunError, match="no such folder"):
        listed(tmp_path / "nowhere")


def test_resume_calls_the_runs_own_verb_with_its_settings_and_the_folder_as_it_is_now(tmp_path):
    make(tmp_path / "before", ending="stopped", verb="distill")
    run = shutil.move(tmp_path / "before", tmp_path / "after")
    calls = []

    def recipe(config, console, **options):
        calls.append((config, options))
        return {"ending": "finished"}

    verbs = {"sft": (Settings, None), "distill": (Settings, recipe)}
    assert resume_run(Path(run), quiet(), verbs) == {"ending": "finished"}
    assert calls == [(Settings(output_dir=str(tmp_path / "after")), {"resume": True})]


def test_a_finished_run_is_left_as_it_is(tmp_path):
    run = make(tmp_path / "a")
    before = {p.name: (p.read_bytes(), os.stat(p).st_mtime_ns) for p in run.iterdir()}
    stream = io.StringIO()
    result = resume_run(run, Console(stream=stream, plain=True), {"sft": (Settings, None)})
    assert result["ending"] == "finished"
    assert "finished already" in stream.getvalue()
    assert {p.name: (p.read_bytes(), os.stat(p).st_mtime_ns) for p in run.iterdir()} == before


def test_what_cannot_be_resumed_is_named(tmp_path):
    with pytest.raises(RunError, match="no run to resume here"):
        resume_run(tmp_path, quiet(), {})
    with pytest.raises(RunError, match="'quickstart' cannot be resumed, only one of sft"):
        resume_run(make(tmp_path / "q", verb="quickstart"), quiet(), {"sft": (Settings, None)})
    edited = make(tmp_path / "e", ending="stopped")
    (edited / "config.resolved.yaml").write_text("trian: {}\n")
    with pytest.raises(ConfigError, match="trian: unknown key; did you mean 'train'"):
        resume_run(edited, quiet(), {"sft": (Settings, None)})
