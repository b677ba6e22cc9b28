"""Pipelines: what runs, what does not run again, what is refused, and that no kill changes what comes out."""

import io
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.recipes import killing
from tinyr2.core import files
from tinyr2.core.config import Config, build, load
from tinyr2.core.errors import ConfigError, DataError, RunError, UserError
from tinyr2.data.problems import DataConfig, load_problems
from tinyr2.recipes import pipeline as room
from tinyr2.recipes.child import Ended
from tinyr2.recipes.pipeline import PipelineConfig, pipeline
from tinyr2.recipes.run import CONFIG
from tinyr2.recipes.runs import list_runs
from tinyr2.recipes.sft import SftConfig, sft
from tinyr2.report.console import Console

CALLS: list[tuple[str, bool]] = []  # (stage, resumed)
TROUBLE: dict[str, object] = {}  # by stage: what happens to it


class FakeConfig(Config):
    model: str | None = None
    knob: int = 0
    output_dir: str


def fake(config: FakeConfig, console: Console, *, resume: bool = False, overwrite: bool = False) -> dict:
    """A training verb whose model is a function of its settings and its input."""
    folder, name = Path(config.output_dir), Path(config.output_dir).name
    CALLS.append((name, resume))
    folder.mkdir(parents=True, exist_ok=True)
    files.write_atomic(folder / CONFIG, "{}\n")
    trouble = TROUBLE.pop(name, None)
    if isinstance(trouble, BaseException):
        raise trouble
    if trouble is not None:
        return {"ending": trouble, "step": 4, "run": str(folder)}
    before = (Path(config.model) / "config.json").read_text() if config.model else ""
    (folder / "final").mkdir(exist_ok=True)
    files.write_atomic(folder / "final/config.json", f"{before}{name}{config.knob};")
    files.write_atomic(folder / "metrics.jsonl", '{"step": 1, "num_generated_tokens": 3}\n'
                                                 '{"step": 2, "num_generated_tokens": 5}\n')
    return {"ending": "finished", "step": 2, "run": str(folder)}


VERBS = {"train": (FakeConfig, fake)}
STAGES = ({"name": "a", "verb": "train"},
          {"name": "b", "verb": "train", "config": {"model": "stage:a"}},
          {"name": "c", "verb": "train", "config": {"model": "stage:b"}})


@pytest.fixture
def inline(monkeypatch):
    """Stages run in this process."""
    def run(work, *args, json_mode=False):
        try:
            return Ended(value=work(*args, quiet()))
        except UserError as error:
            return Ended(fault=f"could not go on: {error}")

    monkeypatch.setattr(room, "run_in_child", run)
    CALLS.clear()
    TROUBLE.clear()


def quiet() -> Console:
    return Console(stream=io.StringIO(), plain=True)


def go(out: Path, *stages: dict, said: io.StringIO | None = None, **options) -> dict:
    config = build(PipelineConfig, {"output_dir": str(out), "stages": stages or STAGES}, "test")
    return pipeline(config, Console(stream=said or io.StringIO(), plain=True), VERBS, **options)


def model(out: Path, name: str) -> str:
    return (out / name / "final/config.json").read_text()


def changed(i: int, **config) -> tuple[dict, ...]:
    stages = [dict(stage) for stage in STAGES]
    stages[i]["config"] = stages[i].get("config", {}) | config
    return tuple(stages)


# --- what runs


def test_stages_run_in_order_each_on_what_the_one_before_made(inline, tmp_path):
    result = go(tmp_path / "p")
    assert CALLS == [("a", False), ("b", False), ("c", False)]
    assert model(tmp_path / "p", "c") == "a0;b0;c0;"
    assert (result["ending"], result["step"], list(result["rows"])) == ("finished", 3, ["a", "b", "c"])
    assert json.loads((tmp_path / "p/result.json").read_text())["rows"] == result["rows"]
    assert result["rows"]["b"]["num_generated_tokens"] == 5


def test_a_finished_stage_is_not_run_again(inline, tmp_path):
    TROUBLE["c"] = DataError("no such file; give another")
    with pytest.raises(RunError, match="stage c could not go on: no such file; give another; once that is mended, the "
                                       "same command with --resume goes on"):
        go(tmp_path / "p")
    CALLS.clear()
    go(tmp_path / "p", resume=True)
    assert CALLS == [("c", True)]
    CALLS.clear()
    assert go(tmp_path / "p", resume=True)["ending"] == "finished"
    assert CALLS == []


@pytest.mark.parametrize("ending", ["stopped", "halted"])
def test_a_stage_that_stops_or_halts_ends_the_pipeline_with_its_word(ending, inline, tmp_path):
    TROUBLE["b"], said = ending, io.StringIO()
    result = go(tmp_path / "p", said=said)
    assert (result["ending"], result["stage"], result["step"]) == (ending, "b", 4)
    assert CALLS == [("a", False), ("b", False)]
    assert f"{ending} in stage b; the same command with --resume goes on" in said.getvalue()
    go(tmp_path / "p", resume=True)
    assert CALLS[2:] == [("b", True), ("c", False)]
    assert model(tmp_path / "p", "c") == "a0;b0;c0;"


def test_a_signal_between_two_stages_stops_with_the_finished_one_on_record(inline, tmp_path, monkeypatch):
    run = room.run_in_child
    monkeypatch.setattr(room, "run_in_child", lambda *a, **k: Ended(value=run(*a, **k).value, interrupted=True))
    assert go(tmp_path / "p")["ending"] == "stopped"
    monkeypatch.setattr(room, "run_in_child", run)
    go(tmp_path / "p", resume=True)
    assert [name for name, _ in CALLS] == ["a", "b", "c"]


def test_an_interrupt_with_nothing_to_save_is_an_interrupt(inline, tmp_path, monkeypatch):
    said = io.StringIO()
    monkeypatch.setattr(room, "run_in_child", lambda *a, **k: Ended(fault="was ended by SIGTERM", interrupted=True))
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "p", said=said)
    assert "stage a was ended by SIGTERM; the same command with --resume" in said.getvalue()


def test_a_stage_whose_folder_was_deleted_is_made_again_and_the_later_ones_still_fit(inline, tmp_path):
    go(tmp_path / "p")
    CALLS.clear()
    shutil.rmtree(tmp_path / "p/b")
    go(tmp_path / "p", resume=True)
    assert CALLS == [("b", False)]


# --- what is refused


def test_another_setting_of_a_finished_stage_is_refused_with_both_values_and_the_cure(inline, tmp_path):
    go(tmp_path / "p")
    CALLS.clear()
    with pytest.raises(RunError, match="stage b is finished.*knob: 0 before, 1 now; --overwrite .*another output_dir "
                                       ".*deleted"):
        go(tmp_path / "p", *changed(1, knob=1), resume=True)
    assert CALLS == []
    shutil.rmtree(tmp_path / "p/b")
    shutil.rmtree(tmp_path / "p/c")
    go(tmp_path / "p", *changed(1, knob=1), resume=True)
    assert model(tmp_path / "p", "c") == "a0;b1;c0;"


def test_settings_of_a_stage_to_come_may_change(inline, tmp_path):
    TROUBLE["b"] = DataError("x; y")
    with pytest.raises(RunError):
        go(tmp_path / "p")
    go(tmp_path / "p", *changed(2, knob=8), resume=True)
    assert model(tmp_path / "p", "c") == "a0;b0;c8;"


def test_a_finished_stage_whose_input_became_another_is_refused(inline, tmp_path):
    go(tmp_path / "p")
    (tmp_path / "p/a/final/config.json").write_text("tampered")
    with pytest.raises(RunError, match=r"stage b is finished.*stage:a: \w{16} before, \w{16} now"):
        go(tmp_path / "p", resume=True)
    # made anew with another setting, it is another too
    shutil.rmtree(tmp_path / "p/a")
    with pytest.raises(RunError, match="stage b is finished.*stage:a"):
        go(tmp_path / "p", *changed(0, knob=2), resume=True)


@pytest.mark.parametrize(("options", "message"), [
    ({}, "--resume goes on with that run, --overwrite deletes it"),
    ({"resume": True, "overwrite": True}, "give one of them")])
def test_a_folder_that_is_taken_is_gone_on_with_or_replaced_only_when_asked_for(options, message, inline, tmp_path):
    go(tmp_path / "p")
    with pytest.raises(RunError, match=message):
        go(tmp_path / "p", **options)
    CALLS.clear()
    go(tmp_path / "p", *changed(0, knob=5), overwrite=True)
    assert [name for name, _ in CALLS] == ["a", "b", "c"]
    assert model(tmp_path / "p", "c") == "a5;b0;c0;"


def test_overwriting_never_deletes_what_a_stage_reads(inline, tmp_path):
    go(tmp_path / "p")
    with pytest.raises(RunError, match="--overwrite would delete"):
        go(tmp_path / "p", *changed(0, model=str(tmp_path / "p/b/final")), overwrite=True)
    assert model(tmp_path / "p", "c") == "a0;b0;c0;"


def test_faults_come_before_any_compute_and_leave_no_folder(inline, tmp_path):
    with pytest.raises(ConfigError, match="no stage of that name"):
        go(tmp_path / "p", *changed(2, model="stage:d"))
    missing = {"name": "m", "verb": "data", "config": {"sources": {"path": "nowhere.jsonl"}}}
    with pytest.raises(ConfigError, match="stage m: nowhere.jsonl: no such file"):
        go(tmp_path / "p", *STAGES, missing)
    assert CALLS == [] and not (tmp_path / "p").exists()


@pytest.mark.parametrize(("compare", "message"), [
    ({"models": ["aa"]}, "compare.models: no stage 'aa'"),
    ({"models": ["d"]}, "compare.models: d: data makes no model"),
    ({"data": {"path": "stage:x"}}, "compare: stage:x: no stage of that name"),
])
def test_a_comparison_that_cannot_be_made_is_refused(compare, message, inline, tmp_path):
    stages = [*STAGES, {"name": "d", "verb": "data", "config": {"sources": {"task": "countdown", "limit": 2}}}]
    raw = {"output_dir": str(tmp_path / "p"), "stages": stages, "compare": {"data": {"path": "stage:d"}} | compare}
    with pytest.raises(ConfigError, match=message):
        pipeline(build(PipelineConfig, raw, "test"), quiet(), VERBS)


# --- kills


class Killed(BaseException):
    """The process ends here."""


def test_a_kill_before_any_write_leaves_something_to_go_on_with(inline, tmp_path, monkeypatch):
    go(tmp_path / "whole")
    write, left = files.write_atomic, []

    def stop(path, data):
        if not left:
            raise Killed
        left.pop()
        write(path, data)

    for module in (files, room):
        monkeypatch.setattr(module, "write_atomic", stop)
    for writes in range(1, 30):  # the config stands after the first; before it there is nothing to resume
        out = tmp_path / f"killed-{writes}"
        left[:] = [None] * writes
        try:
            go(out)
            break
        except Killed:
            left[:] = [None] * 99
            go(out, resume=True)
        assert model(out, "c") == model(tmp_path / "whole", "c")
    assert 8 < writes < 29  # the loop ended because nothing was left to kill


# --- real stages


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    (folder / "lenient.py").write_text(
        "def lenient(completion_ids, **kwargs):\n    return [float(sum(ids) % 3 == 0) for ids in completion_ids]\n")
    killing.warm()
    return folder


def real(world: Path, out: Path, steps: int = 2) -> PipelineConfig:
    rewards = [{"file": str(world / "lenient.py"), "function": "lenient"}]
    train = {"max_steps": steps, "save_steps": 2, "deterministic": True, "num_threads": 1, "learning_rate": 1e-2,
             "optim": "muon"}
    sums = {"task": "signed_sums", "limit": 24, "options": {"terms": 2, "digits": 1}}

    def tune(name: str, path: str, data: str) -> dict:
        return {"name": name, "verb": "sft", "config": {
            "model": {"path": path}, "data": {"path": data}, "examples_per_step": 4, "train": train, "device": "cpu"}}

    return build(PipelineConfig, {"output_dir": str(out), "stages": [
        {"name": "sums", "verb": "data", "config": {"sources": [sums], "shuffle": 0}},
        {"name": "base", "verb": "build", "config": {
            "preset": "qwen3-tiny", "tokenizer": {"texts": "stage:sums", "vocab_size": 40, "alphabet": "corpus"}}},
        tune("cold", "stage:base", "stage:sums"),
        {"name": "kept", "verb": "reject", "config": {
            "model": {"path": "stage:cold"}, "data": sums, "rewards": rewards, "max_completion_length": 8, "keep": 2,
            "num_threads": 1, "problems_per_chunk": 8, "device": "cpu", "temperature": 1.5, "num_generations": 6}},
        tune("final_one", "stage:base", "stage:kept")],
        "compare": {"data": sums | {"split": "held_out", "limit": 10}, "device": "cpu",
                    "rewards": [*rewards, {"name": "think_format", "weight": 0}],
                    "eval": {"max_completion_length": 8}}}, "test")


REAL = {"sft": (SftConfig, sft)}


def weights(out: Path) -> list[bytes]:
    return [(out / name).read_bytes() for name in ("base/model.safetensors", "cold/final/model.safetensors",
                                                  "kept/data.jsonl", "final_one/final/model.safetensors")]


def test_a_small_pipeline_runs_from_nothing_to_a_table_and_a_page(world, tmp_path):
    out, said = tmp_path / "p", io.StringIO()
    config = real(world, out)
    result = pipeline(config, Console(stream=said, plain=True), REAL)
    assert result["ending"] == "finished"
    assert len(load_problems(DataConfig(path=str(out / "sums/data.jsonl")))) == 24
    assert load(SftConfig, out / "final_one" / CONFIG).model.path == str(out / "base")
    rows = result["rows"]
    measured = [name for name, row in rows.items() if row["n"] is not None]
    assert measured == ["cold", "final_one"]
    assert rows["cold"]["n"] == 10 and 0 <= rows["cold"]["low"] <= rows["cold"]["pass_at_1"] <= rows["cold"]["high"]
    # what weighs nothing has a column, and decides nothing
    assert rows["cold"]["lenient"] == rows["cold"]["pass_at_1"] and rows["cold"]["think_format"] == 0.0
    assert "think_format" in said.getvalue()
    assert rows["kept"]["num_generated_tokens"] > 24 * 6
    assert all(row["seconds"] > 0 for row in rows.values())
    page = (out / "report.html").read_text()
    assert '<a href="cold/report.html">cold</a>' in page and "<td>base</td>" in page
    assert (out / "cold/report.html").is_file() and "final_one" in said.getvalue()
    listed = {Path(row["run"]).name: row["status"] for row in list_runs(out, quiet())["runs"]}
    assert listed == {"p": "finished", "cold": "finished", "kept": "finished", "final_one": "finished"}

    before = weights(out)
    again = pipeline(config, Console(stream=said, plain=True), REAL, resume=True)
    assert weights(out) == before and again["rows"] == rows
    assert said.getvalue().count("measuring cold") == 1


def attempt(config: PipelineConfig, kill_after: float | None) -> bool:
    """One attempt in a process that is killed after some seconds; True if it came to its end."""
    resume = (Path(config.output_dir) / CONFIG).is_file()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.execvpe(*_command(config, resume))
    end = time.monotonic() + (kill_after or 600)
    while time.monotonic() < end:
        done, code = os.waitpid(child, os.WNOHANG)
        if done:
            assert code == 0, f"the pipeline failed with status {code}"
            return True
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def _command(config: PipelineConfig, resume: bool) -> tuple[str, list[str], dict[str, str]]:
    code = ("import sys\nfrom tests.recipes.test_pipeline import REAL, quiet\n"
            "from tinyr2.recipes.pipeline import PipelineConfig, pipeline\n"
            "config = PipelineConfig.model_validate_json(sys.argv[1])\n"
            "pipeline(config, quiet(), REAL, resume=sys.argv[2] == 'True')\n")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    return sys.executable, [sys.executable, "-c", code, config.model_dump_json(), str(resume)], environment


@pytest.mark.kills
def test_twelve_kills_anywhere_leave_the_same_models(world, tmp_path):
    start = time.monotonic()
    assert attempt(real(world, tmp_path / "whole", steps=16), None)
    length, rng = time.monotonic() - start, random.Random(3)
    config, kills, finished = real(world, tmp_path / "killed", steps=16), 0, False
    while not finished:
        finished = attempt(config, rng.uniform(0.3, 0.9) * length if kills < 12 else None)
        if finished and kills < 12:
            assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
            shutil.move(tmp_path / "killed", tmp_path / f"killed-{kills}")
            finished = False
        kills += not finished
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
