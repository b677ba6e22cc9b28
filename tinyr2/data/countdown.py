"""Countdown: reach a target with all the given numbers, each once. A worked solution is a search that ends well.

In: a difficulty and a seed. Out: problems with an answer and a search, on one side of a split that no problem crosses.

    3 7 8 = 29   →   8*7+3=59;8*3-7=17;7*3+8=29####7*3+8

Each try is an expression over all the numbers with its exact value; the last one hits, and is the answer.
"""

import math
import random
from collections.abc import Callable, Iterator

from pydantic import Field, field_validator, model_validator

from tinyr2.core.config import Config
from tinyr2.core.errors import ConfigError
from tinyr2.core.rng import derive
from tinyr2.core.types import Message, Problem
from tinyr2.data.tasks import Split, split_of

OPERATORS = "+-*/"
_PATIENCE = 30_000  # expressions in a row that give no new problem; then the level counts as exhausted
_TRIES_DRAWN = 20  # expressions drawn for one wrong try; small levels may have no other left

# A number, or (operator, left, right). A value is (numerator, denominator > 0), not reduced: Fraction is slow.
Tree = int | tuple[str, "Tree", "Tree"]
Value = tuple[int, int]


class Countdown(Config):
    """How hard: so many numbers from low to high, a whole target of at most max_target, these operators."""

    numbers: int = Field(3, ge=2, le=6)
    low: int = Field(1, ge=1)
    high: int = Field(20, ge=1, le=999)
    max_target: int = Field(100, ge=1)
    operators: str = Field(OPERATORS, min_length=1)
    tries: int = Field(3, ge=0, le=50)  # most wrong tries in a worked solution; uniform in 0 … tries

    @field_validator("operators")
    @classmethod
    def _known_operators(cls, operators: str) -> str:
        if not set(operators) <= set(OPERATORS) or len(set(operators)) < len(operators):
            raise ValueError(f"each of {OPERATORS} at most once, and nothing else")
        return operators

    @model_validator(mode="after")
    def _some_numbers(self) -> "Countdown":
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}; swap them")
        return self

    @property
    def longest_solution(self) -> int:
        """Characters that no solution exceeds."""
        expression = self.numbers * len(str(self.high)) + 3 * (self.numbers - 1)  # operators and pairs of brackets
        # a/b + c/d = (ad + cb)/bd: two values below p and q combine to parts below 2pq
        part = len(str(2 ** (self.numbers - 1) * self.high**self.numbers))
        return (self.tries + 1) * (expression + len("=-/;") + 2 * part) + len("####") + expression


def countdown(level: Countdown, split: Split, n: int, seed: int) -> list[Problem]:
    """n different problems of one split, with a worked search; the answer is the target.

    The columns `numbers` (list of int, as asked) and `target` (int) are there for graders, which accept any expression
    that hits. ConfigError where the level has too few. Problems whose numbers differ in order alone count as one. The
    first problems do not depend on n.
    """
    rng = random.Random(derive(seed, "countdown", split))
    problems: dict[str, Problem] = {}
    misses = 0
    while len(problems) < n:
        numbers = [rng.randint(level.low, level.high) for _ in range(level.numbers)]
        tree, (over, under) = _draw(numbers, level.operators, rng)
        target = over // under if under and over % under == 0 else 0
        canonical = f"{sorted(numbers)}={target}"
        if (1 <= target <= level.max_target and canonical not in problems and split_of(canonical) == split
                and (text := _printed(tree, level)) is not None):
            tries = [*_wrong_tries(numbers, target, (level, split), rng), f"{text}={target}"]
            problems[canonical] = _problem(numbers, target, tries, f"{split}:{len(problems)}")
            misses = 0
        elif (misses := misses + 1) > _PATIENCE:
            raise ConfigError(f"{n} different {split} problems with {level.numbers} numbers from {level.low} to "
                              f"{level.high} and targets up to {level.max_target}: only {len(problems)} turned up; ask "
                              f"for fewer, or raise numbers, high or max_target")
    return list(problems.values())


def expression(tree: Tree) -> str:
    """As it is printed: without brackets that change nothing, and one text for all orders of a sum or product.

    ("-", 8, ("-", 3, 7)) is "8+7-3". Longer parts come first, then greater numbers; what is taken away comes last.
    """
    plus, minus = _parts(tree, "+", "-", _product)
    return "+".join(_ordered(plus)) + "".join(f"-{part}" for part in _ordered(minus))


def _printed(tree: Tree, level: Countdown) -> str | None:
    """The expression; None where it needs an operator that the level has not: 8-(3-7) is printed 8+7-3."""
    text = expression(tree)
    return None if any(sign in text for sign in OPERATORS if sign not in level.operators) else text


def _product(tree: Tree) -> str:
    times, by = _parts(tree, "*", "/", lambda part: str(part) if isinstance(part, int) else f"({expression(part)})")
    return "*".join(_ordered(times)) + "".join(f"/{part}" for part in _ordered(by))


def _parts(tree: Tree, join: str, undo: str, show: Callable[[Tree], str]) -> tuple[list[str], list[str]]:
    """The texts that `join` joins at the top of the tree, and those that it undoes, through all levels of nesting."""
    if isinstance(tree, int) or tree[0] not in (join, undo):
        return [show(tree)], []
    (done, undone), (more, less) = (_parts(side, join, undo, show) for side in tree[1:])
    return (done + more, undone + less) if tree[0] == join else (done + less, undone + more)


def _ordered(parts: list[str]) -> list[str]:
    return sorted(parts, key=lambda text: (len(text), text), reverse=True)


def _draw(numbers: list[int], operators: str, rng: random.Random) -> tuple[Tree, Value]:
    """A random expression over all the numbers; the denominator of its value is 0 where it divides by zero."""
    pool: list[tuple[Tree, Value]] = [(number, (number, 1)) for number in numbers]
    while len(pool) > 1:
        left, x = pool.pop(int(rng.random() * len(pool)))
        right, y = pool.pop(int(rng.random() * len(pool)))
        operator = operators[int(rng.random() * len(operators))]
        pool.append(((operator, left, right), _combine(operator, x, y)))
    return pool[0]


def _combine(operator: str, x: Value, y: Value) -> Value:
    """The value of `x operator y`; a denominator of 0, once there, stays."""
    (a, b), (c, d) = x, y
    if operator == "+":
        return a * d + c * b, b * d
    if operator == "-":
        return a * d - c * b, b * d
    if operator == "*":
        return a * c, b * d
    return (a * d, b * c) if c >= 0 else (-a * d, -b * c)


def _wrong_tries(numbers: list[int], target: int, where: tuple[Countdown, Split],
                 rng: random.Random) -> Iterator[str]:
    """Different tries that miss, with their values: 0 … level.tries, or fewer where no more turn up.

    A try that misses this target hits another; none that would solve a problem of the other split is written down.
    """
    level, split = where
    wanted, seen = rng.randint(0, level.tries), set()
    for _ in range(wanted * _TRIES_DRAWN):
        if len(seen) == wanted:
            return
        tree, (over, under) = _draw(numbers, level.operators, rng)
        if (under and over != target * under and not _gives_away(numbers, (over, under), split)
                and (text := _printed(tree, level)) is not None and text not in seen):
            seen.add(text)
            yield f"{text}={_written(over, under)}"


def _gives_away(numbers: list[int], value: Value, split: Split) -> bool:
    over, under = value
    return over > 0 and over % under == 0 and split_of(f"{sorted(numbers)}={over // under}") != split


def _written(over: int, under: int) -> str:
    shared = math.gcd(over, under)
    return str(over // shared) if under == shared else f"{over // shared}/{under // shared}"


def _problem(numbers: list[int], target: int, tries: list[str], ident: str) -> Problem:
    search = ";".join(tries) + "####" + tries[-1].partition("=")[0]
    return Problem(id=ident, task="countdown", messages=(Message("user", f"{' '.join(map(str, numbers))} = {target}"),),
                   completion=(Message("assistant", search),), answer=str(target),
                   columns={"numbers": numbers, "target": target})
