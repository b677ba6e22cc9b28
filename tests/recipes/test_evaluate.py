"""`tinyr2 eval`: a model's figures on a dataset, by built-in and own rewards."""

import io
import json
from pathlib import Path

import pytest

from tinyr2.core import config as configs
from tinyr2.core.errors import ConfigError, DataError
from tinyr2.eval.intervals import wilson
from tinyr2.recipes.build import BuildConfig, build
from tinyr2.recipes.evaluate import EvaluateConfig, evaluate_model
from tinyr2.report.console import Console

GRADERS = """
def right_if_even(prompts, answer, **kwargs):
    return [float(int(a) % 2 == 0) for a in answer]

def broken(prompts, **kwargs):
    raise RuntimeError("no luck")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, ten problems and two graders."""
    folder = tmp_path_factory.mktemp("eval")
    rows = [{"prompt": f"{a}+1=", "answer": str(a + 1), "completion": str(a + 1)} for a in range(10)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "graders.py").write_text(GRADERS)
    raw = {"output_dir": str(folder / "model"), "preset": "qwen3-tiny",
           "tokenizer": {"texts": str(folder / "data.jsonl"), "vocab_size": 40, "alphabet": "corpus"}}
    build(BuildConfig.model_validate(raw), Console(stream=io.StringIO(), plain=True))
    return folder


def run(folder: Path, reward: dict | None = None, out: Path | None = None, data: dict | None = None,
        **settings) -> tuple[dict, str]:
    raw = {"model": {"path": str(folder / "model")}, "data": {"path": str(folder / "data.jsonl")} | (data or {}),
           "eval": {"max_completion_length": 4} | settings, "device": "cpu"}
    if reward is not None:
        raw["rewards"] = [reward]
    stream = io.StringIO()
    result = evaluate_model(configs.build(EvaluateConfig, raw, "test"), Console(stream=stream, plain=True), out=out)
    return result, stream.getvalue()


def test_the_users_reward_decides_and_a_share_has_its_wilson_interval(folder):
    result, shown = run(folder, {"file": str(folder / "graders.py"), "function": "right_if_even"})
    low, high = wilson(5, 10)
    assert (result["pass@1"], result["pass@1_n"]) == (0.5, 10)
    assert (result["pass@1_low"], result["pass@1_high"]) == (low, high)
    assert f"50.0%  {low:.1%} – {high:.1%}" in shown


def test_a_model_that_has_learned_nothing_is_wrong_by_exact_answer(folder):
    result, _ = run(folder)
    assert (result["pass@1"], result["undecided"], result["num_problems"]) == (0.0, 0, 10)


def test_several_answers_give_pass_at_each_k_and_one_seed_the_same_answers(folder):
    reward = {"file": str(folder / "graders.py"), "function": "right_if_even"}
    first, second = (run(folder, reward, num_generations=3, k=[1, 3], temperature=1.0, seed=5)[0] for _ in range(2))
    assert {"pass@1", "pass@3"} <= first.keys()
    assert all(first[name] == second[name] for name in first if name not in ("seconds", "tokens_per_s"))


def test_the_json_file_holds_the_result_and_the_config_it_came_from(folder, tmp_path):
    result, shown = run(folder, out=tmp_path / "e.json")
    written = json.loads((tmp_path / "e.json").read_text())
    assert written.pop("config")["eval"]["max_completion_length"] == 4
    assert written == result
    assert f"written to {tmp_path / 'e.json'}" in shown


def test_a_grader_that_fails_is_quoted_and_its_answers_are_undecided(folder):
    result, shown = run(folder, {"file": str(folder / "graders.py"), "function": "broken"})
    assert (result["pass@1"], result["undecided"]) == (None, 10)
    assert "no luck" in shown


def test_data_without_answers_is_refused_before_any_model_is_loaded(folder, tmp_path):
    (tmp_path / "d.jsonl").write_text('{"prompt": "1+1="}\n')
    with pytest.raises(DataError, match="no row has an answer .*--column answer=theirs"):
        run(folder, data={"path": str(tmp_path / "d.jsonl")})


@pytest.mark.parametrize(("reward", "message"), [
    ("accuracy", "no row has an answer"), ("cosine", "no row has an answer"),
    ("countdown", "no row has a column `numbers`, which countdown needs; fill it in, measure on --task countdown")])
def test_what_a_named_reward_compares_with_must_be_there(folder, tmp_path, reward, message):
    (tmp_path / "d.jsonl").write_text('{"prompt": "1+1="}\n')
    with pytest.raises(DataError, match=message):
        run(folder, {"name": reward}, data={"path": str(tmp_path / "d.jsonl")})


def test_a_reward_that_compares_with_nothing_is_measured_without_answers(folder, tmp_path):
    (tmp_path / "d.jsonl").write_text('{"prompt": "1+1="}\n')
    result, _ = run(folder, {"name": "repetition"}, data={"path": str(tmp_path / "d.jsonl")})
    assert (result["undecided"], result["pass@1"]) == (0, 0.0)


def test_a_length_reward_takes_its_limit_from_the_longest_answer(folder):
    # every answer is cut off at 4 tokens, where the soft punishment is -1; a limit of its own is not reached
    assert run(folder, {"name": "soft_overlong"}, threshold=-0.5)[0]["pass@1"] == 0.0
    own = {"name": "soft_overlong", "options": {"max_length": 99}}
    assert run(folder, own, threshold=-0.5)[0]["pass@1"] == 1.0


def test_an_out_that_cannot_be_written_is_refused_before_any_compute(folder, tmp_path):
    with pytest.raises(ConfigError, match="give a file in a folder that is there"):
        run(folder, out=tmp_path / "nowhere" / "e.json")
