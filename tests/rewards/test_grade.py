import math
import sys
from dataclasses import replace

import pytest

from tinyr2.core.config import build
from tinyr2.core.errors import ConfigError
from tinyr2.core.types import Message, Problem, Rollout
from tinyr2.rewards.grade import RewardConfig, RewardFunction, grade, load_reward, load_rewards


def rollout(text, answer="4", sample=0, **columns):
    problem = Problem(id="p:0", task="p", messages=(Message("user", "2+2?"),), answer=answer, columns=columns)
    return Rollout(problem=problem, group=0, sample=sample, author="student", prompt_ids=(1,), response_ids=(2, 3),
                   finish="stop", text=text)


def function(call, name="score", weight=1.0):
    return RewardFunction(name=name, weight=weight, call=call)


def written(tmp_path, text, name="my.py"):
    path = tmp_path / name
    path.write_text(text)
    return str(path)


TWO = [rollout("#### 4"), rollout("#### 5", sample=1)]
EXACT = load_reward(RewardConfig(name="exact_answer"))


def test_exact_answer_grades_text_against_the_problem():
    assert [r.reward for r in grade([*TWO, rollout("#### 4", answer=None)], [EXACT])] == [1.0, 0.0, None]


def test_a_function_is_called_once_with_trl_s_arguments():
    calls = []

    def score(prompts, completions, completion_ids, **columns):
        calls.append((prompts, completions, completion_ids, columns))
        return [0.0, 0.0]

    grade([rollout("a", level=1), rollout("b", answer=None, size=2)], [function(score)])
    turn = [{"role": "user", "content": "2+2?"}]
    assert calls == [([turn, turn],
                      [[{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}]],
                      [[2, 3], [2, 3]],
                      {"answer": ["4", None], "level": [1, None], "size": [None, 2]})]


def test_reward_is_the_weighted_sum_of_the_parts_that_are_not_none():
    graded = grade([*TWO, TWO[0]], [function(lambda **k: [1, True, None], "a", 2.0),
                                    function(lambda **k: [0.5, None, None], "b", -1.0)])
    assert [r.reward for r in graded] == [1.5, 2.0, None]
    assert [r.reward_parts for r in graded] == [{"a": 1.0, "b": 0.5}, {"a": 1.0, "b": None}, {"a": None, "b": None}]
    assert [r.error for r in graded] == [None] * 3


def test_a_function_that_raises_fails_every_rollout_and_no_run():
    def score(completions, **kwargs):
        return [len(completions) / 0]

    for r in grade(TWO, [EXACT, function(score)]):
        assert r.reward is None
        assert r.error.startswith("reward score: ZeroDivisionError: division by zero (test_grade.py, line ")
        assert r.reward_parts["score"] is None
        assert r.reward_parts["exact_answer"] is not None


@pytest.mark.parametrize(("call", "said"), [
    (lambda **k: sys.exit(1), "SystemExit: 1"),
    (lambda **k: [1.0], "returned 1 rewards for 2 completions"),
    (lambda **k: None, "returned a NoneType, not a list"),
    (lambda **k: {0: 1.0, 1: 1.0}, "returned a dict, not a list"),
    (lambda target, **k: [1.0, 1.0], "missing 1 required positional argument: 'target'"),
])
def test_a_wrong_answer_as_a_whole_fails_every_rollout(call, said):
    graded = grade(TWO, [function(call)])
    assert all(r.reward is None and said in r.error for r in graded)


@pytest.mark.parametrize(("value", "said"), [
    (math.nan, "returned nan"), (math.inf, "returned inf"), ("1", "returned a str, not a number"),
    ([1.0], "returned a list, not a number"),
    pytest.param(10 ** 400, "returned an integer beyond any float", id="10^400"),
])
def test_one_wrong_value_fails_its_rollout_alone(value, said):
    good, bad = grade(TWO, [function(lambda **k: [0.25, value])])
    assert (good.reward, good.error) == (0.25, None)
    assert (bad.reward, bad.reward_parts) == (None, {"score": None})
    assert bad.error == f"reward score: {said}"


def test_failed_rollouts_are_not_graded_and_keep_their_place():
    failed = replace(TWO[0], error="no end", text=None)
    graded = grade([failed, TWO[0]], [EXACT])
    assert graded[0] is failed
    assert graded[1].reward == 1.0
    assert grade([failed], [function(lambda **k: 1 / 0)]) == [failed]


def test_what_a_function_does_to_its_lists_does_not_reach_the_next():
    def greedy(completions, **kwargs):
        completions.clear()
        return [0.0, 0.0]

    assert [r.reward for r in grade(TWO, [function(greedy), EXACT])] == [1.0, 0.0]


def test_a_user_s_function_is_loaded_from_its_file_and_run_once(tmp_path):
    log = tmp_path / "log"
    path = written(tmp_path, f"from dataclasses import dataclass\nopen({str(log)!r}, 'a').write('x')\n"
                             "@dataclass\nclass Length:\n    weight: int\n"
                             "def score(completions, **kwargs):\n"
                             "    return [float(len(c[0]['content'])) for c in completions]\n"
                             "def other(completions, **kwargs):\n    return [1.0 for c in completions]\n")
    configs = [RewardConfig(file=path, function=name, weight=0.5) for name in ("score", "other")]
    rewards = load_rewards(configs)
    assert [r.reward for r in grade(TWO, rewards)] == [3.5, 3.5]
    assert log.read_text() == "x"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log", "my.py"]


def test_a_changed_file_is_loaded_anew(tmp_path):
    for value in (1, 2):
        path = written(tmp_path, f"def score(completions, **kwargs):\n    return [{value}] * len(completions)\n")
        reward = load_reward(RewardConfig(file=path, function="score"))
        assert [r.reward for r in grade(TWO, [reward])] == [value, value]


@pytest.mark.parametrize(("text", "said"), [
    ("x = 1\ndef score(:\n", r"my\.py, line 2: not valid Python"),
    ("x = 1\n\ny = [][3]\n", r"my\.py, line 3: importing it raised IndexError: list index out of range"),
    ("import no_such_thing\n", r"line 1: importing it raised ModuleNotFoundError"),
    ("import sys\nsys.exit(3)\n", "line 2: importing it raised SystemExit: 3"),
    ("def scores(**k): ...\n", r"no function 'score'; did you mean 'scores'\? it defines scores"),
    ("score = 3\n", "no function 'score'; it defines none"),
    ("def score(completions): ...\n", r"takes any keyword; write it as def score\(completions, \*\*kwargs\)"),
    ("async def score(completions, **kwargs): ...\n", "must be a plain function"),
    ("score = dict\n", "must be a plain function"),
])
def test_a_file_that_cannot_grade_is_refused_before_the_run(text, said, tmp_path):
    path = written(tmp_path, text)
    with pytest.raises(ConfigError, match=said):
        load_reward(RewardConfig(file=path, function="score"))


def test_a_missing_file_says_where_it_was_looked_for(tmp_path):
    with pytest.raises(ConfigError, match=f"no such file; looked in {tmp_path}"):
        load_reward(RewardConfig(file=str(tmp_path / "my.py"), function="score"))


@pytest.mark.parametrize("raw", [{}, {"file": "my.py"}, {"function": "score"},
                                 {"name": "exact_answer", "file": "my.py", "function": "score"},
                                 {"name": "exact_answer", "function": "score"}])
def test_a_reward_has_exactly_one_source(raw):
    with pytest.raises(ConfigError, match="either `name: exact_answer`, or `file: my.py` with `function: score`"):
        build(RewardConfig, raw, "here")


def test_two_rewards_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="two functions are called 'exact_answer'"):
        load_rewards([RewardConfig(name="exact_answer"), RewardConfig(name="exact_answer", weight=2)])
