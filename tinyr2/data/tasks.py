"""Problems made here: signed sums, worked column by column with carries and borrows written out.

In: a difficulty and a seed. Out: problems with their worked solution, on one side of a split that no problem crosses.

    58-367+912 = ?   →   0:8-7+2=03;0:5-6+1=00;0:0-3+9=06####603

Each column reads "carry in : digits = carry out, digit"; a borrow is the carry b (−1) or c (−2).
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator

from tinyr2.core.config import Config
from tinyr2.core.errors import ConfigError
from tinyr2.core.rng import derive
from tinyr2.core.types import Message, Problem

Split = Literal["train", "held_out"]
HELD_OUT_SHARE = 8  # one canonical problem in eight is held out
CARRY = {-2: "c", -1: "b", 0: "0", 1: "1", 2: "2"}


def split_of(canonical: str) -> Split:
    """Which side a problem is on, by a hash of its canonical form alone: no seed and no difficulty moves it."""
    return "held_out" if derive(0, "split", canonical) % HELD_OUT_SHARE == 0 else "train"


class SignedSums(Config):
    """How hard: sums of 2 … terms numbers of 1 … digits digits, the first positive, the result never negative."""

    terms: int = Field(3, ge=2, le=3)  # with four, a carry may pass what CARRY can write
    digits: int = Field(2, ge=1, le=9)
    min_terms: int = Field(2, ge=2, le=3)
    # share of worked solutions by an author who never carries; their answers are often wrong, `Problem.answer` never is
    careless: float = Field(0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _some_terms(self) -> "SignedSums":
        if self.min_terms > self.terms:
            raise ValueError(f"min_terms {self.min_terms} is above terms {self.terms}; lower it")
        return self

    @property
    def longest_solution(self) -> int:
        """Characters that no solution exceeds."""
        column = len("0:=00;") + 2 * self.terms - 1
        return (self.digits + 1) * column + len("####") + self.digits + 1


@dataclass(frozen=True)
class Sum:
    """Signed numbers to be added; Sum((58, -367, 912)). The first is not negative."""

    terms: tuple[int, ...]

    @property
    def text(self) -> str:
        """As it is asked: "58-367+912"."""
        return "".join(f"{t:+d}" for t in self.terms).removeprefix("+")

    @property
    def canonical(self) -> str:
        """Equal for sums that are one problem in another order: sorted operands and target."""
        return f"{sorted(self.terms)}={sum(self.terms)}"

    @property
    def split(self) -> Split:
        """Which side it is on, however it is ordered."""
        return split_of(self.canonical)

    def solution(self, *, careless: bool = False) -> str:
        """The columns from the right, then "####" and the result; careless: as if no column handed a carry on."""
        carry, columns, result = 0, [], []
        for i in range(max(len(str(abs(t))) for t in (*self.terms, sum(self.terms)))):
            digits = [abs(t) // 10**i % 10 for t in self.terms]
            signed = "".join(f"{'-' if t < 0 else '+'}{d}" for t, d in zip(self.terms, digits, strict=True))
            out, digit = divmod(carry + sum(d if t >= 0 else -d for t, d in zip(self.terms, digits, strict=True)), 10)
            columns.append(f"{CARRY[carry]}:{signed.removeprefix('+')}={CARRY[out]}{digit}")
            result.append(str(digit))
            carry = 0 if careless else out
        return ";".join(columns) + "####" + ("".join(reversed(result)).lstrip("0") or "0")


def signed_sums(level: SignedSums, split: Split, n: int, seed: int) -> list[Problem]:
    """n different problems of one split, with answer and worked solution.

    ConfigError where the level has too few. Problems that differ in the order of their terms alone count as one.
    """
    rng = random.Random(derive(seed, "signed_sums", split))
    seen: dict[str, Sum] = {}
    for drawn, candidate in enumerate(_draw(level, rng)):
        if candidate.split == split:
            seen.setdefault(candidate.canonical, candidate)
        if len(seen) == n:
            break
        if drawn > 200 * n + 10_000:
            raise ConfigError(f"{n} different {split} sums with up to {level.terms} terms of {level.digits} digits: "
                              f"only {len(seen)} turned up; ask for fewer, or raise terms or digits")
    return [_problem(s, split, i, derive(seed, "careless", s.canonical) < level.careless * 2**63)
            for i, s in enumerate(seen.values())]


def _draw(level: SignedSums, rng: random.Random) -> Iterator[Sum]:
    while True:
        terms = [rng.randrange(10 ** rng.randint(1, level.digits)) * rng.choice((1, -1))
                 for _ in range(rng.randint(level.min_terms, level.terms))]
        terms[0] = abs(terms[0])
        if sum(terms) >= 0:
            yield Sum(tuple(terms))


def _problem(s: Sum, split: Split, i: int, careless: bool) -> Problem:
    return Problem(id=f"{split}:{i}", task="signed_sums", messages=(Message("user", s.text + "="),),
                   completion=(Message("assistant", s.solution(careless=careless)),), answer=str(sum(s.terms)))
