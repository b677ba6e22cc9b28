"""The run folder: who may write there, what is never deleted, and what stands there whole or not at all."""

import io
import json
import os
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest

import tinyr2
from tinyr2.core.config import Config, load
from tinyr2.core.errors import RunError
from tinyr2.recipes.run import Run, identity, open_run, refuse_taken
from tinyr2.report.console import Console
from tinyr2.report.jsonl import read_jsonl
from tinyr2.train.health import Alarm
from tinyr2.train.loop import StepResult


class Settings(Config):
    passing = frozenset({"patience"})

    knob: int = 1
    patience: int = 3
    output_dir: str


def opened(folder: Path, *, stream=None, resume: bool = False, overwrite: bool = False, knob: int = 1):
    console = Console(plain=True, stream=stream or io.StringIO())
    return open_run(Settings(output_dir=str(folder), knob=knob), "sft", console, total=9, resume=resume,
                    overwrite=overwrite)


@pytest.fixture
def earlier(tmp_path) -> Path:
    """A run that is over."""
    folder = tmp_path / "run"
    with opened(folder) as run:
        run.record({"step": 1, "loss": 2.0}, {"step": 1, "step_s": 0.1}, [])
        run.commit("final", lambda path: (path.mkdir(), (path / "model").write_text("old")))
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints/state").write_text("precious")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- who may open


def test_an_opened_run_says_what_it_is_made_of(tmp_path):
    with opened(tmp_path / "a/b/run", knob=7) as run:
        assert run.folder == tmp_path / "a/b/run"
        assert run.checkpoints == run.folder / "checkpoints"
    assert load(Settings, tmp_path / "a/b/run/config.resolved.yaml") == Settings(output_dir=str(run.folder), knob=7)
    env = json.loads((run.folder / "env.json").read_text())
    assert (env["verb"], env["cwd"]) == ("sft", os.getcwd())
    assert env["machine"]["versions"]["torch"]
    assert [(run.folder / f"{name}.jsonl").read_bytes() for name in ("metrics", "timing", "events")] == [b""] * 3


def test_an_existing_run_is_refused_with_both_ways_out_and_left_alone(earlier):
    before = contents(earlier)
    with pytest.raises(RunError) as caught, opened(earlier):
        pass
    assert "--resume" in str(caught.value) and "--overwrite" in str(caught.value)
    assert str(earlier) in str(caught.value)
    assert contents(earlier) == before


@pytest.mark.parametrize("names", [[], ["lock"]])
def test_a_folder_that_holds_no_run_is_taken(names, tmp_path):
    for name in names:
        (tmp_path / name).write_text("")
    with opened(tmp_path) as run:
        assert run.folder == tmp_path


@pytest.mark.parametrize(("resume", "overwrite", "message"), [
    (False, False, "already holds something; --resume goes on with that run, --overwrite deletes it"),
    (False, True, "not a run folder .no config.resolved.yaml., so --overwrite will not delete it"),
    (True, False, "no run to resume here .no config.resolved.yaml.; start it without --resume"),
    (True, True, "--resume goes on with a run and --overwrite deletes it; give one of them"),
])
def test_a_folder_of_something_else_is_never_touched(resume, overwrite, message, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match=message), opened(tmp_path, resume=resume, overwrite=overwrite):
        pass
    assert contents(tmp_path) == {"thesis.tex": b"years of work"}


@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"resume": True}])
def test_a_file_is_no_run_folder(options, tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(RunError, match="a file, not a run folder; give another output_dir"):
        refuse_taken(tmp_path / "file", **{"resume": False, "overwrite": False} | options)
    assert (tmp_path / "file").read_text() == "kept"


def test_overwriting_leaves_nothing_of_the_earlier_run(earlier):
    with opened(earlier, overwrite=True, knob=2):
        pass
    assert contents(earlier).keys() == {"lock", "env.json", "config.resolved.yaml", "metrics.jsonl", "timing.jsonl",
                                        "events.jsonl"}
    assert load(Settings, earlier / "config.resolved.yaml").knob == 2
    assert (earlier / "metrics.jsonl").read_bytes() == b""


def test_resuming_keeps_everything_but_what_a_crash_left_half_written(earlier):
    (earlier / ".tmp-final-1234").mkdir()
    (earlier / ".tmp-final-1234/model").write_text("half")
    before = {k: v for k, v in contents(earlier).items() if not k.startswith(".tmp") and k != "lock"}
    with opened(earlier, resume=True):
        pass
    assert {k: v for k, v in contents(earlier).items() if k != "lock"} == before


@pytest.mark.parametrize("options", [{"resume": True}, {"overwrite": True}])
def test_a_second_writer_is_refused_and_deletes_nothing(options, tmp_path):
    with opened(tmp_path / "run") as run:
        run.record({"step": 1, "loss": 2.0}, {"step": 1}, [])
        before = contents(run.folder)
        with pytest.raises(RunError, match=rf"process {os.getpid()} on host .* is writing here"), \
                opened(run.folder, **options):
            pass
        assert contents(run.folder) == before
    with opened(run.folder, **options):
        pass  # the first has let go


def test_a_run_that_fails_gives_its_folder_back(tmp_path):
    with pytest.raises(ZeroDivisionError), opened(tmp_path / "run"):
        raise ZeroDivisionError
    with opened(tmp_path / "run", resume=True):
        pass


# --- what is written


def test_a_folder_is_committed_whole_and_replaces_the_one_before(earlier):
    with opened(earlier, resume=True) as run:
        def write(path: Path) -> None:
            path.mkdir()
            (path / "new").write_text("new")
            assert (earlier / "final/model").read_text() == "old"  # until the new one is whole

        run.commit("final", write)
    assert {p.name for p in (earlier / "final").iterdir()} == {"new"}
    assert not list(earlier.glob(".tmp-*"))


def test_a_commit_that_fails_leaves_the_old_folder_and_its_rest_goes_when_the_run_is_next_opened(earlier):
    def fail(path: Path) -> None:
        path.mkdir()
        (path / "half").write_text("")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), opened(earlier, resume=True) as run:
        run.commit("final", fail)
    assert contents(earlier / "final") == {"model": b"old"}
    with opened(earlier, resume=True):
        pass
    assert not list(earlier.glob(".tmp-*"))


def test_a_step_is_recorded_in_its_files_and_an_alarm_on_the_console_too(tmp_path):
    stream = io.StringIO()
    alarm = Alarm(step=1, name="grad_norm", level="warn", evidence="norm 99", action="lower the rate", stop=False)
    with opened(tmp_path / "run", stream=stream) as run:
        run.record({"step": 1, "loss": 2.5}, {"step": 1, "step_s": 0.25}, [alarm])
        run.event("checkpoint_skipped", step=1, level="critical", evidence="disk full", action="make room")
        run.event("noticed", step=1)
    assert read_jsonl(run.folder / "metrics.jsonl") == [{"step": 1, "loss": 2.5}]
    assert read_jsonl(run.folder / "timing.jsonl") == [{"step": 1, "step_s": 0.25}]
    events = read_jsonl(run.folder / "events.jsonl")
    assert [(e["name"], e.get("evidence")) for e in events] == [
        ("grad_norm", "norm 99"), ("checkpoint_skipped", "disk full"), ("noticed", None)]
    said = stream.getvalue()
    assert "norm 99" in said and "lower the rate" in said and "disk full" in said and "noticed" not in said


def test_the_files_are_cut_back_to_what_a_checkpoint_knew(tmp_path):
    with opened(tmp_path / "run") as run:
        run.record({"step": 1}, {"step": 1}, [])
        known = run.cursors()
        run.record({"step": 2}, {"step": 2}, [])
        assert known == {"metrics.jsonl": 12, "timing.jsonl": 12, "events.jsonl": 0}
        run.rewind(known)
        run.record({"step": 20}, {"step": 20}, [])
        assert read_jsonl(run.folder / "metrics.jsonl") == [{"step": 1}, {"step": 20}]
        run.rewind({})
    assert read_jsonl(run.folder / "metrics.jsonl") == []


def test_without_a_way_to_show_them_completions_are_left_out(tmp_path):
    with opened(tmp_path / "run") as run:
        run.completions(1, StepResult(metrics={"loss": 1.0}, num_tokens=1))
    assert not (run.folder / "completions").exists()


def test_the_end_is_noted_with_a_report(tmp_path):
    with opened(tmp_path / "run") as run:
        run.record({"step": 1, "loss": 2.5}, {"step": 1, "step_s": 0.25}, [])
        report = run.finish("finished")
    assert read_jsonl(run.folder / "events.jsonl") == [{"event": "ended", "name": "ended", "ending": "finished"}]
    assert report == run.folder / "report.html" and "finished" in report.read_text()


def test_an_identity_is_that_of_all_settings_but_the_folder():
    first = identity(Settings(output_dir="a"))
    assert identity(Settings(output_dir="b")) == first
    assert identity(Settings(output_dir="a", knob=2)) != first


def test_a_run_is_resumed_with_other_passing_settings_which_are_saved(tmp_path):
    config = Settings(output_dir=str(tmp_path / "run"))
    for i, now in enumerate((config, config.model_copy(update={"patience": 5}))):
        with open_run(now, "sft", Console(plain=True, stream=io.StringIO()), total=9, resume=i > 0, overwrite=False):
            assert identity(now) == identity(config)
    assert load(Settings, tmp_path / "run/config.resolved.yaml").patience == 5
    with pytest.raises(RunError, match="knob: 1 before, 2 now"), opened(tmp_path / "run", resume=True, knob=2):
        pass


def test_what_is_told_at_the_end_stands_before_the_end_and_also_where_a_run_breaks_off(tmp_path):
    for name in ("whole", "broken"):
        with pytest.raises(ValueError) if name == "broken" else nullcontext(), opened(tmp_path / name) as run:
            run.at_end(lambda run=run: run.event("told"))
            if name == "broken":
                raise ValueError
            run.finish("finished")
    assert [e["event"] for e in read_jsonl(tmp_path / "whole/events.jsonl")] == ["told", "ended"]
    assert [e["event"] for e in read_jsonl(tmp_path / "broken/events.jsonl")] == ["told"]


def test_our_warnings_are_told_once_on_the_console_and_others_are_left_to_python(tmp_path):
    stream, ours = io.StringIO(), str(Path(tinyr2.__file__).parent / "models/packed.py")
    library = str(Path(tinyr2.__file__).parents[1] / ".venv/lib/tinyr2/site-packages/torch/nn.py")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        before = warnings.showwarning
        with opened(tmp_path / "run", stream=stream):
            for line in (1, 2, 3):
                warnings.warn_explicit("it runs padded", UserWarning, ours, line)
            warnings.warn_explicit("something of torch's", UserWarning, library, 1)
        assert warnings.showwarning is before
    assert stream.getvalue() == "note: it runs padded\n"
    assert [str(w.message) for w in seen] == ["something of torch's"]


def test_a_recorder_is_what_the_loop_expects():
    assert all(hasattr(Run, name) for name in ("record", "completions", "event", "cursors"))
