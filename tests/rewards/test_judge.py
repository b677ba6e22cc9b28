import os

import pytest

if not os.environ.get("CI"):  # there a missing package is a failure: the import below raises
    pytest.importorskip("math_verify")
sympy = pytest.importorskip("sympy")

from tinyr2.rewards.judge import alike, equal  # noqa: E402 (it imports math-verify)

x, y = sympy.symbols("x y")


@pytest.mark.parametrize(("a", "b", "same"), [
    (x**2 - 1, (x - 1) * (x + 1), True), (x**2 - 1, x**2 + 1, False), (x, y, False), (x - x + 1 + y * 0, x, False),
    (sympy.sqrt(8), 2 * sympy.sqrt(2), True), (sympy.sqrt(8), sympy.Float("2.828427"), False),
    (1 / sympy.factorial(2004), 1 / sympy.factorial(2006), False), (sympy.zoo, sympy.zoo, None), (sympy.oo, 3, None),
    (sympy.sqrt(1 / x), 1 / sympy.sqrt(x), True), (x, abs(x), True), (sympy.Integer(0), sympy.Integer(0), True),
    (sympy.Matrix([[1, 2]]), sympy.Matrix([[1, 2]]), True), (sympy.Matrix([[1, 2]]), sympy.Matrix([[1], [2]]), False),
    (sympy.Interval(0, 1), sympy.Interval.open(0, 1), False), (sympy.Tuple(1, x), sympy.Tuple(1, x), True),
    (sympy.FiniteSet(1, x), sympy.FiniteSet(x, 1), True), (sympy.FiniteSet(1, 2), sympy.FiniteSet(1, 3), False),
    (sympy.Eq(2 * x, 6), sympy.Eq(x, 3), True), (sympy.Eq(x, 3), sympy.Eq(x, 4), False), (x > 3, x > 3, True),
    (x > 3, x < 3, None), (sympy.true, sympy.true, None), (sympy.Interval.open(1, 2), sympy.FiniteSet(1, 2), None),
    (sympy.Integer(3), sympy.FiniteSet(3, 4), False),
])
def test_two_objects_are_alike_part_for_part(a, b, same):
    assert alike(sympy.sympify(a), sympy.sympify(b)) is same
    assert alike(sympy.sympify(b), sympy.sympify(a)) is same


def test_both_judges_have_to_agree():
    assert equal("x+1", "1+x") is True
    assert equal("x+1", "x+2") is False
    assert equal("1/2^{99}", "1/2^{98}") is None  # math-verify rounds both to 0
    assert equal(r"\sqrt{\frac{1}{n}}", r"\frac{1}{\sqrt{n}}") is None  # math-verify takes no n as positive


@pytest.mark.parametrize(("gold", "given"), [
    ("4", r"4\sqrt(2)"), ("4", "4 )"), ("x", "x + "), ("", "4"), ("3", r"3 \foo("),
])
def test_a_part_that_cannot_be_read_is_never_left_out(gold, given):
    assert equal(gold, given) is None
