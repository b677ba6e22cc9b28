import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyr2.core.config import Config, build
from tinyr2.core.errors import ConfigError
from tinyr2.rewards.grade import RewardConfig, load_reward


def score(name, completions=None, ids=None, limit=None, answer=None, **options):
    call = load_reward(RewardConfig(name=name, options=options), max_completion_length=limit).call
    completions = [""] * len(ids) if completions is None else completions
    ids = [[0]] * len(completions) if ids is None else ids
    return call(prompts=[[]] * len(ids), completions=completions, completion_ids=ids,
                answer=answer or [None] * len(ids))


def tokens(n):
    return list(range(n))


@pytest.mark.parametrize(("text", "reward"), [
    ("<think>two and two</think>4", 1.0),
    ("\n<think>\ntwo\nand two\n</think>\n\n4\n", 1.0),
    ("<think>two and two</think>", 0.0),
    ("<think> </think>4", 0.0),
    ("<think>two</think> \n", 0.0),
    ("<think>two and two 4", 0.0),
    ("two and two</think>4", 0.0),
    ("So: <think>two and two</think>4", 0.0),
    ("<think>two<think>and</think>4", 0.0),
    ("<think>two</think>4</think>", 0.0),
    ("<think>two</think><think>4</think>5", 0.0),
    ("</think>two<think>4", 0.0),
    ("", 0.0),
])
def test_think_format_is_one_thought_and_one_answer(text, reward):
    assert score("think_format", [text, [{"role": "assistant", "content": text}]]) == [reward, reward]


@pytest.mark.parametrize(("text", "reward"), [
    ("<think>a</think> <answer>4</answer>", 1.0),
    ("<think>a</think><answer> </answer>", 0.0),
    ("<think>a</think>4", 0.0),
    ("<think>a</think><answer>4</answer> done", 0.0),
    ("<think>a</think>It is <answer>4</answer>", 0.0),
    ("<think>a</think><answer>4</answer><answer>5</answer>", 0.0),
    ("<think><answer>4</answer></think><answer>4</answer>", 0.0),
])
def test_with_answer_tags_nothing_stands_outside_the_two_blocks(text, reward):
    call = load_reward(RewardConfig(name="think_format", options={"answer": ["<answer>", "</answer>"]})).call
    assert call(completions=[text]) == [reward]


def test_a_thought_that_the_template_opened_is_not_opened_again():
    texts = ["two</think>4", "<think>two</think>4", "two, 4"]
    assert score("think_format", texts, opened=True) == [1.0, 0.0, 0.0]
    assert score("think_format", ["[[two]]4"], think=["[[", "]]"]) == [1.0]


@pytest.mark.parametrize(("text", "english", "chinese"), [
    ("<think>we add both numbers</think>四", 1.0, 0.0),
    ("<think>两个数相加</think>four", 0.0, 1.0),
    ("<think>we add 两数</think>4", 0.5, 0.5),
    ("<think>then 两个数</think>4", 0.25, 0.75),
    ("<think>1 + 2 = 3, x >= y</think>4", 1.0, 1.0),
    ("<think>设 x = 3, $\\text{hence } y$, \\frac{1}{2}, `def f(x)`, ```for all```</think>", 0.0, 1.0),
    ("<think>we add числа</think>", 2 / 3, 0.0),
    ("we add the two 数字", 4 / 6, 2 / 6),
    ("<think>still 想", 0.5, 0.5),
    ("", 1.0, 1.0),
])
def test_language_is_the_share_of_words_and_characters_in_the_reasoning(text, english, chinese):
    assert score("language", [text]) == score("language", [text], language="en") == [english]
    assert score("language", [text], language="zh") == [chinese]


def test_chinese_inside_latex_or_code_still_counts():
    assert score("language", ["add both $两数$ `两数`"]) == [2 / 6]


@given(st.text())
def test_language_of_any_text_is_a_share(text):
    assert all(0.0 <= score("language", [text], language=name)[0] <= 1.0 for name in ("en", "zh"))


RIGHT, WRONG = "#### 4", "#### 5"


def cosine(text, lengths, **options):
    return score("cosine", [text] * len(lengths), [tokens(n) for n in lengths], answer=["4"] * len(lengths), **options)


def test_cosine_by_hand():
    assert cosine(RIGHT, [0, 50, 99], max_length=100)[:2] == [1.0, 0.75]
    assert cosine(WRONG, [0, 50, 100, 500], max_length=100) == [-1.0, -0.75, -1.0, -1.0]
    quarter = cosine(RIGHT, [25], max_length=100, correct=[2, 1])[0]
    assert quarter == pytest.approx(1 + 0.5 * (1 + math.sqrt(0.5)))
    assert cosine(WRONG, [0, 7168, 14336], limit=14336, wrong=[-10, 0], exceed=-10) == [-10.0, -5.0, -10.0]


@pytest.mark.parametrize(("text", "sign"), [(RIGHT, -1), (WRONG, 1)])
def test_cosine_is_monotone_in_tokens_and_flat_past_the_longest(text, sign):
    rewards = cosine(text, range(0, 301, 5), max_length=100, exceed=None)
    steps = [sign * (b - a) for a, b in zip(rewards, rewards[1:], strict=False)]
    assert all(step > 0 for step in steps[:20])
    assert steps[20:] == [0.0] * 40
    assert rewards[-1] == (0.5 if text == RIGHT else -0.5)


def test_cosine_counts_tokens_and_no_characters():
    assert cosine(RIGHT, [10], max_length=100) == cosine(" " * 5000 + RIGHT, [10], max_length=100)


def test_cosine_leaves_undecided_what_its_verdict_leaves_undecided():
    ids = [tokens(50)] * 3
    assert score("cosine", [RIGHT] * 3, ids, answer=["4", None, " "], max_length=100) == [0.75, None, None]


def test_cosine_takes_another_verdict_with_its_options():
    call = load_reward(RewardConfig(name="cosine", options={
        "max_length": 100, "verdict": "countdown", "verdict_options": {"allow_subset": True}})).call
    rewards = call(completions=["#### 3*2", "#### 3+2"], completion_ids=[tokens(50)] * 2, answer=["6", "6"],
                   numbers=[[1, 2, 3]] * 2)
    assert rewards == [0.75, -0.75]


def test_repetition_by_hand():
    assert score("repetition", ids=[[1, 2, 3, 4], [5] * 5, [1, 2, 3, 1, 2, 3], [1, 2], []]) == [
        0.0, -1 * (1 - 1 / 3), -1 * (1 - 3 / 4), 0.0, 0.0]
    assert score("repetition", ids=[[5] * 5], ngram_size=2, max_penalty=-0.5) == [-0.5 * 0.75]


def test_repetition_is_the_same_in_every_language():
    english, chinese = "so we add " * 10, "所以我们加" * 8
    words = {word: i for i, word in enumerate(dict.fromkeys(english.split()))}
    signs = {sign: i for i, sign in enumerate(dict.fromkeys(chinese[:3] * 10))}
    ids = [[words[word] for word in english.split()], [signs[sign] for sign in chinese[:3] * 10]]
    first, second = score("repetition", [english, chinese], ids)
    assert first == second == -(1 - 3 / 28)


def test_soft_overlong_by_hand():
    ids = [tokens(n) for n in (0, 80, 81, 90, 100, 101)]
    assert score("soft_overlong", ids=ids, max_length=100, soft_punish_cache=20) == [0.0, 0.0, -0.05, -0.5, -1.0, -1.0]
    assert score("soft_overlong", ids=ids, limit=100) == [0.0, 0.0, -0.05, -0.5, -1.0, -1.0]
    assert score("soft_overlong", ids=ids, max_length=90, soft_punish_cache=0) == [0.0, 0.0, 0.0, 0.0, -1.0, -1.0]


def test_length_rewards_agree_with_trl():
    rewards = pytest.importorskip("trl.rewards")
    ids = [[i % 7 for i in range(n)] for n in (0, 1, 30, 85, 99, 100, 130)]
    theirs = rewards.get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)(ids)
    assert score("soft_overlong", ids=ids, limit=100) == theirs
    theirs = rewards.get_repetition_penalty_reward(ngram_size=3, max_penalty=-1.0)(ids)
    assert score("repetition", ids=ids) == theirs


@pytest.mark.parametrize("name", ["cosine", "soft_overlong"])
def test_a_length_reward_without_a_length_is_refused(name):
    with pytest.raises(ConfigError, match=rf"{name} scales with the longest answer, .* options: {{max_length: …}}"):
        load_reward(RewardConfig(name=name))


def test_a_cache_beyond_the_longest_answer_is_refused():
    with pytest.raises(ConfigError, match="soft_punish_cache 128 is beyond max_length 100"):
        load_reward(RewardConfig(name="soft_overlong", options={"soft_punish_cache": 128}), max_completion_length=100)


class Nested(Config):
    rewards: tuple[RewardConfig, ...]


@pytest.mark.parametrize(("name", "options", "said"), [
    ("repetition", {"ngram_sise": 3}, "repetition: options.ngram_sise: unknown key; did you mean 'ngram_size'?"),
    ("repetition", {"max_penalty": 1}, "repetition: options.max_penalty: Input should be less than or equal to 0"),
    ("language", {"language": "fr"}, "language: options.language: Input should be 'en' or 'zh'"),
    ("think_format", {"think": ["", "x"]}, "think_format: options.think.0: String should have at least 1 character"),
    ("exact_answer", {"strict": True}, "exact_answer: options.strict: unknown key"),
    ("reward_model", {}, "reward_model: options.path: missing"),
    ("accuracy", {"timeout": 5}, "options.timeout: unknown key; did you mean 'timeout_s'?"),
    ("cosine", {"verdict": "countdown", "verdict_options": {"alow_subset": True}},
     "countdown: options.alow_subset: unknown key; did you mean 'allow_subset'?"),
])
def test_options_are_checked_when_the_config_is_built(name, options, said):
    with pytest.raises(ConfigError) as caught:
        build(Nested, {"rewards": [{"name": "exact_answer"}, {"name": name, "options": options}]}, "my.yaml")
    assert f"rewards.1: {said}" in str(caught.value) or said in str(caught.value)
    assert str(caught.value).startswith("my.yaml:\n  rewards.1: ")


def test_no_text_takes_long():
    began = time.process_time()
    texts = [part * 30_000 for part in (r"\[", r"\(", "$", "$$", "`", "```", "<think>", "</think>", "<a", " ", "字",
                                        "a-", "\\a", "<answer>", "x$")]
    for name in ("think_format", "language"):
        score(name, texts)
        score(name, [f"<think>{text}</think>4" for text in texts])
    assert time.process_time() - began < 2
