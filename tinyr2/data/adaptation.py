"""Online data adaptation: draw more of the problems that the policy now solves sometimes.

In: for each of P problems the share of right answers so far, (P,) float64, NaN where it was never asked. Out: weights,
the indices of a step's problems, and the shares after the step. Pure functions: the caller keeps the array.

Seed-Thinking-v1.5 (arXiv 2504.13914) tells of adapting the data distribution online and gives no formula. Here a
problem's pass rate p is an exponential moving average over its groups, and its weight p(1 - p), the variance of a 0/1
reward and so the size of a group's signal; or one of three weights by pools of difficulty.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from tinyr2.core.config import Config, nearest
from tinyr2.core.errors import ConfigError
from tinyr2.core.rng import generator

Rule = Literal["variance", "pools"]


class AdaptConfig(Config):
    """How pass rates become weights, and which share of a step each domain gets."""

    rule: Rule = "variance"
    ema: float = Field(0.3, gt=0, le=1)  # the new observation's share in the moving average
    floor: float = Field(0.02, gt=0)  # added to every weight, so that every problem keeps being asked
    prior: float = Field(0.5, ge=0, le=1)  # the pass rate of a problem never asked
    thresholds: tuple[float, float] = (0.25, 0.75)  # pools: hard below the first, easy above the second
    pool_weights: tuple[float, float, float] = (0.2, 1.0, 0.2)  # pools: hard, medium, easy
    mix: dict[str, float] | None = None  # share of each Problem.task in a step; null: as the weights have it

    @field_validator("mix")
    @classmethod
    def _shares(cls, mix: dict[str, float] | None) -> dict[str, float] | None:
        if mix is not None and (min(mix.values(), default=-1) < 0 or abs(sum(mix.values()) - 1) > 1e-6):
            raise ValueError("the shares of a mix are 0 or more and add up to 1; divide them by their sum")
        return mix

    @model_validator(mode="after")
    def _pools_in_order(self) -> "AdaptConfig":
        hard, easy = self.thresholds
        if not 0 <= hard <= easy <= 1:
            raise ValueError(f"thresholds {hard} and {easy}: both lie in 0 … 1, the lower one first; swap them")
        if min(self.pool_weights) < 0:
            raise ValueError("pool_weights are 0 or more; raise the negative one")
        return self


def weights(pass_rate: np.ndarray, config: AdaptConfig) -> np.ndarray:
    """How readily each problem is drawn, (P,) float64 above 0, up to a factor.

    pass_rate (P,) in 0 … 1, NaN: never asked. "variance": p(1 - p) + floor. "pools": the pool's weight + floor.
    """
    p = np.where(np.isnan(pass_rate), config.prior, pass_rate)
    assert ((p >= 0) & (p <= 1)).all()
    if config.rule == "variance":
        return p * (1 - p) + config.floor
    hard, easy = config.thresholds
    return np.select([p < hard, p > easy], [config.pool_weights[0], config.pool_weights[2]],
                     config.pool_weights[1]) + config.floor


def choose(weights: np.ndarray, n: int, domains: Sequence[str], config: AdaptConfig, *, seed: int,
           path: tuple[int | str, ...]) -> list[int]:
    """The indices of n problems, in random order; they depend on the arguments alone.

    weights (P,) above 0    domains (P,), the Problem.task of each    path: the place in the run, e.g. (step, attempt)
    Drawn without replacement, the next one always in proportion to the weights of those left: the n greatest of
    log w + Gumbel noise (the Gumbel-top-k trick, Kool et al. 2019, arXiv 1903.06059). More than there are: all come
    once before any comes again. With a mix, each domain gets its quota. ConfigError where mix and domains differ.
    """
    assert len(weights) == len(domains) > 0 and n >= 0 and (weights > 0).all()
    rng = generator(seed, "adapt", *path)
    if config.mix is None:
        return _drawn(np.arange(len(weights)), weights, n, rng)
    check_mix(config.mix, domains)
    labels = np.asarray(domains, dtype=object)
    chosen = [i for domain, quota in quotas(config.mix, n).items()
              for i in _drawn(np.flatnonzero(labels == domain), weights, quota, rng)]
    return [chosen[i] for i in rng.permutation(len(chosen))]


def update(pass_rate: np.ndarray, indices: Sequence[int], rates: Sequence[float], ema: float) -> np.ndarray:
    """The pass rates after a step: p + ema · (rate - p), and the rate itself where it is the first.

    rates: the share of right answers in the group of each index; NaN where no answer could be graded, which changes
    nothing. A problem asked twice is updated twice, in order. The array given is not changed.
    """
    after = pass_rate.copy()
    for i, rate in zip(indices, rates, strict=True):
        if not math.isnan(rate):
            assert 0 <= rate <= 1
            after[i] = rate if math.isnan(after[i]) else after[i] + ema * (rate - after[i])
    return after


def check_mix(mix: dict[str, float], domains: Sequence[str]) -> None:
    """ConfigError where the mix names a domain that no problem has, or leaves one out."""
    known = sorted(set(domains))
    for name in mix:
        if name not in known:
            hint = nearest(name, known)
            cure = f"did you mean {hint!r}? " if hint else ""
            raise ConfigError(f"mix: no problem is of {name!r}; {cure}the data has {', '.join(known)}")
    missing = [name for name in known if name not in mix]
    if missing:
        raise ConfigError(f"mix: no share for {', '.join(missing)}; give one, 0 to leave it out")


def quotas(mix: dict[str, float], n: int) -> dict[str, int]:
    """n split by the shares of a mix: whole numbers that add up to n, by largest remainder, the first on a tie."""
    exact = {name: n * share for name, share in mix.items()}
    # 0.1 · 30 is a little more than 3, and 0.29 · 100 a little less than 29: rounding comes before cutting off
    whole = {name: math.floor(round(value, 6)) for name, value in exact.items()}
    rest = sorted(mix, key=lambda name: round(whole[name] - exact[name], 6))
    for name in rest[:n - sum(whole.values())]:
        whole[name] += 1
    return whole


def _drawn(among: np.ndarray, weights: np.ndarray, n: int, rng: np.random.Generator) -> list[int]:
    chosen: list[int] = []
    while len(chosen) < n:
        keys = np.log(weights[among]) + rng.gumbel(size=len(among))
        chosen += among[np.argsort(-keys, kind="stable")][:n - len(chosen)].tolist()
    return chosen
