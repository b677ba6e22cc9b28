"""Problems made here: signed sums, worked column by column with carries and borrows written out.

In: a difficulty and a seed. Out: problems with their worked solution, on one side of a split that no problem crosses.

    58-367+912 = ?   →   0:8-7+2=03;0:5-6+1=00;0:0-3+9=06####603

Each column reads "carry in : digits = carry out, digit"; a borrow is the carry b (−1) or c (−2). Written in words, a
column ends with the carry that it hands on, which the next one adds, and tags may stand in place of ####:

    58-367+912 = ?   →   <think>8-7+2=3 carry 0;5-6+1=0 进位 0;0-3+9=6 carry 0</think><answer>603</answer>
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator

from tinyr2.core.config import Config
from tinyr2.core.errors import ConfigError
from tinyr2.core.rng import derive
from tinyr2.core.types import Message, Problem

Split = Literal["train", "held_out"]
Language = Literal["en", "zh"]
HELD_OUT_SHARE = 8  # one canonical problem in eight is held out
CARRY = {-2: "c", -1: "b", 0: "0", 1: "1", 2: "2"}
CARRY_WORD: dict[Language, str] = {"en": "carry", "zh": "进位"}


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
    words: Literal["none", "en", "zh", "mixed"] = "none"  # mixed: the language of each column is drawn
    think: bool = False  # <think>columns</think><answer>result</answer>, in place of columns####result

    @model_validator(mode="after")
    def _some_terms(self) -> "SignedSums":
        if self.min_terms > self.terms:
            raise ValueError(f"min_terms {self.min_terms} is above terms {self.terms}; lower it")
        return self

    @property
    def longest_solution(self) -> int:
        """Characters that no solution exceeds."""
        frame = len("0:=00;") if self.words == "none" else len("=0 carry 0;")
        column = frame + 2 * self.terms - 1
        marks = len("<think></think><answer></answer>") if self.think else len("####")
        return (self.digits + 1) * column + marks + self.digits + 1


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

    @property
    def columns(self) -> int:
        """How many columns a solution works through, careless or not."""
        return max(len(str(abs(t))) for t in (*self.terms, sum(self.terms)))

    def solution(self, *, careless: bool = False, languages: Sequence[Language] | None = None,
                 think: bool = False) -> str:
        """The columns from the right and the result.

        careless: as if no column handed a carry on. languages: of each column, where its carry is written in words.
        """
        carry, columns, result = 0, [], []
        for i in range(self.columns):
            digits = [abs(t) // 10**i % 10 for t in self.terms]
            signed = "".join(f"{'-' if t < 0 else '+'}{d}" for t, d in zip(self.terms, digits, strict=True))
            out, digit = divmod(carry + sum(d if t >= 0 else -d for t, d in zip(self.terms, digits, strict=True)), 10)
            given, worked = signed.removeprefix("+"), 0 if careless else out
            columns.append(f"{CARRY[carry]}:{given}={CARRY[out]}{digit}" if languages is None else
                           f"{given}={digit} {CARRY_WORD[languages[i]]} {CARRY[worked]}")
            result.append(str(digit))
            carry = worked
        steps, answer = ";".join(columns), "".join(reversed(result)).lstrip("0") or "0"
        return f"<think>{steps}</think><answer>{answer}</answer>" if think else f"{steps}####{answer}"


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
    return [Problem(id=f"{split}:{i}", task="signed_sums", messages=(Message("user", s.text + "="),),
                    completion=(Message("assistant", _worked(s, level, seed)),), answer=str(sum(s.terms)))
            for i, s in enumerate(seen.values())]


def _draw(level: SignedSums, rng: random.Random) -> Iterator[Sum]:
    while True:
        terms = [rng.randrange(10 ** rng.randint(1, level.digits)) * rng.choice((1, -1))
                 for _ in range(rng.randint(level.min_terms, level.terms))]
        terms[0] = abs(terms[0])
        if sum(terms) >= 0:
            yield Sum(tuple(terms))


def _worked(s: Sum, level: SignedSums, seed: int) -> str:
    """The solution as its author, drawn by the seed, writes it."""
    careless = derive(seed, "careless", s.canonical) < level.careless * 2**63
    return s.solution(careless=careless, languages=_languages(s, level, seed), think=level.think)


def _languages(s: Sum, level: SignedSums, seed: int) -> list[Language] | None:
    if level.words == "none":
        return None
    if level.words == "mixed":
        return ["en" if derive(seed, "words", s.canonical, i) % 2 else "zh" for i in range(s.columns)]
    return [level.words] * s.columns
