import json
import shutil
import signal
from pathlib import Path

import pytest

from tests.recipes import killing
from tinyr2.core.errors import RunError
from tinyr2.recipes.sft import sft
from tinyr2.report.console import Console


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    killing.make_world(folder)
    killing.warm()
    return folder


@pytest.mark.parametrize("kind", killing.KINDS)
def test_three_kills_leave_the_same_weights_and_the_same_metrics(kind, world, tmp_path):
    found = killing.kill_and_compare(kind, world, tmp_path, kills=3, seed=7)
    assert found["killed"] == found["undisturbed"]


@pytest.mark.kills
@pytest.mark.parametrize("kind", killing.KINDS)
def test_twenty_kills_leave_the_same_weights_and_the_same_metrics(kind, world, tmp_path):
    found = killing.kill_and_compare(kind, world, tmp_path, kills=20, seed=11)
    same = found["killed"] == found["undisturbed"]
    print(json.dumps({"kind": kind, "kills": 20, "equal": same, "metric_rows_at_kill": found["steps_at_kill"]}))
    assert same


def test_sigterm_takes_a_checkpoint_and_stops_and_resume_goes_on_to_the_same_end(world, tmp_path):
    whole = killing.config_of("token", world, tmp_path / "whole")
    killing.run(whole, resume=False)
    config = killing.config_of("token", world, tmp_path / "stopped")
    stop_at_step(config, 5)
    folder = Path(config.output_dir)
    assert [p.name for p in sorted((folder / "checkpoints").iterdir())][-1] == "step-00000005"
    assert not (folder / "final").exists()
    killing.run(config, resume=True)
    assert killing.outcome(folder) == killing.outcome(tmp_path / "whole")


def stop_at_step(config, step: int) -> None:
    """Send this process a SIGTERM while `step` is being recorded."""
    from tinyr2.recipes.run import Run
    record = Run.record

    def stop(self, metrics, timing, alarms):
        record(self, metrics, timing, alarms)
        if metrics["step"] == step:
            signal.raise_signal(signal.SIGTERM)

    Run.record = stop
    try:
        killing.run(config, resume=False)
    finally:
        Run.record = record


def test_a_damaged_newest_checkpoint_is_set_aside_loudly_and_the_end_is_the_same(world, tmp_path):
    whole = killing.config_of("token", world, tmp_path / "whole")
    killing.run(whole, resume=False)
    config = killing.config_of("token", world, tmp_path / "hurt")
    stop_at_step(config, 8)
    folder = Path(config.output_dir)
    newest = folder / "checkpoints" / "step-00000008" / "model.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(bytes(data))
    killing.run(config, resume=True)
    assert killing.outcome(folder) == killing.outcome(tmp_path / "whole")
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    told = [e["evidence"] for e in events if e["event"] == "checkpoint_set_aside"]
    assert len(told) == 1 and "step-00000008 is damaged" in told[0]


@pytest.mark.parametrize("change", [{"learning_rate": 1e-3}, {"seed": 1}])
def test_a_run_is_not_resumed_with_other_settings(change, world, tmp_path):
    config = killing.config_of("sft", world, tmp_path / "run")
    stop_at_step(config, 4)
    other = killing.config_of("sft", world, tmp_path / "run", **change)
    with pytest.raises(RunError, match="config"):
        killing.run(other, resume=True)


def test_a_run_is_not_resumed_on_other_data(world, tmp_path):
    own = tmp_path / "world"
    shutil.copytree(world, own)
    config = killing.config_of("sft", own, tmp_path / "run")
    stop_at_step(config, 4)
    rows = (own / "data.jsonl").read_text().splitlines()
    (own / "data.jsonl").write_text("\n".join(rows[1:]) + "\n")
    with pytest.raises(RunError, match="data"):
        killing.run(config, resume=True)


def test_clock_readings_are_kept_out_of_the_metrics(world, tmp_path):
    config = killing.config_of("token", world, tmp_path / "run")
    killing.run(config, resume=False)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    clocks = [json.loads(line) for line in (tmp_path / "run/timing.jsonl").read_text().splitlines()]
    assert len(rows) == len(clocks) == killing.STEPS
    assert not [name for row in rows for name in row if name.endswith("_s") or "seconds" in name]
    assert all(row["step_s"] > 0 for row in clocks)


def test_another_setting_is_named_with_both_values(world, tmp_path):
    config = killing.config_of("sft", world, tmp_path / "run")
    stop_at_step(config, 4)
    other = killing.config_of("sft", world, tmp_path / "run", learning_rate=1e-3)
    with pytest.raises(RunError, match=r"train.learning_rate: 0.003 before, 0.001 now"):
        killing.run(other, resume=True)


def test_overwriting_never_deletes_what_the_run_reads(world, tmp_path):
    killing.run(killing.config_of("sft", world, tmp_path / "run"), resume=False)
    config = killing.config_of("sft", world, tmp_path / "run")
    again = config.model_copy(update={"model": config.model.model_copy(update={"path": str(tmp_path / "run/final")})})
    with pytest.raises(RunError, match="--overwrite would delete"):
        sft(again, Console(plain=True), overwrite=True)
    assert (tmp_path / "run/final/model.safetensors").is_file()


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("writes", [0, 1])
@pytest.mark.parametrize("torn", [False, True])
def test_a_run_killed_while_its_folder_is_made_can_be_started_or_resumed(world, tmp_path, monkeypatch, writes, torn):
    from tinyr2.recipes import run
    write, done = run.write_atomic, []

    def stop(path, data):
        if len(done) == writes:
            if torn:
                path.with_name(f".{path.name}.torn").write_text("half")
            raise Killed
        done.append(path.name)
        write(path, data)

    monkeypatch.setattr(run, "write_atomic", stop)
    config = killing.config_of("sft", world, tmp_path / "run", max_steps=2)
    with pytest.raises(Killed):
        killing.run(config, resume=False)
    monkeypatch.undo()
    killing.run(config, resume=(tmp_path / "run/config.resolved.yaml").is_file())
    assert (tmp_path / "run/final/model.safetensors").is_file()
    assert json.loads((tmp_path / "run/env.json").read_text())["verb"] == "sft"
