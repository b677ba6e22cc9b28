"""A step's answers: groups of graded rollouts, those that teach nothing kept, dropped, or sampled anew.

In: two functions, one that deals problems and one that answers them. Out: the groups to learn from, and all that was
written on the way to them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Literal

from pydantic import Field

from tinyr2.core.config import Config
from tinyr2.core.types import Problem, Rollout
from tinyr2.data.adaptation import AdaptConfig
from tinyr2.train.credit import groups_of

Deal = Callable[[int, int, Sequence[Problem]], list[Problem]]  # round, how many, those already dealt → problems
Answer = Callable[[int, Sequence[Problem]], list[Rollout]]  # round, problems → graded rollouts, problem by problem


class SamplingPlan(Config):
    """Which problems a step asks, and what becomes of groups whose answers all earn the same.

    keep: they stay, with advantage 0; a KL in the loss still pulls them to the reference. drop: they leave the loss and
    its denominators. refill: they are dropped, and more problems are asked until the batch is full (dynamic sampling:
    Yu et al. 2025, 2503.14476, eq. 11), in at most `max_rounds` rounds.
    """

    equal_groups: Literal["keep", "drop", "refill"] = "keep"
    max_rounds: int = Field(4, ge=1)
    adapt: AdaptConfig | None = None  # draw problems by their pass rates; None: each once an epoch


@dataclass(frozen=True)
class Collection:
    """What one step has written."""

    kept: list[Rollout]  # whole groups, numbered from 0
    written: list[Rollout]  # everything, in the order of sampling
    rounds: int
    groups: int  # written
    equal: int  # of them, groups whose rewards are all equal


def collect(plan: SamplingPlan, wanted: int, deal: Deal, answer: Answer) -> Collection:
    """`wanted` groups to learn from; fewer where `max_rounds` did not give as many."""
    kept: list[list[Rollout]] = []
    written: list[Rollout] = []
    asked: list[Problem] = []
    groups = equal = rounds = 0
    while rounds < (plan.max_rounds if plan.equal_groups == "refill" else 1) and len(kept) < wanted:
        missing = wanted - len(kept)
        share = len(kept) / groups if kept else 1.0  # of groups that were worth keeping
        problems = deal(rounds, min(wanted, ceil(missing / share)), asked)
        asked += problems
        rollouts = answer(rounds, problems)
        for members in groups_of(rollouts):
            group = [replace(rollouts[i], group=groups) for i in members]
            groups += 1
            written += group
            same = is_equal(group)
            equal += same
            if plan.equal_groups == "keep" or not same:
                kept.append(group)
        rounds += 1
    chosen = [replace(r, group=i) for i, group in enumerate(kept[:wanted]) for r in group]
    return Collection(chosen, written, rounds, groups, equal)


def is_equal(group: Sequence[Rollout]) -> bool:
    """Whether the group's answers earn exactly the same, so that no baseline tells them apart."""
    rewards = [r.reward for r in group if r.reward is not None and r.error is None]
    return len(set(rewards)) < 2
