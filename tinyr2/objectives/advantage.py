"""From rewards to advantages. In: the rewards of one group. Out: the same list, centered."""

import math
from collections.abc import Sequence


def leave_one_out(rewards: Sequence[float | None]) -> list[float | None]:
    """A_i = r_i - mean of the other valid rewards of the group; (G,) in, (G,) out, in the rewards' unit.

    The baseline of sample i does not depend on sample i, so the policy gradient stays unbiased without a factor.
    None (no reward) leaves the baseline and stays None. A lone valid reward has no baseline, so it becomes None too.
    Equal rewards give exactly 0.0.
    RLOO: Kool et al. 2019, "Buy 4 REINFORCE Samples, Get a Baseline for Free!"; Ahmadian et al. 2024, arXiv 2402.14740.
    """
    valid = [r for r in rewards if r is not None]
    assert all(math.isfinite(r) for r in valid), f"a reward is finite or None: {rewards}"
    if len(valid) < 2:
        return [None] * len(rewards)
    # The mean of the differences, not the difference of means: where rewards are equal every term is exactly 0.0.
    return [None if r is None else math.fsum(r - x for x in valid) / (len(valid) - 1) for r in rewards]
