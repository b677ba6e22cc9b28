from typing import get_args

import pytest

from tinyr2.rewards.grade import RewardConfig, load_reward
from tinyr2.rewards.named import Name, needs


@pytest.mark.parametrize(("name", "options", "expected"), [
    ("exact_answer", {}, ("answer",)), ("accuracy", {}, ("answer",)), ("countdown", {}, ("numbers", "target")),
    ("cosine", {}, ("answer",)), ("cosine", {"verdict": "countdown"}, ("numbers", "target")),
    ("think_format", {}, ()), ("language", {}, ()), ("repetition", {}, ()), ("soft_overlong", {}, ()),
    ("reward_model", {"path": "x"}, ())])
def test_a_reward_needs_what_it_compares_with(name, options, expected):
    assert needs(name, options) == expected


@pytest.mark.parametrize("name", [n for n in get_args(Name) if n != "reward_model"])
def test_a_reward_has_a_word_on_a_problem_with_what_it_needs_and_none_without(name):
    call = load_reward(RewardConfig(name=name), max_completion_length=9).call
    given = {"prompts": [[{"role": "user", "content": "?"}]], "completion_ids": [[1, 2, 3]],
             "completions": [[{"role": "assistant", "content": r"\boxed{3}"}]]}
    columns = {"answer": ["3"], "numbers": [[1, 2]], "target": [3]}
    wanted = needs(name, {})
    assert call(**given, **{"answer": [None]} | {need: columns[need] for need in wanted})[0] is not None
    for lacking in wanted:
        rest = {need: columns[need] for need in wanted if need != lacking}
        assert call(**given, **{"answer": [None]} | rest)[0] is None
