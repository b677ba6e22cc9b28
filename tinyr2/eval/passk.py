"""What n graded answers to one problem say about k answers: is one right, is the majority right.

In: counts, or answers with their verdicts, of one problem. Out: a probability in [0, 1].
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import combinations
from math import comb, fsum

from tinyr2.core.errors import DataError
from tinyr2.core.rng import generator


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n answers, drawn without replacement, hold one of the c right ones.

    An unbiased estimate of the chance that k fresh answers do. Computed in exact integers, rounded once.
    Chen et al. 2021 (Codex), eq. 1: 1 − C(n−c, k) / C(n, k). DataError where k or c do not fit n.
    """
    _check_k(n, k)
    if not 0 <= c <= n:
        raise DataError(f"pass@k: {c} right answers out of {n}; the right ones are counted among the n")
    total = comb(n, k)
    return (total - comb(n - c, k)) / total


def maj_at_k(answers: Sequence[str | None], correct: Sequence[bool], k: int, *, seed: int,
             subsets: int = 256) -> float:
    """The expected accuracy of a majority vote among k of the n answers, drawn without replacement.

    answers (n,) what each answer came to; equal strings vote together, None has no vote   correct (n,) its verdict
    Exact, as the mean over every subset, where there are at most `subsets` of them (k = n has one); else the mean over
    `subsets` drawn ones, which follow from `seed`, with a standard error of at most 0.5 / √subsets (0.031).
    A tie scores the mean of the tied answers, and a subset without a vote 0. An answer whose votes got different
    verdicts counts as right to their share. Wang et al. 2023 (self-consistency), §2, with unit weights.
    DataError where k does not fit n.
    """
    n = len(answers)
    _check_k(n, k)
    if len(correct) != n:
        raise DataError(f"maj@k: {n} answers, {len(correct)} verdicts; give one verdict per answer")
    chosen = list(_subsets(n, k, seed, subsets))
    return fsum(_vote([answers[i] for i in some], [correct[i] for i in some]) for some in chosen) / len(chosen)


def _check_k(n: int, k: int) -> None:
    if not 1 <= k <= n:
        raise DataError(f"k = {k} with {n} answers to a problem; take 1 ≤ k ≤ {n}, or write more answers")


def _subsets(n: int, k: int, seed: int, subsets: int) -> Iterable[Sequence[int]]:
    if comb(n, k) <= subsets:
        return combinations(range(n), k)
    rng = generator(seed, "maj", n, k)
    return (rng.permutation(n)[:k].tolist() for _ in range(subsets))


def _vote(answers: Sequence[str | None], correct: Sequence[bool]) -> float:
    votes = Counter(a for a in answers if a is not None)
    if not votes:
        return 0.0
    right = Counter(a for a, c in zip(answers, correct, strict=True) if c)
    most = max(votes.values())
    tied = [a for a, count in votes.items() if count == most]
    return fsum(right[a] for a in tied) / (most * len(tied))
