"""Which answers are kept, which pairs are made, and which rewards may decide it."""

import pytest

from tinyr2.core.types import Message, Problem, Rollout
from tinyr2.recipes.answers import Answering, AnswersConfig, Judged, check_choices, choose, judge, own_tokens, pair
from tinyr2.rewards.grade import RewardConfig, load_rewards

PROBLEM = Problem(id="p", task="sums", messages=(Message("user", "1+1="),), answer="2", columns={"level": 3})


def answer(text: str, *, length: int | None = None, finish: str = "stop", reward: float | None = None,
           error: str | None = None, **parts) -> Rollout:
    return Rollout(problem=PROBLEM, group=0, sample=0, author="student", prompt_ids=(1,), text=text, finish=finish,
                   response_ids=(7,) * (length or len(text)), reward=reward, reward_parts=parts, error=error)


def judged(text: str, right: bool | None, good: bool = True, reward: float | None = None) -> Judged:
    return Judged(answer(text, reward=reward), right, good, len(text))


def texts(rollouts, seed: int = 0, **changes) -> list[str]:
    return [r.text for r in choose(rollouts, AnswersConfig(**changes), seed)]


def working(rewards=(), **changes) -> Answering:
    measure = changes.pop("measure", own_tokens)
    return Answering(config=AnswersConfig(**changes), write=lambda: None, seed=0, measure=measure,
                     rewards=load_rewards([RewardConfig(**r) for r in rewards]))


GROUP = [judged("ccc", True), judged("bb", True), judged("x", False), judged("bb ", True), judged("a", True, False),
         judged("dd", True), judged("y", None), judged("zz", False)]


def test_right_whole_and_different_answers_are_kept_the_preferred_first():
    assert texts(GROUP, keep=9) == ["bb", "dd", "ccc"]
    assert texts(GROUP) == ["bb"]
    assert texts(GROUP, prefer="longest", keep=2) == ["ccc", "bb"]
    assert texts(GROUP[2:3]) == []


def test_best_of_n_is_the_right_answer_of_the_highest_reward_and_of_equals_the_shortest():
    group = [judged("long enough", True, reward=0.9), judged("low", True, reward=0.5),
             judged("wrong", False, reward=2.0), judged("short", True, reward=0.9),
             judged("no", True, good=False, reward=3.0)]
    assert texts(group, prefer="best") == ["short"]
    assert texts(group, prefer="best", keep=9) == ["short", "long enough", "low"]


def test_a_random_choice_follows_from_the_seed_and_reaches_every_right_answer():
    drawn = [texts(GROUP, seed, prefer="random")[0] for seed in range(20)]
    assert set(drawn) == {"bb", "ccc", "dd"}
    assert drawn == [texts(GROUP, seed, prefer="random")[0] for seed in range(20)]


def test_a_pair_is_a_right_and_a_decidedly_wrong_answer():
    found = pair(GROUP, AnswersConfig(keep=5), 0)
    assert [r.text for r, _ in found] == ["bb", "dd"]  # two wrong ones, so two pairs
    assert sorted(w.text for _, w in found) == ["x", "zz"]
    cut = [Judged(answer("x", finish="length"), False, True, 1), *GROUP[:2]]
    assert pair(cut, AnswersConfig(), 0) == []


def test_an_answer_is_right_by_the_weighted_sum_and_good_where_it_is_whole_short_and_as_required():
    rewards = [{"name": "exact_answer"}, {"name": "language", "weight": 0}, {"name": "think_format", "weight": 0.5}]
    work = working(rewards, require={"language": 0.5}, max_tokens=4)

    def verdict(rollout: Rollout) -> tuple[bool | None, bool]:
        found = judge(rollout, work)
        return found.right, found.good

    assert verdict(answer("abcd", exact_answer=1.0, language=0.5, think_format=0.0)) == (True, True)
    assert verdict(answer("abcd", exact_answer=1.0, language=0.4, think_format=0.0)) == (True, False)
    assert verdict(answer("abcde", exact_answer=0.5, language=1.0, think_format=1.0)) == (True, False)
    assert verdict(answer("abcd", exact_answer=0.0, language=1.0, think_format=1.0)) == (False, True)
    assert verdict(answer("ab", finish="length", exact_answer=1.0, language=1.0)) == (True, False)
    assert verdict(answer(" \n", exact_answer=1.0, language=None)) == (True, False)
    # a reward of no weight says nothing about right and wrong, and one without a word requires nothing
    assert verdict(answer("ab", exact_answer=None, language=1.0, think_format=None)) == (None, True)
    assert verdict(answer("ab", exact_answer=1.0, language=None, think_format=None)) == (True, True)


def test_without_rewards_every_whole_answer_is_right_and_a_failed_one_undecided():
    work = working()
    assert [judge(r, work).right for r in (
        answer("ab"), answer("ab", finish="length"), answer(" "), answer("ab", error="timeout"))] == [
        True, False, False, None]
    assert not judge(answer("ab", error="timeout"), work).good


def test_length_is_what_the_reader_counts_and_what_it_cannot_read_is_not_good():
    short = working(max_tokens=6, measure=lambda r: 3 * len(r.text))
    found = [judge(answer(text, length=9), short) for text in ("ab", "abc")]
    assert [(j.good, j.tokens) for j in found] == [(True, 6), (False, 9)]
    blind = working(measure=lambda r: None)
    assert judge(answer("ab"), blind).right and not judge(answer("ab"), blind).good


@pytest.mark.parametrize(("rewards", "require", "message"), [
    (["exact_answer"], {"exact_anser": 1.0}, "require.exact_anser: no reward of that name; did you mean 'exact_ans"),
    ([], {"language": 1.0}, "require.language: no reward of that name; there are none")])
def test_a_requirement_without_its_reward_is_refused(rewards, require, message):
    with pytest.raises(ValueError, match=message):
        check_choices(AnswersConfig(require=require), [RewardConfig(name=name) for name in rewards])
