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


def test_a_part_of_weight_0_is_shown_and_makes_no_undecided_answer_a_wrong_one():
    graded = grade(TWO, [function(lambda **k: [None, 1], "verdict"), function(lambda **k: [0.25, 0.5], "style", 0.0)])
    assert [r.reward for r in graded] == [None, 1.0]
    assert [r.reward_parts["style"] for r in graded] == [0.25, 0.5]


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


def of_task(task, text="#### 4", **columns):
    r = rollout(text, **columns)
    return replace(r, problem=replace(r.problem, task=task))


def test_a_reward_grades_the_rollouts_of_its_tasks_alone():
    calls = []

    def score(completions, answer, **columns):
        calls.append(([c[0]["content"] for c in completions], answer, columns.get("level"), "size" in columns))
        return [1.0] * len(completions)

    rollouts = [of_task("a", "x", level=1), of_task("b", "y", size=2), of_task("c", "z"), of_task("a", "w")]
    graded = grade(rollouts, [replace(function(score), tasks=("a", "c")), replace(EXACT, tasks=("b",), weight=0.5)])
    assert calls == [(["x", "z", "w"], ["4", "4", "4"], [1, None, None], False)]
    assert [r.reward_parts["score"] for r in graded] == [1.0, None, 1.0, 1.0]
    assert [r.reward_parts["exact_answer"] for r in graded] == [None, 0.0, None, None]
    assert [r.reward for r in graded] == [1.0, 0.0, 1.0, 1.0]


def test_a_function_without_rollouts_of_its_tasks_is_not_called():
    graded = grade(TWO, [replace(function(lambda **k: 1 / 0), tasks=("other",))])
    assert [(r.reward, r.reward_parts, r.error) for r in graded] == [(None, {"score": None}, None)] * 2


@pytest.mark.parametrize("call", [lambda **k: 1 / 0, lambda **k: []])
def test_a_function_that_fails_on_one_task_leaves_the_others_alone(call):
    mine, other = grade([of_task("a"), of_task("b")], [EXACT, replace(function(call), tasks=("a",))])
    assert mine.reward is None and mine.error.startswith("reward score: ")
    assert (other.reward, other.error) == (1.0, None)


def test_gamma_and_tasks_come_from_the_config():
    reward = load_reward(RewardConfig(name="repetition", weight=0.1, gamma=0.99, tasks=("gsm8k",)))
    assert (reward.name, reward.weight, reward.gamma, reward.tasks) == ("repetition", 0.1, 0.99, ("gsm8k",))
    assert (EXACT.gamma, EXACT.tasks) == (None, None)


@pytest.mark.parametrize(("raw", "said"), [
    ({"gamma": 0}, "gamma: Input should be greater than 0"), ({"gamma": 1.01}, "gamma: Input should be less than"),
    ({"tasks": []}, "tasks: "), ({"weight": math.nan}, "weight: "),
    ({"name": "exact_anwser"}, "name: Input should be 'exact_answer', 'accuracy'"),
])
def test_settings_that_cannot_work_are_refused(raw, said):
    with pytest.raises(ConfigError, match=said):
        build(RewardConfig, {"name": "exact_answer", **raw}, "here")


def test_a_user_s_function_takes_its_options_as_keywords(tmp_path):
    path = written(tmp_path, "def score(completions, scale, shift=0.0, **kwargs):\n"
                             "    return [scale * len(c[0]['content']) + shift for c in completions]\n")
    reward = load_reward(RewardConfig(file=path, function="score", options={"scale": 2.0, "shift": 1}))
    assert [r.reward for r in grade(TWO, [reward])] == [13.0, 13.0]
    clash = grade([rollout("a", scale=3)], [reward])[0]
    assert clash.reward is None and "multiple values for keyword argument 'scale'" in clash.error


@pytest.mark.parametrize(("option", "said"), [
    ("scael", r"score has no parameter for options\.scael; did you mean 'scale'\? it names scale"),
    ("answer", r"no parameter for options\.answer; it names scale"),
])
def test_an_option_that_a_user_s_function_does_not_name_is_refused(option, said, tmp_path):
    path = written(tmp_path, "def score(completions, answer, scale=1.0, **kwargs): ...\n")
    with pytest.raises(ConfigError, match=said):
        load_reward(RewardConfig(file=path, function="score", options={option: 2.0}))


def test_length_rewards_take_the_rollouts_own_length():
    rewards = load_rewards([RewardConfig(name="soft_overlong"), RewardConfig(name="exact_answer")],
                           max_completion_length=2)
    graded = grade([replace(TWO[0], response_ids=(1,)), TWO[0]], rewards)
    assert [r.reward_parts for r in graded] == [{"soft_overlong": 0.0, "exact_answer": 1.0},
                                                {"soft_overlong": -1.0, "exact_answer": 1.0}]


def test_every_built_in_reward_can_be_called_as_trl_calls_it():
    names = ("exact_answer", "accuracy", "think_format", "language", "cosine", "repetition", "soft_overlong",
             "countdown")
    rewards = load_rewards([RewardConfig(name=name) for name in names], max_completion_length=100)
    graded = grade([rollout("<think>two</think> #### 4", numbers=[4], target=4)], rewards)[0]
    assert graded.error is None
    assert graded.reward_parts == {"exact_answer": 1.0, "accuracy": 1.0, "think_format": 1.0, "language": 1.0,
                                   "cosine": pytest.approx(1.0, abs=1e-3), "repetition": 0.0, "soft_overlong": 0.0,
                                   "countdown": 1.0}
