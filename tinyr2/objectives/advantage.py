"""From rewards to advantages. In: the rewards of one group. Out: the same list, centered."""

import math
from collections.abc import Sequence


def leave_one_out(rewards: Sequence[float | None]) -> list[float | None]:
    """A_i = r_i - mean of the other valid rewards of the group; (G,) in, (G,) out, in the rewards' unit.

    The baseline of sample i does not depend on sample i, so the policy gradient stays unbiased without a factor.
    None (no reward) leaves the baseline and stays None. A lone valid reward has no baseline, so it becomes None too.
    Equal rewards give exactly 0.0, whatever rounding a mean of them would carry.
    RLOO: Kool et al. 2019, "Buy 4 REINFORCE Samples, Get a Baseline for Free!"; Ahmadian et al. 2024, arXiv 2402.14740.
    """
    valid = [r for r in rewards if r is not None]
    assert all(math.isfinite(r) for r in valid), f"a reward is finite or None: {rewards}"
    if len(valid) < 2:
        return [None] * len(rewards)
    if all(r == valid[0] for r in valid):
        return [None if r is None else 0.0 for r in rewards]
    total, others = math.fsum(valid), len(valid) - 1
    return [None if r is None else r - (total - r) / others for r in rewards]
