"""A policy's figures on held-out problems: pass@k, maj@k, lengths and speed, each share with its interval.

In: a policy, problems, reward functions, a config. Out: an `EvalResult`, from which the table, the metrics and the
JSON are written. What the graders could not decide is counted, and leaves the shares.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from pydantic import Field, model_validator

from tinyr2.core.errors import ConfigError, DataError
from tinyr2.core.rng import derive, permutation
from tinyr2.core.types import Problem, Rollout
from tinyr2.eval.intervals import Estimate, bootstrap_mean, wilson
from tinyr2.eval.passk import maj_at_k, pass_at_k
from tinyr2.rewards.answer import extract_answer, same_answer
from tinyr2.rewards.grade import RewardFunction, grade
from tinyr2.rollouts.sample import Policy, sample
from tinyr2.rollouts.sampling import SamplingConfig

_CLOCKS = ("seconds", "tokens_per_s")  # differ between two equal runs


class EvalConfig(SamplingConfig):
    """Which problems, how many answers to each, and how they are drawn; greedy unless a temperature is given."""

    num_problems: int | None = Field(None, ge=1)  # None: all; else so many, drawn by the seed
    num_generations: int = Field(1, ge=1)  # answers to each problem
    k: tuple[int, ...] = Field((1,), min_length=1)  # of pass@k and maj@k
    temperature: float = Field(0.0, ge=0.0)  # 0: greedy
    threshold: float = 1.0  # a reward (the weighted sum of all) from here on means solved
    seed: int = 0
    per_device_eval_batch_size: int = Field(256, ge=1)  # rows decoded at a time

    @model_validator(mode="after")
    def _check(self) -> "EvalConfig":
        n = self.num_generations
        if n > 1 and self.temperature == 0.0:
            raise ValueError(f"num_generations {n} at temperature 0 would write one answer {n} times; set "
                             "temperature=0.6 or so, or num_generations=1")
        if len(set(self.k)) < len(self.k) or not all(1 <= k <= n for k in self.k):
            raise ValueError(f"k {list(self.k)}: each k stands once and lies between 1 and num_generations ({n})")
        return self


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """What one evaluation found. n answers to each problem; None where nothing was decided."""

    problem_ids: tuple[str, ...]  # (problems,)
    verdicts: tuple[tuple[bool | None, ...], ...]  # (problems, n) solved or not; None: undecided
    pass_at: Mapping[int, Estimate | None]  # by k, over problems with at least k decided answers
    maj_at: Mapping[int, Estimate | None]  # by k > 1; empty where no answer could be extracted
    parts: Mapping[str, float]  # by reward: the mean over the answers that it graded
    mean_length: float  # tokens per answer, its end token included
    clipped_ratio: float  # share of answers cut off at the length limit
    undecided: int  # answers without a verdict
    errors: tuple[str, ...]  # what the reward functions did wrong, each fault once
    seconds: float  # spent on writing, not on grading
    tokens_per_s: float  # written, over all rows

    @property
    def correct(self) -> tuple[bool | None, ...]:
        """(problems,) the verdict on each problem's first answer; what `paired_difference` takes."""
        return tuple(row[0] for row in self.verdicts)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: figures, the graders' errors and clock readings; None where nothing was decided."""
        row: dict[str, Any] = {}
        for name, estimates in (("pass", self.pass_at), ("maj", self.maj_at)):
            for k, found in estimates.items():
                row |= {f"{name}@{k}": found and found.value, f"{name}@{k}_low": found and found.low,
                        f"{name}@{k}_high": found and found.high, f"{name}@{k}_n": found.n if found else 0}
        return row | {"num_problems": len(self.verdicts), "num_generations": len(self.verdicts[0]),
                      "undecided": self.undecided, "completions/mean_length": self.mean_length,
                      "completions/clipped_ratio": self.clipped_ratio, "errors": list(self.errors),
                      "seconds": self.seconds, "tokens_per_s": self.tokens_per_s}

    def figures(self) -> dict[str, float]:
        """For a metrics row that must repeat to the byte: what was measured, without the clock readings.

        The first is pass@k of the config's first k: by it a loop may choose the best of its models.
        """
        skipped = (*_CLOCKS, "errors")
        return {name: value for name, value in self.to_dict().items() if name not in skipped and value is not None}


def evaluate(policy: Policy, problems: Sequence[Problem], rewards: Sequence[RewardFunction],
             config: EvalConfig) -> EvalResult:
    """Let the policy write, grade what it wrote, and sum up.

    Every random number follows from `config.seed`, the problem and its place, so two policies under one config get the
    same problems and the same draws. DataError without problems, ConfigError where there are too few.
    """
    chosen = _chosen(problems, config)
    start = time.perf_counter()
    rollouts = sample(policy, chosen, n=config.num_generations, sampling=config, seed=derive(config.seed, "eval"),
                      max_rows=config.per_device_eval_batch_size)
    seconds = time.perf_counter() - start
    return summarize(grade(rollouts, rewards), config, seconds)


def summarize(rollouts: Sequence[Rollout], config: EvalConfig, seconds: float) -> EvalResult:
    """The figures of graded rollouts, `config.num_generations` to a problem and problem by problem.

    pass@1 of one answer each has a Wilson interval, everything else a bootstrap interval over problems; where every
    problem is solved, or none, that would have no width, and Wilson's is given.
    """
    n = config.num_generations
    assert rollouts and len(rollouts) % n == 0, f"{len(rollouts)} rollouts, {n} to a problem"
    groups = [rollouts[i:i + n] for i in range(0, len(rollouts), n)]
    verdicts = tuple(tuple(_verdict(r, config) for r in group) for group in groups)
    tokens = sum(len(r.response_ids) for r in rollouts)
    return EvalResult(
        problem_ids=tuple(group[0].problem.id for group in groups), verdicts=verdicts,
        pass_at={k: _pass_at(verdicts, k, config) for k in config.k}, maj_at=_maj_at(groups, verdicts, config),
        parts=_part_means(rollouts), mean_length=tokens / len(rollouts),
        clipped_ratio=sum(r.finish == "length" for r in rollouts) / len(rollouts),
        undecided=sum(row.count(None) for row in verdicts),
        errors=tuple(dict.fromkeys(r.error for r in rollouts if r.error is not None)),
        seconds=seconds, tokens_per_s=tokens / seconds)


def _chosen(problems: Sequence[Problem], config: EvalConfig) -> Sequence[Problem]:
    if not problems:
        raise DataError("an evaluation without problems; give a dataset that has some")
    if config.num_problems is None:
        return problems
    if config.num_problems > len(problems):
        raise ConfigError(f"num_problems {config.num_problems}: the dataset has {len(problems)}; ask for no more, or "
                          "set it to null for all")
    return [problems[i] for i in sorted(permutation(len(problems), config.seed, "eval")[:config.num_problems])]


def _part_means(rollouts: Sequence[Rollout]) -> dict[str, float]:
    graded: dict[str, list[float]] = {}
    for rollout in rollouts:
        for name, part in rollout.reward_parts.items():
            if part is not None:
                graded.setdefault(name, []).append(part)
    return {name: fmean(parts) for name, parts in graded.items()}


def _verdict(rollout: Rollout, config: EvalConfig) -> bool | None:
    return None if rollout.reward is None else rollout.reward >= config.threshold


def _pass_at(verdicts: Sequence[Sequence[bool | None]], k: int, config: EvalConfig) -> Estimate | None:
    decided = [[v for v in row if v is not None] for row in verdicts]
    decided = [row for row in decided if len(row) >= k]
    if config.num_generations > 1:
        return _mean([pass_at_k(len(row), sum(row), k) for row in decided], config)
    if not decided:
        return None
    right, n = sum(row[0] for row in decided), len(decided)
    low, high = wilson(right, n)
    return Estimate(value=right / n, low=low, high=high, n=n)


def _maj_at(groups: Sequence[Sequence[Rollout]], verdicts: Sequence[Sequence[bool | None]],
            config: EvalConfig) -> dict[int, Estimate | None]:
    """By each k > 1 of the config, and by n; the answers that were decided vote."""
    if config.num_generations == 1:
        return {}
    texts = [[r.text or "" for r, v in zip(group, row, strict=True) if v is not None]
             for group, row in zip(groups, verdicts, strict=True)]
    answers = [_alike([extract_answer(text) for text in row]) for row in texts]
    correct = [[v for v in row if v is not None] for row in verdicts]
    if all(answer is None for row in answers for answer in row):
        return {}
    return {k: _mean([maj_at_k(a, c, k, seed=derive(config.seed, "maj", i))
                      for i, (a, c) in enumerate(zip(answers, correct, strict=True)) if len(a) >= k], config)
            for k in sorted({*config.k, config.num_generations} - {1})}


def _alike(answers: Sequence[str | None]) -> list[str | None]:
    """Equal answers as equal strings, each as it was first written: 1,000 and 1000.0 vote together."""
    spelling: dict[str, str] = {}
    for answer in answers:
        if answer is not None and answer not in spelling:
            spelling[answer] = next((s for s in spelling.values() if same_answer(s, answer)), answer)
    return [None if answer is None else spelling[answer] for answer in answers]


def _mean(values: Sequence[float], config: EvalConfig) -> Estimate | None:
    if not values:
        return None
    if min(values) == max(values) and values[0] in (0.0, 1.0):
        # every problem solved, or none: drawing them again says nothing, counting them does
        low, high = wilson(round(sum(values)), len(values))
    else:
        low, high = bootstrap_mean(values, config.seed)
    return Estimate(value=sum(values) / len(values), low=low, high=high, n=len(values))
