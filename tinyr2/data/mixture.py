"""Several sources of worked problems, dealt out at a ratio: long and short chains, large and small teachers.

In: a `MixtureConfig` and the tokenizer of who learns. Out: problems whose ids begin with their source, the over-long
ones dropped and never cut, and a `Mixture` that says which of them a step gets. After Li et al. 2025 (2502.12143), who
mix for small students long : short chains, or large : small teachers, as 1 : 4.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from pydantic import Field, model_validator
from transformers import PreTrainedTokenizerBase

from tinyr2.core.config import Config, nearest
from tinyr2.core.errors import DataError
from tinyr2.core.types import Problem
from tinyr2.data.problems import DataConfig, load_problems, stretch
from tinyr2.tokens.chat import render_example

USUAL = (1, 4)  # of two sources, where the config names no ratio


class MixtureConfig(Config):
    """Which sources, and how many problems of each come in a round.

    mixture: {sources: {long: {path: long.jsonl}, short: {path: short.jsonl}}, ratio: {long: 1, short: 4}}
    """

    sources: dict[str, DataConfig] = Field(min_length=1)
    ratio: dict[str, int] = {}  # whole numbers, by source; left out, the first of two sources gets 1 and the second 4
    max_completion_length: int | None = Field(None, ge=1)  # tokens; rows with a longer completion are dropped

    @model_validator(mode="after")
    def _ratio_fits(self) -> "MixtureConfig":
        names = list(self.sources)
        odd = next((name for name in names if not name or "/" in name), None)
        if odd is not None:
            raise ValueError(f"sources: {odd!r} begins the ids of its problems, up to a slash; take a name without one")
        if not self.ratio and len(names) > len(USUAL):
            even = ", ".join(f"{name}: 1" for name in names)
            raise ValueError(f"ratio: {len(names)} sources have no usual one; give {{{even}}} or what else is meant")
        if self.ratio and self.ratio.keys() != self.sources.keys():
            wrong = next(iter(self.ratio.keys() ^ self.sources.keys()))
            hint = nearest(wrong, names) if wrong in self.ratio else None
            what = "has no place in it" if wrong in self.sources else "is no source"
            raise ValueError(f"ratio: {wrong} {what}; {f'did you mean {hint!r}? ' if hint else ''}give a whole number "
                             f"to each of {', '.join(names)}")
        if any(share < 1 for share in self.ratio.values()):
            raise ValueError("ratio: a share is a whole number of 1 or more; leave out a source that is not wanted")
        return self

    @property
    def shares(self) -> dict[str, int]:
        """How many problems of each source come in a round."""
        names = list(self.sources)
        return self.ratio or dict(zip(names, USUAL if len(names) > 1 else (1,), strict=True))

    @property
    def files(self) -> list[str]:
        """What is read."""
        return [file for source in self.sources.values() for file in source.files]

    @property
    def source(self) -> str:
        """The paths or tasks: what messages call it."""
        return ", ".join(source.source for source in self.sources.values())


def load_mixture(config: MixtureConfig) -> list[Problem]:
    """The problems of all sources, one source after the other, as `load_problems` has them; ids are `<source>/<id>`."""
    return [replace(p, id=f"{name}/{p.id}") for name, source in config.sources.items() for p in load_problems(source)]


def source_of(problem: Problem) -> str:
    """The source of a problem that `load_mixture` gave."""
    return problem.id.partition("/")[0]


def drop_long(problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase, limit: int | None,
              context: int | None = None) -> tuple[list[Problem], dict[str, int]]:
    """The problems whose completion has at most `limit` tokens, and fits with its prompt into `context`.

    Also how many were dropped, by source. What cannot be rendered, or has no completion, stays: the checks say so.
    DataError where nothing is left of a source.
    """
    kept, total = [], Counter(source_of(p) for p in problems)
    for problem in problems:
        if problem.completion and _is_long(problem, tokenizer, limit, context):
            continue
        kept.append(problem)
    left = Counter(source_of(p) for p in kept)
    for name, count in total.items():
        if not left[name]:
            raise DataError(f"mixture.sources.{name}: each of its {count:,} rows is longer than "
                            f"{f'{limit:,} tokens of completion' if limit else 'the context'} allows; raise "
                            "mixture.max_completion_length, or leave the source out")
    return kept, {name: count - left[name] for name, count in total.items()}


@dataclass(frozen=True)
class Mixture:
    """Sources and the order in which they take turns."""

    sources: Mapping[str, tuple[Problem, ...]]
    turns: tuple[str, ...]  # one round

    @classmethod
    def of(cls, problems: Sequence[Problem], shares: Mapping[str, int]) -> "Mixture":
        """A mixture of what `load_mixture` gave, or what was left of it."""
        sources = {name: tuple(p for p in problems if source_of(p) == name) for name in shares}
        assert all(sources.values()), "a source without problems"
        return cls(sources, turns(shares))

    def deal(self, n: int, step: int, seed: int) -> list[Problem]:
        """The `n` problems of step `step`, counted from 0.

        The steps cut one endless stream of rounds, so that after any number of steps each source has had its share to
        one problem. Each source is an endless stream of its own, epoch after epoch, as `problems.draw` makes it.
        """
        at, end = step * n, (step + 1) * n
        drawn = {name: iter(stretch(self.sources[name], self._dealt(name, at), self._dealt(name, end), seed, "mixture",
                                    name)) for name in self.sources}
        return [next(drawn[self.turns[i % len(self.turns)]]) for i in range(at, end)]

    def _dealt(self, name: str, total: int) -> int:
        """How many of the first `total` problems are of the source."""
        rounds, rest = divmod(total, len(self.turns))
        return rounds * self.turns.count(name) + self.turns[:rest].count(name)


def turns(shares: Mapping[str, int]) -> tuple[str, ...]:
    """One round, in which each source has its share of the turns, spread out.

    After t turns a source has had its exact quota rounded down or up (the quota method of Balinski and Young 1975).
    {"long": 1, "short": 4} → ("short", "short", "long", "short", "short") or the like
    """
    total, had, order = sum(shares.values()), Counter(), []
    for t in range(1, total + 1):
        may = [name for name, share in shares.items() if had[name] < -(-t * share // total)]
        chosen = max(may, key=lambda name: Fraction(shares[name], had[name] + 1))
        had[chosen] += 1
        order.append(chosen)
    return tuple(order)


def _is_long(problem: Problem, tokenizer: PreTrainedTokenizerBase, limit: int | None, context: int | None) -> bool:
    try:
        prompt, response = render_example(tokenizer, problem.messages, problem.completion)
    except DataError:
        return False
    return (limit is not None and len(response) > limit) or (
        context is not None and len(prompt) + len(response) > context)
