"""`tinyr2 runs`: how a run stands is read from its folder, and a run goes on with the settings it has."""

import io
import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from tinyr2.core.config import Config, dump
from tinyr2.core.errors import ConfigError, RunError
from tinyr2.core.files import single_writer
from tinyr2.recipes import runs
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


def pipeline_run(folder: Path, written: str | None = None) -> Path:
    """A pipeline that was stopped in its second stage."""
    make(folder, ending="stopped", verb="pipeline", rows=())
    (folder / "config.resolved.yaml").write_text(yaml.safe_dump({
        "output_dir": written or str(folder), "stages": [{"name": "a", "verb": "sft"}, {"name": "b", "verb": "sft"}]}))
    (folder / "pipeline.json").write_text(json.dumps({"stages": {"a": {}}, "measured": {}}))
    return folder


def test_a_pipeline_is_resumed_with_the_verbs_and_its_row_counts_stages(tmp_path, monkeypatch):
    run, calls = pipeline_run(tmp_path / "p"), []
    monkeypatch.setattr(runs, "pipeline", lambda config, console, **options: calls.append((config, options)) or {})
    verbs = {"sft": (Settings, None)}
    resume_run(run, quiet(), verbs)
    ((config, options),) = calls
    assert [s.name for s in config.stages] == ["a", "b"] and options == {"verbs": verbs, "resume": True}
    row = listed(tmp_path)[0]["p"]
    assert (row["verb"], row["status"], row["step"], row["max_steps"]) == ("pipeline", "stopped", 1, 2)


def test_a_pipelines_folder_is_called_as_it_was_when_it_was_started(tmp_path, monkeypatch):
    # its stages have noted paths below it; by another name they would be other settings
    calls = []
    monkeypatch.setattr(runs, "pipeline", lambda config, console, **options: calls.append(config.output_dir) or {})
    run = pipeline_run(tmp_path / "p", written="p")
    (run / "env.json").write_text(json.dumps({"verb": "pipeline", "cwd": str(tmp_path)}))
    resume_run(run, quiet(), {})
    resume_run(Path(shutil.move(run, tmp_path / "q")), quiet(), {})
    assert calls == ["p", str(tmp_path / "q")]


def test_a_stage_of_a_verb_that_only_pipelines_have_names_the_pipeline(tmp_path):
    run = pipeline_run(tmp_path / "p")
    make(run / "b", ending="stopped", verb="reject")
    with pytest.raises(RunError, match=f"'reject' cannot be resumed.*resume the pipeline that it is a stage of: {run}"):
        resume_run(run / "b", quiet(), {"sft": (Settings, None)})


def test_what_cannot_be_resumed_is_named(tmp_path):
    with pytest.raises(RunError, match="no run to resume here"):
        resume_run(tmp_path, quiet(), {})
    with pytest.raises(RunError, match="'quickstart' cannot be resumed, only one of sft, pipeline; start it anew"):
        resume_run(make(tmp_path / "q", verb="quickstart"), quiet(), {"sft": (Settings, None)})
    edited = make(tmp_path / "e", ending="stopped")
    (edited / "config.resolved.yaml").write_text("trian: {}\n")
    with pytest.raises(ConfigError, match="trian: unknown key; did you mean 'train'"):
        resume_run(edited, quiet(), {"sft": (Settings, None)})
