"""How sure a figure is: intervals for a proportion, for a mean over problems, and for a paired difference.

In: counts, or one value per problem. Out: the two ends of an interval. The unit of chance is the problem; values
from several seeds are pooled by concatenation, which reads the same problem under two seeds as two problems.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist

import numpy as np

from tinyr2.core.errors import ConfigError, DataError
from tinyr2.core.rng import generator


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure, its interval, and how many problems stand behind it.

    Estimate(value=0.95, low=0.888, high=0.978, n=100)
    """

    value: float
    low: float
    high: float
    n: int


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The score interval of a proportion: (low, high), both in [0, 1].

    Wilson 1927; Brown, Cai & DasGupta 2001, eq. 4. DataError where the counts are no proportion.
    """
    if n < 1 or not 0 <= successes <= n:
        raise DataError(f"an interval for {successes} successes out of {n}: at least one trial is needed, and no more "
                        "successes than trials; were all problems left out?")
    z2 = _quantile(confidence) ** 2
    center = (successes + z2 / 2) / (n + z2)
    half = sqrt(z2 * (successes * (n - successes) / n + z2 / 4)) / (n + z2)
    # at the ends the formula gives 0 and 1 exactly, and floating point nearly
    return (0.0 if successes == 0 else center - half), (1.0 if successes == n else center + half)


def bootstrap_mean(values: Sequence[float], seed: int, confidence: float = 0.95,
                   draws: int = 2000) -> tuple[float, float]:
    """The percentile interval of the mean of `values`, one per problem: (low, high).

    Problems are drawn again with replacement, `draws` times. Efron & Tibshirani 1993, §13.3.
    Equal values give an interval of width 0, which says nothing of how sure they are. DataError without values.
    """
    if len(values) == 0:
        raise DataError("a bootstrap interval of no values; were all problems left out?")
    tail = _tail(confidence)
    data = np.asarray(values, dtype=np.float64)
    rng = generator(seed, "bootstrap")
    means = [data[rng.integers(len(data), size=len(data))].mean() for _ in range(draws)]
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def paired_difference(a: Sequence[bool | None], b: Sequence[bool | None], confidence: float = 0.95) -> Estimate:
    """The share of `a` minus the share of `b`, both about the same problems in the same order, with its interval.

    a, b (problems,) whether each problem was solved; a pair with a None (undecided) is left out, and n counts the rest.
    Newcombe 1998, Statistics in Medicine 17:2635–2650, method 10: square and add the score intervals' arms, with the
    correlation φ of the pairs, its numerator drawn n/2 towards 0 where it is positive.
    DataError where the lengths differ or no pair is left.
    """
    if len(a) != len(b):
        raise DataError(f"a paired difference of {len(a)} and {len(b)} problems; give the same problems, in one order")
    pairs = [(bool(x), bool(y)) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    if not pairs:
        raise DataError("a paired difference without a pair that is decided on both sides")
    n, both = len(pairs), pairs.count((True, True))
    in_a, in_b = both + pairs.count((True, False)), both + pairs.count((False, True))
    phi = _phi(n, both, in_a, in_b)
    (low_a, high_a), (low_b, high_b) = wilson(in_a, n, confidence), wilson(in_b, n, confidence)
    p_a, p_b = in_a / n, in_b / n
    value = (in_a - in_b) / n
    return Estimate(value=value, n=n, low=value - _joined(p_a - low_a, high_b - p_b, phi),
                    high=value + _joined(high_a - p_a, p_b - low_b, phi))


def _phi(n: int, both: int, in_a: int, in_b: int) -> float:
    """The pairs' correlation, corrected; 0 where one side is all right or all wrong."""
    product = in_a * (n - in_a) * in_b * (n - in_b)
    if product == 0:
        return 0.0
    excess = n * both - in_a * in_b  # = both · neither − (a alone) · (b alone)
    return (excess if excess <= 0 else max(excess - n / 2, 0.0)) / sqrt(product)


def _joined(one: float, other: float, phi: float) -> float:
    """The arm of a difference from the arms of its two ends; rounding alone could make the square negative."""
    return sqrt(max(one * one - 2 * phi * one * other + other * other, 0.0))


def _tail(confidence: float) -> float:
    if not 0.0 < confidence < 1.0:
        raise ConfigError(f"confidence {confidence}: take a number between 0 and 1, such as 0.95")
    return (1.0 - confidence) / 2.0


def _quantile(confidence: float) -> float:
    """The normal quantile that leaves half of 1 − confidence above it; 1.95996… for 0.95."""
    return NormalDist().inv_cdf(1.0 - _tail(confidence))
