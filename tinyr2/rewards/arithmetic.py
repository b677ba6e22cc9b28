"""Arithmetic in text, worked out exactly over the rationals, without ever running the text.

In: an expression such as `(3 + 5) * 2 / 7`. Out: its value as a Fraction, the numbers that it uses, and the reward of
the Countdown game. Only + - * / and unary minus over integers are read; whatever else it is, it has no value.
"""

import ast
import re
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from tinyr2.core.config import Config
from tinyr2.rewards.answer import Completion, extract_answer, text_of

_LONGEST = 200  # characters of an expression
_DIGITS = 15  # of a number
_DEEPEST = 32  # brackets inside one another
_SIGNS = {"\u00d7": "*", "\u22c5": "*", "\u00b7": "*", "\u00f7": "/", "\u2212": "-", "\u2013": "-",
          r"\times": "*", r"\cdot": "*", r"\div": "/"}
_SIGN = re.compile("|".join(re.escape(sign) for sign in _SIGNS))
_EXPRESSION = re.compile(r"[0-9+\-*/() \t]+")


class CountdownOptions(Config):
    """The rules of the game."""

    allow_subset: bool = False  # not every number has to be used


def evaluate(text: str) -> Fraction | None:
    r"""The exact value of an arithmetic expression; None where it is none, divides by zero, or is too large to read.

    The signs \u00d7 \u00f7 \u2212 (and \times, \cdot, \div) count as * / -. No power, no floor division, no names, no
    digits but 0 to 9; at most 200 characters, 15 digits a number, 32 nested brackets.
    """
    tree = _parsed(text)
    try:
        return None if tree is None else _value(tree)
    except ZeroDivisionError:
        return None


def uses(text: str) -> list[int]:
    """The integers in an expression, from left to right, each as often as it stands; none where it is no expression."""
    tree = _parsed(text)
    return [] if tree is None else _numbers(tree)


def countdown(options: CountdownOptions) -> Callable[..., list[float | None]]:
    """A reward function: 1.0 where the answer uses exactly the given numbers and reaches the target, else 0.0.

    Columns: `numbers`, integers, each to be used once; `target`, or where that is lacking `answer`. The answer may end
    in "= target". None where a row has no numbers, or no target that can be read.
    """
    def score(completions: Sequence[Completion], answer: Sequence[Any], numbers: Sequence[Any] | None = None,
              target: Sequence[Any] | None = None, **_) -> list[float | None]:
        rows = zip(completions, numbers or [None] * len(completions), target or [None] * len(completions), answer,
                   strict=True)
        return [_score(text_of(completion), given, answer if target is None else target, options.allow_subset)
                for completion, given, target, answer in rows]
    return score


def _score(text: str, numbers: Any, target: Any, allow_subset: bool) -> float | None:
    goal = evaluate(str(target))
    if goal is None or not isinstance(numbers, list | tuple) or not all(type(n) is int for n in numbers):
        return None
    answer = extract_answer(text) or ""
    left, equals, right = answer.partition("=")
    if equals and evaluate(right) == goal:
        answer = left
    if evaluate(answer) != goal:
        return 0.0
    used, given = Counter(uses(answer)), Counter(numbers)
    return float(used <= given if allow_subset else used == given)


def _parsed(text: str) -> ast.expr | None:
    if len(text) > _LONGEST:
        return None
    plain = _SIGN.sub(lambda match: _SIGNS[match[0]], text).strip()
    depths = [plain[:i].count("(") - plain[:i].count(")") for i in range(len(plain) + 1)]
    if not _EXPRESSION.fullmatch(plain) or max(depths) > _DEEPEST or re.search(rf"[0-9]{{{_DIGITS + 1}}}", plain):
        return None
    try:
        tree = ast.parse(plain, mode="eval").body
    except SyntaxError:
        return None
    return tree if _only_arithmetic(tree) else None


def _only_arithmetic(tree: ast.expr) -> bool:
    """Whether nothing but + - * / and unary minus (or plus) over integers is in the tree; 9**9, 9//2, 3(4) are more."""
    kinds = (ast.Constant, ast.BinOp, ast.UnaryOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.USub, ast.UAdd)
    return all(isinstance(node, kinds) for node in ast.walk(tree))


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant):
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp):
        return -_value(node.operand) if isinstance(node.op, ast.USub) else _value(node.operand)
    assert isinstance(node, ast.BinOp)
    left, right = _value(node.left), _value(node.right)
    if isinstance(node.op, ast.Add):
        return left + right
    if isinstance(node.op, ast.Sub):
        return left - right
    return left * right if isinstance(node.op, ast.Mult) else left / right


def _numbers(node: ast.expr) -> list[int]:
    if isinstance(node, ast.Constant):
        return [node.value]
    if isinstance(node, ast.UnaryOp):
        return _numbers(node.operand)
    assert isinstance(node, ast.BinOp)
    return _numbers(node.left) + _numbers(node.right)
