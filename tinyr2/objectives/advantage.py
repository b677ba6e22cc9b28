"""From rewards to advantages. In: the rewards of a group, or a step's values per token. Out: centered, scaled ones."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tinyr2.objectives import rows


def leave_one_out(rewards: Sequence[float | None]) -> list[float | None]:
    """A_i = r_i - mean of the other valid rewards of the group; (G,) in, (G,) out, in the rewards' unit.

    The baseline of sample i does not depend on sample i, so the policy gradient stays unbiased without a factor.
    None (no reward) leaves the baseline and stays None. A lone valid reward has no baseline, so it becomes None too.
    Equal rewards give exactly 0.0.
    RLOO: Kool et al. 2019, "Buy 4 REINFORCE Samples, Get a Baseline for Free!"; Ahmadian et al. 2024, arXiv 2402.14740.
    """
    valid = _valid(rewards)
    return _centered(rewards, valid, len(valid) - 1)


def group_mean(rewards: Sequence[float | None]) -> list[float | None]:
    """A_i = r_i - mean of all valid rewards of the group, its own included; (G,) in, (G,) out, in the rewards' unit.

    (G - 1) / G of `leave_one_out`. None leaves the baseline and stays None; a lone valid reward becomes None. Equal
    rewards give exactly 0.0.
    GRPO's numerator: Shao et al. 2024, arXiv 2402.03300, Section 4.1.2; alone: Liu et al. 2025, arXiv 2503.20783.
    """
    valid = _valid(rewards)
    return _centered(rewards, valid, len(valid))


def spread(values: Sequence[float | None]) -> float:
    """The unbiased standard deviation (ddof 1) of the values that are not None.

    Exactly 0.0 where all are equal, and for fewer than two. Equality is tested as such: the mean of sixteen float 0.1
    need not be 0.1, and what rounding leaves would be divided by itself.
    """
    valid = _valid(values)
    if len(valid) < 2 or all(x == valid[0] for x in valid):
        return 0.0
    deviations = [math.fsum(x - y for y in valid) / len(valid) for x in valid]
    return math.hypot(*deviations) / math.sqrt(len(valid) - 1)


def scaled(advantages: Sequence[float | None], std: float, *, eps: float = 1e-4) -> list[float | None]:
    """A_i / (std + eps), in standard deviations; 0.0 everywhere where std is exactly 0.0. None stays None.

    std is that of the group (GRPO, arXiv 2402.03300, Section 4.1.2) or of the batch. eps bounds rewards that are
    nearly equal; equal ones do not depend on it.
    """
    if std == 0.0:
        return [None if a is None else 0.0 for a in advantages]
    return [None if a is None else a / (std + eps) for a in advantages]


def whiten(x: Tensor, *, eps: float = 1e-8) -> Tensor:
    """(x - mean) / (std + eps) over all tokens of the step, (N,) in, (N,) out; unbiased std.

    Zeros where all are equal, and for fewer than two. REINFORCE++: Hu et al. 2025, arXiv 2501.03262, normalization by
    the global batch; PPO's usual normalization of advantages.
    """
    if len(x) < 2 or bool((x == x[0]).all()):
        return torch.zeros_like(x)
    shifted = x - x[0]  # a common offset would cost digits of the mean and of the squares
    return (shifted - shifted.mean()) / (shifted.std() + eps)


def discounted_outcome(outcome: Tensor, lengths: Sequence[int], *, gamma: float) -> Tensor:
    """gamma^(n-1-t) * outcome_i at token t = 0..n-1 of answer i: an outcome at the last token, seen from each; (N,).

    outcome (B,)    lengths (B,) learned tokens per answer, sum N
    With a gamma of its own for each reward: Yeo et al. 2025, "Demystifying Long Chain-of-Thought Reasoning in LLMs",
    arXiv 2502.03373.
    """
    return gamma ** rows.remaining(lengths, outcome.device).to(outcome) * rows.repeat(outcome, lengths)


def _valid(values: Sequence[float | None]) -> list[float]:
    valid = [x for x in values if x is not None]
    assert all(math.isfinite(x) for x in valid), f"a reward is finite or None: {values}"
    return valid


def _centered(rewards: Sequence[float | None], valid: list[float], denom: int) -> list[float | None]:
    if len(valid) < 2:
        return [None] * len(rewards)
    # The mean of the differences, not the difference of means: where rewards are equal every term is exactly 0.0.
    return [None if r is None else math.fsum(r - x for x in valid) / denom for r in rewards]
