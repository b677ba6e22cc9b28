import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyr2.rewards.arithmetic import CountdownOptions, countdown, evaluate, uses


@pytest.mark.parametrize(("text", "value"), [
    ("7", 7), (" (3 + 5) * 2 ", 16), ("1/3 + 1/6", Fraction(1, 2)), ("-3 - -2", -1), ("+4", 4), ("8/3*3", 8),
    ("2-3-4", -5), ("24/4/2", 3), ("3\u00d74\u22122\u00f72", 11), (r"3 \times 4 - 2 \div 2 + 1 \cdot 5", 16),
    ("999999999999999*999999999999999", 999999999999999 ** 2), ("(" * 32 + "1" + ")" * 32, 1),
])
def test_the_value_is_exact(text, value):
    assert evaluate(text) == value


@pytest.mark.parametrize("text", [
    "", " ", "95**36**88", "9**2", "9//2", "5%2", "2^3",
    "1/0", "1/(2-2)", "3(4)", "(1)(2)", "()", "1 2", "1.5", "1e3", "1_000",
    "007", "0x1f", "True", "x", "__import__('os')", "[1]", "1,2", "1<2", "1 if 1 else 2", "lambda: 1", "1;2", "1\n+2",
    "\u0662", "\u00b2", "\uff11", "1\x00", "2+", "(1", "1)", "1 = 1", "4j", "~1", "not 1", "3|4", "1000000000000000",
    "(" * 33 + "1" + ")" * 33, "(" * 100_000, "1+" * 100 + "1", "-" * 100_000 + "1",
], ids=lambda text: repr(text[:20]))
def test_nothing_else_has_a_value(text):
    assert evaluate(text) is None


def test_uses_lists_every_number_as_often_as_it_stands():
    assert uses("(3 + 5) * 3 - -2/1") == [3, 5, 3, 2, 1]
    assert uses("3**5") == uses("x + 3") == uses("") == []
    assert uses("1/0") == [1, 0]


EXPRESSION = st.recursive(st.integers(0, 99).map(str), lambda part: st.one_of(
    st.tuples(part, st.sampled_from("+-*/"), part).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
    part.map(lambda text: f"(-{text})")), max_leaves=8)


@given(EXPRESSION)
def test_values_are_those_of_python_s_fractions(text):
    try:
        value = eval("".join(f"Fraction({word})" if word.isdigit() else word for word in _words(text)))
    except ZeroDivisionError:
        value = None
    assert evaluate(text) == (value if len(text) <= 200 else None)


def _words(text):
    for sign in "()+-*/":
        text = text.replace(sign, f" {sign} ")
    return text.split()


@given(st.one_of(st.text(), st.text("0123456789+-*/() \u00d7\u00f7\u2212^=.,_e\x00\u0663xX'\"[]{}\\\n", max_size=300)))
def test_no_text_raises_or_takes_long(text):
    def seconds():
        began = time.process_time()
        evaluate(text)
        uses(text)
        countdown(CountdownOptions())([f"#### {text}"], ["4"], [[1, 2]])
        return time.process_time() - began

    assert seconds() < 0.1 or min(seconds() for _ in range(3)) < 0.1  # the collector may have run once


def test_hostile_texts_take_no_time():
    began = time.process_time()
    for text in ("95**36**88", "9" * 100_000, "(" * 100_000 + ")" * 100_000, "-" * 199 + "1", "(" * 99 + "1" + ")" * 99,
                 "/".join(["999999999999999"] * 12), "*".join(["9"] * 100), "\x00" * 1000, "1+" * 50_000):
        evaluate(text)
        uses(text)
    assert time.process_time() - began < 0.1


def play(answer, numbers, target, **options):
    return countdown(CountdownOptions(**options))([rf"so \boxed{{{answer}}}"], ["0"], [numbers], [target])[0]


@pytest.mark.parametrize(("answer", "reward"), [
    ("8*3+7-2", 1.0), ("(8*3+7)-2 = 29", 1.0), (r"8 \times 3 + 7 - 2", 1.0), ("7-2+3*8", 1.0), ("-2+7+3*8", 1.0),
    ("8*3+7-2 = 30", 0.0), ("8*3+7-2 = 29 = 29", 0.0), ("29", 0.0), ("8*3+5", 0.0), ("8*3+7-2-7+7", 0.0),
    ("8+3+7+2", 0.0), ("8*3+7-2*1", 0.0), ("", 0.0), ("29 = 8*3+7-2", 0.0), ("8*3+7--2-4", 0.0),
])
def test_countdown_wants_each_number_once_and_the_target(answer, reward):
    assert play(answer, [2, 3, 7, 8], 29) == reward


def test_numbers_that_are_given_twice_are_used_twice():
    assert play("6*6-6", [6, 6, 6], 30) == 1.0
    assert play("6*6-6", [6, 6, 6, 1], 30) == play("6*6-6", [6, 6], 30) == 0.0
    assert play("36-6", [3, 6, 6], 30) == 0.0


def test_a_subset_is_enough_where_the_rules_allow_it():
    assert play("6*5", [1, 5, 6], 30) == 0.0
    assert play("6*5", [1, 5, 6], 30, allow_subset=True) == 1.0
    assert play("6*5*1*1", [1, 5, 6], 30, allow_subset=True) == 0.0


def test_the_target_is_the_answer_s_where_no_column_has_it():
    call = countdown(CountdownOptions())
    assert call(["#### 2*3", "#### 2*3"], ["6", "7"], [[2, 3], [2, 3]]) == [1.0, 0.0]
    assert call(["#### 2*3", "#### 2*3"], ["7", "7"], [[2, 3], [2, 3]], [6, None]) == [1.0, 0.0]


def test_rows_without_numbers_or_target_are_undecided():
    call = countdown(CountdownOptions())
    assert call(["#### 2*3"] * 5, ["6", None, "six", "6", "6"],
                [None, [2, 3], [2, 3], ["2", "3"], [2.0, 3]]) == [None] * 5
    assert call(["#### 2*3"], ["6"]) == [None]
