import ast
import operator
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyr2.core.config import build
from tinyr2.core.errors import ConfigError
from tinyr2.data.countdown import Countdown, countdown, expression
from tinyr2.data.tasks import split_of

OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def value(text):
    """The exact value of an expression and the numbers in it, read by Python's own grammar."""
    numbers = []

    def walk(node):
        if isinstance(node, ast.Constant):
            numbers.append(node.value)
            return Fraction(node.value)
        return OPERATIONS[type(node.op)](walk(node.left), walk(node.right))

    return walk(ast.parse(text, mode="eval").body), numbers


def parts(problem):
    """(expression, value) of each try, and the expression after ####."""
    search, _, final = problem.completion[0].content.partition("####")
    return [tuple(one.split("=")) for one in search.split(";")], final


def canonical(problem):
    return tuple(sorted(problem.columns["numbers"])), problem.columns["target"]


levels = st.builds(Countdown, numbers=st.integers(2, 6), low=st.integers(1, 9), high=st.integers(60, 90),
                   max_target=st.integers(1000, 5000), operators=st.sampled_from(["+-*/", "+-", "/+", "*-"]),
                   tries=st.integers(0, 5))


@pytest.mark.parametrize(("tree", "text"), [
    (("+", ("*", 3, 7), 8), "7*3+8"),
    (("+", 8, ("*", 7, 3)), "7*3+8"),
    (("*", ("-", 8, 3), 7), "(8-3)*7"),
    (("-", 8, ("-", 3, 7)), "8+7-3"),
    (("-", ("-", 8, 3), ("+", 7, 20)), "8-20-7-3"),
    (("/", 8, ("/", 3, 7)), "8*7/3"),
    (("/", 8, ("*", 3, 7)), "8/7/3"),
    (("/", 8, ("+", 3, 7)), "8/(7+3)"),
    (("-", ("/", 8, 3), ("*", 2, ("-", 7, 1))), "8/3-(7-1)*2"),
])
def test_expressions_are_printed_in_one_way_and_without_idle_brackets(tree, text):
    assert expression(tree) == text


@settings(max_examples=25, deadline=None)
@given(level=levels, seed=st.integers(0, 99), split=st.sampled_from(["train", "held_out"]))
def test_solutions_hit_with_every_number_once_and_never_try_twice(level, seed, split):
    for problem in countdown(level, split, 15, seed):
        numbers, target = problem.columns["numbers"], problem.columns["target"]
        assert problem.messages[0].content == f"{' '.join(map(str, numbers))} = {target}"
        assert problem.answer == str(target) and 1 <= target <= level.max_target
        assert len(numbers) == level.numbers and all(level.low <= x <= level.high for x in numbers)
        tries, final = parts(problem)
        assert tries[-1] == (final, str(target))
        for text, claimed in tries:
            exact, used = value(text)
            assert str(exact) == claimed
            assert sorted(used) == sorted(numbers)
            assert set(text) <= set("0123456789()" + level.operators)
        assert all(claimed != str(target) for _, claimed in tries[:-1])
        assert len({text for text, _ in tries}) == len(tries) <= level.tries + 1
        assert len(problem.completion[0].content) <= level.longest_solution


def test_train_and_held_out_problems_never_overlap_whatever_level_and_seed():
    seen = {"train": set(), "held_out": set()}
    for split, found in seen.items():
        for seed, level in enumerate([Countdown(numbers=2), Countdown(), Countdown(high=9, tries=0, operators="-+")]):
            problems = countdown(level, split, 300 if level == Countdown() else 60, seed)
            assert len({canonical(p) for p in problems}) == len(problems)
            found |= {canonical(p) for p in problems}
    assert seen["train"] and seen["held_out"] and not seen["train"] & seen["held_out"]


def test_the_number_of_wrong_tries_is_uniform():
    counts = [0] * 4
    for problem in countdown(Countdown(), "train", 2000, 0):
        counts[len(parts(problem)[0]) - 1] += 1
    assert min(counts) > 430 and max(counts) < 570  # 500 ± 3.6 standard deviations


def test_a_seed_gives_the_same_problems_and_a_larger_number_only_adds():
    level = Countdown(numbers=4)
    assert countdown(level, "train", 50, 0) == countdown(level, "train", 80, 0)[:50]
    assert countdown(level, "train", 50, 0) != countdown(level, "train", 50, 1)


def test_where_one_try_exists_it_is_the_solution():
    level = Countdown(low=5, high=5, numbers=2, operators="*")
    [problem] = countdown(level, split_of("[5, 5]=25"), 1, 0)
    assert problem.messages[0].content == "5 5 = 25"
    assert problem.completion[0].content == "5*5=25####5*5"


def test_asking_for_more_than_there_are_says_how_many_turned_up_and_what_to_raise():
    with pytest.raises(ConfigError, match=r"only \d+ turned up; ask for fewer, or raise numbers, high or max_target"):
        countdown(Countdown(numbers=2, high=5), "train", 500, 0)


@pytest.mark.parametrize("operators", ["-", "/", "-*", "/-"])
def test_only_the_operators_of_the_level_are_printed(operators):
    for problem in countdown(Countdown(operators=operators, high=60), "train", 60, 0):
        tries, _ = parts(problem)
        assert all(set(text) <= set("0123456789()" + operators) for text, _ in tries)


def test_five_thousand_problems_take_under_two_seconds():
    began = time.process_time()
    countdown(Countdown(), "train", 5_000, 0)
    assert time.process_time() - began < 2


@pytest.mark.parametrize(("raw", "said"), [
    ({"number": 3}, "number: unknown key; did you mean 'numbers'"),
    ({"numbers": 7}, "numbers: .*less than or equal to 6"),
    ({"low": 9, "high": 3}, "low 9 is above high 3; swap them"),
    ({"operators": "+x"}, r"operators: each of \+-\*/ at most once"),
    ({"operators": "++"}, "at most once"),
    ({"operators": ""}, "operators: .*at least 1 character"),
])
def test_levels_that_cannot_work_are_refused(raw, said):
    with pytest.raises(ConfigError, match=said):
        build(Countdown, raw, "here")


def test_no_worked_search_gives_away_a_problem_of_the_other_split():
    level = Countdown(numbers=3, high=12, tries=3)
    held_out = {(tuple(sorted(p.columns["numbers"])), p.columns["target"])
                for p in countdown(level, "held_out", 300, 0)}
    hit = 0
    for p in countdown(level, "train", 1500, 0):
        for tried in p.completion[0].content.partition("####")[0].split(";"):
            value = tried.partition("=")[2]
            if "/" not in value and int(value) > 0:
                hit += 1
                assert (tuple(sorted(p.columns["numbers"])), int(value)) not in held_out
    assert hit > 1500  # many tries hit some number
