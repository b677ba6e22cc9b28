"""The command line: fast help, one message and an exit code for every fault, one JSON object for every result."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner, Result

import tinyr2
from tinyr2 import cli
from tinyr2.core.config import Config
from tinyr2.recipes.run import Run

ROOT = Path(__file__).resolve().parents[1]


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(cli.app, [str(w) for w in words], prog_name="tinyr2")


def commands() -> dict:
    """Every verb, the group's under its own name and its members' beside it."""
    found = {}
    for name, command in get_command(cli.app).commands.items():
        inner = getattr(command, "commands", None)
        found |= {f"{name} {n}": c for n, c in inner.items()} if inner else {name: command}
    return found


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with worked problems, a model, and a config that trains it for three steps."""
    folder = tmp_path_factory.mktemp("cli")
    rows = [{"prompt": f"{a}+{b}=", "completion": f"{a + b}", "answer": str(a + b)} for a in range(5) for b in range(5)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    built = run("build", folder / "model", "--preset", "qwen3-tiny", "num_hidden_layers=1", "--train-tokenizer",
                folder / "data.jsonl", "--vocab-size", 40, "--alphabet", "corpus", "--json")
    assert built.exit_code == 0, built.output
    (folder / "sft.yaml").write_text(f"model: {{path: {folder / 'model'}}}\ndata: {{path: {folder / 'data.jsonl'}}}\n"
                                     "train: {max_steps: 3, save_steps: 1}\nexamples_per_step: 2\ndevice: cpu\n"
                                     f"output_dir: {folder / 'unset'}\n")
    return folder


@pytest.fixture(scope="module")
def finished(work) -> Path:
    """A run of `tinyr2 sft` that reached its end."""
    done = run("sft", work / "sft.yaml", f"output_dir={work / 'finished'}", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["ending"] == "finished"
    return work / "finished"


def test_help_takes_at_most_half_a_second():
    """The process's own seconds, so that a busy machine does not count; the best of three."""
    seconds = []
    for _ in range(3):
        child = subprocess.Popen([sys.executable, "-m", "tinyr2", "--help"], cwd=ROOT, stdout=subprocess.PIPE)
        text = child.stdout.read().decode()
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        assert (child.returncode, "distill" in text) == (0, True)
        seconds.append(used.ru_utime + used.ru_stime)
    assert min(seconds) <= 0.5


def test_the_command_line_loads_nothing_heavy_before_a_verb_runs():
    code = "import sys, tinyr2.cli; print([m for m in ('torch', 'transformers', 'pyarrow', 'numpy', 'rich') " \
           "if m in sys.modules], [m for m in sys.modules if m.startswith('tinyr2.recipes')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[] []\n"


def test_the_verbs_are_these():
    assert commands().keys() == {"quickstart", "build", "sft", "distill", "reinforce", "pipeline", "eval", "align",
                                 "doctor", "report", "runs list", "runs resume"}
    text = run("--help").stdout
    assert all(f"\n  {verb.partition(' ')[0]} " in text for verb in commands())


@pytest.mark.parametrize("verb", commands())
def test_a_verbs_help_has_an_example_and_explains_every_option(verb):
    text = run(*verb.split(), "--help").stdout
    assert "Example" in text
    assert f"tinyr2 {verb.removesuffix(' list')}" in text.partition("Example")[2]
    assert "--json" in text
    command = commands()[verb]
    assert [p.name for p in command.params if not p.help] == []


def test_the_exit_codes_are_documented():
    text = run("--help").stdout
    assert all(f"\n    {code} " in text for code in (0, 1, 2, 3, 130))
    assert run().stdout == text


def test_the_version_is_the_projects():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert run("--version").stdout == f"tinyr2 {project['version']}\n"
    assert tinyr2.__version__ == project["version"]


def fault(*words: str | Path) -> str:
    """The message of a fault of the user's: on standard error, alone, with exit code 2."""
    done = run(*words)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.parametrize(("words", "message"), [
    (["distil"], "No such command 'distil'"),
    (["sft"], "Missing argument 'CONFIG.yaml'"),
    (["sft", "a.yaml", "--resum"], "No such option: --resum"),
    (["eval", "m", "--data", "d", "-n", "many"], "Invalid value for '-n'"),
    (["runs", "resume"], "Missing argument 'RUN'"),
    (["--vers"], "No such option: --vers"),
    (["build", "m", "--preset", "qwen3-tiny"], "give one of --tokenizer, --train-tokenizer, "
                                               "--trim-tokenizer; got none"),
    (["build", "m", "--tokenizer", "t"], "give one of --preset, --config; got none"),
    (["build", "m", "--preset", "a", "--config", "b", "--tokenizer", "t"], "got --preset and --config"),
    (["build", "m", "--config", "none.yaml", "--tokenizer", "t"], "none.yaml: no such config file"),
    (["sft", "none.yaml"], "none.yaml: no such config file"),
    (["runs", "nowhere"], "nowhere: no such folder"),
    (["runs", "resume", "nowhere"], "nowhere: no run to resume here"),
    (["report", "nowhere"], "nowhere: no such run folder"),
    (["eval", "./nowhere", "--data", "d.jsonl"], "./nowhere: no such model folder"),
    (["eval", "m", "--data", "d", "--column", "prompt"], "'prompt': write --column prompt=question"),
    (["eval", "m", "--data", "d", "--column", "promt=x"], "'promt' is no column of ours; did you mean 'prompt'"),
    (["eval", "m", "--data", "d", "--reward", "exact"], "'exact': write --reward exact_answer or"),
    (["eval", "m", "--data", "d", "--reward", "countdwn"], "'countdwn': write --reward countdown or"),
    (["eval", "m", "--data", "d", "--reward", "reward_model"], "reward_model: options.path: missing"),
    (["eval", "m"], "give one of --data, --task; got none of them"),
    (["eval", "m", "--data", "d", "--task", "countdown"], "give one of --data, --task; got --data and --task"),
    (["eval", "m", "--data", "d", "--option", "numbers=4"], "--option numbers=4: options are a task's"),
    (["eval", "m", "--task", "countdwn"], "'countdwn' is no task; did you mean 'countdown'?"),
    (["eval", "m", "--task", "countdown", "--option", "nmbers=4"], "nmbers: unknown key; did you mean 'numbers'?"),
    (["eval", "m", "--task", "countdown", "--split", "test"], "a task has the splits train and held_out"),
    (["eval", "m", "--data", "d", "-n", "4"], "set temperature=0.6 or so"),
    (["align", "a"], "no tokenizer of the teacher: give A and B"),
    (["align"], "no tokenizer of the student: give A and B, two folders or hub names"),
    (["align", "./nowhere", "b"], "./nowhere: no such folder"),
    (["align", "a", "b", "--max-bias", "0.2"], "are of answers; give --student and --teacher"),
    (["align", "--student", "s", "--data", "d.jsonl"], "--teacher: missing"),
    (["align", "--student", "s", "--teacher", "t"], "--data: missing"),
])
def test_words_that_cannot_be_meant_are_answered_with_one_message(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in fault(*words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("override", "message"), [
    ("train.max_step=3", "train.max_step: unknown key; did you mean 'max_steps'"),
    ("train.max_steps=few", "train.max_steps: Input should be a valid integer"),
    ("train.max_steps", "write it as key=value"),
    ("data.path=none.jsonl", "none.jsonl: no such file"),
])
def test_a_setting_that_cannot_work_is_named_before_anything_is_written(work, override, message):
    before = sorted(work.iterdir())
    assert message in fault("sft", work / "sft.yaml", override)
    assert sorted(work.iterdir()) == before


def test_a_malformed_line_is_named_with_its_file_and_number(work, tmp_path):
    data = tmp_path / "bad.jsonl"
    data.write_text('{"prompt": "1+1=", "completion": "2", "answer": "2"}\n{"prompt": \n')
    assert f"{data}, line 2" in fault("sft", work / "sft.yaml", f"data.path={data}")
    assert f"{data}, line 2" in fault("eval", work / "model", "--data", data)


def test_a_run_into_an_existing_folder_names_both_ways_out(work, finished):
    message = fault("sft", work / "sft.yaml", f"output_dir={finished}")
    assert "--resume" in message
    assert "--overwrite" in message
    assert "give one of them" in fault("sft", work / "sft.yaml", f"output_dir={finished}", "--resume", "--overwrite")


@pytest.mark.parametrize(("content", "message"), [
    (b"model: \xff", "not UTF-8 (byte 8)"), (b"a: \x01", "character 4 is '\\x01'"), (b"a: [1", "line 1, column 6"),
    (b"- 1", "a config is a mapping of keys"), (b"a: 1\na: 2", "key 'a' stands twice")])
def test_a_config_that_cannot_be_read_says_where(tmp_path, content, message):
    (tmp_path / "c.yaml").write_bytes(content)
    text = fault("sft", tmp_path / "c.yaml")
    assert message in text
    assert "c.yaml" in text


def test_a_fault_of_our_own_keeps_its_traceback(monkeypatch, work):
    def broken() -> dict:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(cli, "_recipes", broken)
    assert isinstance(run("sft", work / "sft.yaml").exception, ZeroDivisionError)


def test_an_interrupt_where_nothing_is_saved_exits_130(monkeypatch, work):
    def interrupted() -> dict:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_recipes", interrupted)
    assert run("sft", work / "sft.yaml").exit_code == 130


@pytest.mark.parametrize(("ending", "code", "note"), [
    ("finished", 0, ""), ("stopped", 0, "tinyr2 runs resume runs/a"), ("halted", 3, "critical alarm")])
def test_how_a_run_ended_is_the_exit_code(monkeypatch, tmp_path, ending, code, note):
    class Nothing(Config):
        """No settings."""

    result = {"ending": ending, "step": 4, "run": "runs/a"}
    monkeypatch.setattr(cli, "_recipes", lambda: {"sft": (Nothing, lambda config, console, **options: result)})
    (tmp_path / "c.yaml").write_text("")
    done = run("sft", tmp_path / "c.yaml", "--json")
    assert (done.exit_code, json.loads(done.stdout)) == (code, result)
    assert note in done.stderr


def test_a_terminated_run_moves_and_is_resumed_to_its_end(work, tmp_path, monkeypatch):
    before = Run.record

    def record(self, metrics, timing, alarms):
        before(self, metrics, timing, alarms)
        if metrics["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "record", record)
    stopped = run("sft", work / "sft.yaml", f"output_dir={tmp_path / 'a'}")
    assert stopped.exit_code == 0
    assert f"stopped at step 2, after a checkpoint; go on with: tinyr2 runs resume {tmp_path / 'a'}" in stopped.stdout
    monkeypatch.setattr(Run, "record", before)
    shutil.move(tmp_path / "a", tmp_path / "b")
    resumed = run("runs", "resume", tmp_path / "b", "--json")
    result = json.loads(resumed.stdout.splitlines()[-1])
    assert (resumed.exit_code, result["ending"], result["step"]) == (0, "finished", 3)
    assert (tmp_path / "b/final/model.safetensors").is_file()
    steps = [json.loads(line)["step"] for line in (tmp_path / "b/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]


def test_runs_lists_by_default_and_json_is_the_last_line_alone(work, finished):
    shown = run("runs", work)
    assert f"{finished}" in shown.stdout
    assert "3/3" in shown.stdout
    done = run("runs", work, "--json")
    (row,) = [r for r in json.loads(done.stdout)["runs"] if r["run"] == str(finished)]
    assert (row["verb"], row["status"], row["step"], row["max_steps"]) == ("sft", "finished", 3, 3)
    assert run("runs", "list", work, "--json").stdout == done.stdout
    again = run("runs", "resume", finished, "--json")
    assert (again.exit_code, json.loads(again.stdout)["ending"]) == (0, "finished")
    assert "finished already" in again.stderr


def test_report_prints_its_path_and_json_what_it_shows(finished):
    assert run("report", finished).stdout == f"{finished / 'report.html'}\n"
    data = json.loads(run("report", finished, "--json").stdout)
    assert (data["steps"], data["status"], data["report"]) == (3, "finished", str(finished / "report.html"))


def test_eval_passes_every_option_on_and_ends_with_json(work, tmp_path):
    (tmp_path / "r.py").write_text("def one(prompts, **kwargs):\n    return [1.0] * len(prompts)\n")
    done = run("eval", work / "model", "--data", work / "data.jsonl", "--limit", 6, "--column", "answer=completion",
               "--reward", f"{tmp_path / 'r.py'}:one", "-n", 3, "-k", 1, "-k", 3, "--temperature", 0.5, "--top-p", 0.9,
               "--top-k", 5, "--min-p", 0.01, "--max-completion-length", 2, "--seed", 3, "--device", "cpu",
               "--out", tmp_path / "e.json", "--json")
    result = json.loads(done.stdout.splitlines()[-1])
    assert (done.exit_code, result["pass@1"], result["pass@3"], result["num_problems"]) == (0, 1.0, 1.0, 6)
    settings = json.loads((tmp_path / "e.json").read_text())["config"]
    got = {name: settings["eval"][name] for name in ("num_generations", "k", "temperature", "top_p", "top_k", "min_p",
                                                     "max_completion_length", "seed")}
    assert got == {"num_generations": 3, "k": [1, 3], "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.01,
                   "max_completion_length": 2, "seed": 3}
    assert (settings["data"]["limit"], settings["data"]["columns"]) == (6, {"answer": "completion"})


def test_eval_measures_on_problems_generated_here_by_a_reward_named_alone(work, tmp_path):
    done = run("eval", work / "model", "--task", "countdown", "--split", "held_out", "--limit", 5, "--option",
               "numbers=2", "--option", "operators=+", "--reward", "countdown", "--max-completion-length", 2,
               "--device", "cpu", "--out", tmp_path / "e.json", "--json")
    result = json.loads(done.stdout.splitlines()[-1])
    assert (done.exit_code, result["pass@1"], result["num_problems"], result["undecided"]) == (0, 0.0, 5, 0)
    settings = json.loads((tmp_path / "e.json").read_text())["config"]
    assert settings["data"]["options"] == {"numbers": 2, "operators": "+"}
    assert (settings["data"]["task"], settings["data"]["split"]) == ("countdown", "held_out")
    assert [r["name"] for r in settings["rewards"]] == ["countdown"]


@pytest.mark.parametrize(("algorithm", "verb"), [("grpo", "reinforce"), ("dpo", "dpo"), ("rm", "rm")])
def test_reinforce_carries_out_the_algorithm_that_the_config_names(algorithm, verb, monkeypatch, tmp_path):
    class Named(Config):
        """One setting."""

        algorithm: str

    result = {"ending": "finished", "step": 1, "run": "runs/a"}
    monkeypatch.setattr(cli, "_recipes", lambda: {
        name: (Named, lambda config, console, name=name, **options: result | {"verb": name})
        for name in ("reinforce", "dpo", "rm")})
    (tmp_path / "c.yaml").write_text(f"algorithm: {algorithm}\n")
    assert json.loads(run("reinforce", tmp_path / "c.yaml", "--json").stdout)["verb"] == verb


@pytest.mark.parametrize(("ending", "code", "note"), [("finished", 0, ""), ("halted", 3, "tinyr2 runs resume"),
                                                      ("stopped", 0, "tinyr2 runs resume")])
def test_how_a_pipeline_ended_is_the_exit_code(ending, code, note, monkeypatch, tmp_path):
    from tinyr2.recipes import pipeline

    result = {"ending": ending, "step": 1, "run": "runs/a"}
    monkeypatch.setattr(pipeline, "pipeline", lambda *args, **options: result)
    (tmp_path / "c.yaml").write_text("output_dir: runs/a\nstages: [{name: a, verb: sft}]\n")
    done = run("pipeline", tmp_path / "c.yaml", "--json")
    assert (done.exit_code, json.loads(done.stdout)) == (code, result)
    assert note in done.stderr


def test_a_list_whose_only_element_is_wrong_is_told_once(tmp_path):
    (tmp_path / "c.yaml").write_text("output_dir: runs/a\nstages: [{name: a, vreb: sft}]\n")
    message = fault("pipeline", tmp_path / "c.yaml")
    assert "vreb: unknown key; did you mean 'verb'" in message and "at least" not in message
    (tmp_path / "c.yaml").write_text("output_dir: runs/a\nstages: []\n")
    assert "stages: at least 1 needed, got 0; add more" in fault("pipeline", tmp_path / "c.yaml")


def test_build_takes_a_shape_from_a_file_with_overrides_on_top(work, tmp_path):
    (tmp_path / "m.yaml").write_text("model_type: llama\nhidden_size: 16\nnum_hidden_layers: 1\nhead_dim: 8\n"
                                     "num_attention_heads: 2\nnum_key_value_heads: 2\nintermediate_size: 24\n")
    words = ("--config", tmp_path / "m.yaml", "--tokenizer", work / "model")
    done = run("build", tmp_path / "m", "num_hidden_layers=2", *words, "--pad-vocab", 32, "--dtype", "bfloat16",
               "--seed", 7, "--json")
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["model_type"], result["vocab_size"], result["dtype"], result["seed"]) == ("llama", 32, "bfloat16", 7)
    assert json.loads((tmp_path / "m/config.json").read_text())["num_hidden_layers"] == 2
    assert "hiden_size: no field of LlamaConfig; did you mean 'hidden_size'" in fault(
        "build", tmp_path / "n", "hiden_size=3", *words)
    assert "--overwrite" in fault("build", tmp_path / "m", *words)
    assert not (tmp_path / "n").exists()


def test_doctor_exits_2_where_a_config_has_faults_and_0_where_it_has_none(work):
    sound = run("doctor", work / "sft.yaml", f"output_dir={work / 'new'}", "--json")
    assert (sound.exit_code, json.loads(sound.stdout)["faults"]) == (0, 0)
    broken = run("doctor", work / "sft.yaml", "data.path=none.jsonl", "--json")
    assert (broken.exit_code, json.loads(broken.stdout)["faults"]) == (2, 1)


def test_quickstart_is_told_what_was_typed(monkeypatch, tmp_path):
    from tinyr2.data.tasks import SignedSums
    from tinyr2.recipes import quickstart

    calls = []
    monkeypatch.setattr(quickstart, "quickstart", lambda console, **options: calls.append(options) or {"rows": {}})
    done = run("quickstart", "--seed", 2, "--out", tmp_path / "q", "--minutes", 0.5, "--digits", 1, "--overwrite",
               "--json")
    assert (done.exit_code, json.loads(done.stdout)) == (0, {"rows": {}})
    assert calls == [{"out": tmp_path / "q", "seed": 2, "minutes": 0.5, "overwrite": True,
                      "level": SignedSums(terms=3, digits=1)}]
    run("quickstart")
    assert calls[1] == {"out": Path("runs/quickstart"), "seed": 0, "minutes": 3.0, "overwrite": False,
                        "level": quickstart.LEVEL}


def test_align_ends_with_one_object_and_draws_elsewhere(work):
    done = run("align", work / "model", work / "model", "--data", work / "data.jsonl", "--limit", 2, "--json")
    assert done.exit_code == 0, done.output
    (line,) = done.stdout.splitlines()
    found = json.loads(line)
    assert (found["same"], found["bytes_covered"], found["exact"]) == (True, 1.0, {"tokens": 1.0, "bytes": 1.0})
    assert found["kinds"].keys() == {"data"}
    assert "both cut here" in done.stderr


def test_align_asks_two_models_where_they_are_given(work):
    done = run("align", "--student", work / "model", "--teacher", work / "model", "--data", work / "data.jsonl",
               "--limit", 2, "--max-completion-length", 4, "--device", "cpu", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["models"]
    assert (found["problems"], found["answers"], found["max_bias"]) == (2, 2, 0.1)
    assert {"exact", "chunk", "chunk_debiased", "mapped"} <= found.keys()
