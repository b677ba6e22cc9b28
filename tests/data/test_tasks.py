import re
from itertools import permutations

import pytest

from tinyr2.core.errors import ConfigError
from tinyr2.data.tasks import CARRY, SignedSums, Sum, signed_sums
from tinyr2.rewards.answer import exact_answer
from tinyr2.rewards.shaping import LanguageOptions, ThinkFormatOptions, language, think_format

LEVEL = SignedSums(terms=3, digits=2)


def test_a_solution_by_hand():
    assert Sum((58, -367, 912)).text == "58-367+912"
    assert Sum((58, -367, 912)).solution() == "0:8-7+2=03;0:5-6+1=00;0:0-3+9=06####603"
    assert Sum((20, -7)).solution() == "0:0-7=b3;b:2-0=01####13"
    assert Sum((9, 8, 7)).solution() == "0:9+8+7=24;2:0+0+0=02####24"
    assert Sum((5, -5)).solution() == "0:5-5=00####0"


def test_every_solution_is_right_column_by_column():
    value = {text: number for number, text in CARRY.items()}
    for problem in signed_sums(LEVEL, "train", 500, 3):
        columns, answer = problem.completion[0].content.split("####")
        digits, carry = [], 0
        for column in columns.split(";"):
            into, terms, out, digit = re.fullmatch(r"(.):([\d+-]+)=(.)(\d)", column).groups()
            assert value[into] == carry
            total = carry + sum(int(t) for t in re.findall(r"[+-]?\d", terms))
            carry = value[out]
            assert total == 10 * carry + int(digit)
            digits.append(digit)
        assert carry == 0
        assert int("".join(reversed(digits))) == int(answer) == int(problem.answer)
        # an independent reading of the question itself
        assert int(answer) == sum(int(t) for t in re.findall(r"[+-]?\d+", problem.messages[0].content))


def test_train_and_held_out_problems_never_overlap_in_any_order_of_terms():
    train = {p.messages[0].content for p in signed_sums(LEVEL, "train", 4000, 0)}
    held_out = {p.messages[0].content for p in signed_sums(LEVEL, "held_out", 500, 1)}

    def canonical(text: str) -> tuple[int, ...]:
        return tuple(sorted(int(t) for t in re.findall(r"[+-]?\d+", text)))

    assert not {canonical(t) for t in train} & {canonical(t) for t in held_out}
    assert len({canonical(t) for t in train}) == 4000


@pytest.mark.parametrize("terms", [(1, 22, -3), (99, -98), (7, 7, 7)])
def test_the_split_does_not_depend_on_the_order(terms):
    assert len({Sum(p).split for p in permutations(terms) if sum(p) >= 0}) == 1


def test_about_an_eighth_is_held_out():
    sums = [Sum((a, b)) for a in range(100) for b in range(a, 100)]
    share = sum(s.split == "held_out" for s in sums) / len(sums)
    assert 0.11 < share < 0.14


def test_a_seed_gives_the_same_problems_and_another_seed_others():
    assert signed_sums(LEVEL, "train", 50, 0) == signed_sums(LEVEL, "train", 50, 0)
    assert signed_sums(LEVEL, "train", 50, 0) != signed_sums(LEVEL, "train", 50, 1)


def test_difficulty_bounds_terms_and_digits():
    for problem in signed_sums(SignedSums(terms=2, digits=4), "train", 300, 0):
        numbers = re.findall(r"\d+", problem.messages[0].content)
        assert len(numbers) == 2 and all(len(n) <= 4 for n in numbers)
    assert any(len(n) == 4 for p in signed_sums(SignedSums(terms=2, digits=4), "train", 300, 0)
               for n in re.findall(r"\d+", p.messages[0].content))


def test_asking_for_more_than_there_are_says_what_to_raise():
    with pytest.raises(ConfigError, match="raise terms or digits"):
        signed_sums(SignedSums(terms=2, digits=1), "held_out", 500, 0)


def test_a_careless_author_hands_no_carry_on_and_answers_what_comes_of_it():
    assert Sum((58, -367, 912)).solution(careless=True) == "0:8-7+2=03;0:5-6+1=00;0:0-3+9=06####603"  # none to hand on
    assert Sum((20, -7)).solution(careless=True) == "0:0-7=b3;0:2-0=02####23"
    assert Sum((9, 8, 7)).solution(careless=True) == "0:9+8+7=24;0:0+0+0=00####4"


def test_so_many_solutions_are_careless_and_no_answer_is():
    level = SignedSums(terms=3, min_terms=3, digits=3)
    plain, sloppy = (signed_sums(level.model_copy(update={"careless": share}), "train", 400, 0) for share in (0.0, 0.9))
    assert [(p.messages, p.answer) for p in plain] == [(p.messages, p.answer) for p in sloppy]
    changed = [a != b for a, b in zip(plain, sloppy, strict=True)]
    # in some sums nothing is carried
    assert 0.45 < sum(changed) / 400 < 0.9
    assert all(p.completion[0].content.endswith(f"####{p.answer}") for p in plain)
    assert all(sum(p.messages[0].content.count(sign) for sign in "+-") == 2 for p in plain)


def test_a_carry_is_written_in_words_of_one_language_or_two_and_the_result_in_tags():
    s = Sum((58, -367, 912))
    assert s.solution(languages=["en"] * 3) == "8-7+2=3 carry 0;5-6+1=0 carry 0;0-3+9=6 carry 0####603"
    assert s.solution(languages=["en", "zh", "zh"], think=True) == (
        "<think>8-7+2=3 carry 0;5-6+1=0 进位 0;0-3+9=6 进位 0</think><answer>603</answer>")
    assert s.solution(think=True) == "<think>0:8-7+2=03;0:5-6+1=00;0:0-3+9=06</think><answer>603</answer>"
    assert Sum((20, -7)).solution(languages=["en"] * 2) == "0-7=3 carry b;2-0=1 carry 0####13"
    # who never carries writes so
    assert Sum((9, 8, 7)).solution(languages=["zh"] * 2, careless=True) == "9+8+7=4 进位 0;0+0+0=0 进位 0####4"


STYLES = [SignedSums(terms=3, digits=3, words=words, think=think, careless=careless)
          for words in ("none", "en", "zh", "mixed") for think in (False, True) for careless in (0.0, 0.9)]


@pytest.mark.parametrize("level", STYLES, ids=lambda level: f"{level.words}-{level.think}-{level.careless}")
def test_a_style_changes_the_solution_alone_and_the_rewards_read_it(level):
    problems, plain = signed_sums(level, "train", 300, 0), signed_sums(SignedSums(terms=3, digits=3), "train", 300, 0)
    assert [(p.id, p.messages, p.answer) for p in problems] == [(p.id, p.messages, p.answer) for p in plain]
    texts = [p.completion[0].content for p in problems]
    assert max(len(text) for text in texts) <= level.longest_solution
    assert think_format(ThinkFormatOptions(answer=("<answer>", "</answer>")))(texts) == [float(level.think)] * 300
    right = exact_answer(texts, [p.answer for p in problems])
    assert right == [1.0] * 300 if level.careless == 0 else 0.2 < sum(right) / 300 < 0.8
    english, shares = language(LanguageOptions())(texts), {"none": 1.0, "en": 1.0, "zh": 0.0}
    if level.words == "mixed":
        assert {0.0, 1.0} < set(english) and 0.2 < sum(english) / 300 < 0.5  # one word carry, two characters 进位
    else:
        assert english == [shares[level.words]] * 300


@pytest.mark.parametrize("level", [SignedSums(words="en"), SignedSums(words="mixed", think=True)], ids=str)
def test_the_calculation_can_be_read_from_the_words(level):
    value = {text: number for number, text in CARRY.items()}
    for problem in signed_sums(level, "train", 300, 1):
        text = problem.completion[0].content.replace("</think><answer>", "####")
        columns, answer = re.sub("<[^>]+>", "", text).split("####")
        carry, result = 0, 0
        for i, column in enumerate(columns.split(";")):
            terms, digit, out = re.fullmatch(r"([\d+-]+)=(\d) (?:carry|进位) (.)", column).groups()
            assert sum(int(t) for t in re.findall(r"[+-]?\d", terms)) + carry == 10 * value[out] + int(digit)
            carry, result = value[out], result + 10**i * int(digit)
        assert carry == 0 and result == int(answer) == int(problem.answer)


def test_the_languages_of_a_mixed_solution_follow_from_the_seed():
    level = SignedSums(words="mixed")
    assert signed_sums(level, "train", 50, 0) == signed_sums(level, "train", 50, 0)
    words = [re.findall("carry|进位", p.completion[0].content) for p in signed_sums(level, "train", 500, 0)]
    assert 0.45 < sum(w.count("carry") for w in words) / sum(map(len, words)) < 0.55
    assert any(w == ["carry", "进位"] for w in words) and any(w == ["进位", "carry"] for w in words)
