"""The critic's side of PPO. In: rewards and values of the learned tokens, packed. Out: advantages, targets, its loss.

`value[t]` is the critic's guess, before token t is written, of the rewards from token t on.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tinyr2.objectives import rows


def discounted_sum(x: Tensor, lengths: Sequence[int], discount: float | Tensor) -> Tensor:
    """y_t = x_t + discount * y_{t+1} inside each row, 0 after its last token; (N,).

    x (N,)    lengths (B,), sum N    discount one number, or (B,) one of each row
    """
    y, places = rows.pad(x, lengths)
    power = discount.to(y)[:, None] if isinstance(discount, Tensor) else discount
    reach = 1
    # Each round doubles how far ahead every sum reaches: log2 of the longest row, not its length.
    while reach < y.shape[1]:
        y[:, :-reach] += power * y[:, reach:]
        power, reach = power * power, 2 * reach
    return y[places]


def gae(reward: Tensor, value: Tensor, lengths: Sequence[int], *, gamma: float, lam: float | Tensor,
        last_value: Tensor | None = None) -> Tensor:
    """Generalized advantage estimates, (N,), held constant; plus value they are the lambda-returns, a critic's targets.

    reward (N,) of each token, an outcome at the last one    value (N,) of the policy that wrote    lengths (B,), sum N
    lam one number, or (B,) one of each row    last_value (B,), the value after the last token of a row that was cut
    off; NaN, or None for all, where the answer ended and nothing follows
    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lam A_{t+1}: Schulman et al. 2015, arXiv 1506.02438,
    eq. 11 and 16.
    """
    value = value.detach()
    after = torch.zeros(len(lengths)).to(value) if last_value is None else last_value.detach().nan_to_num(nan=0.0)
    ends = rows.remaining(lengths, value.device) == 0
    following = torch.where(ends, rows.repeat(after.to(value), lengths), value.roll(-1))
    return discounted_sum(reward.detach() + gamma * following - value, lengths, gamma * lam)


def adaptive_lambda(lengths: Sequence[int], *, alpha: float, floor: float = 0.0,
                    dtype: torch.dtype = torch.float32) -> Tensor:
    """lambda = 1 - 1 / (alpha * l) of each answer, at least `floor` and at most 1; (B,).

    lengths (B,) tokens per answer. Unclamped it is negative below 1 / alpha tokens: -3 at l = 5 for alpha = 0.05,
    which fits answers of thousands of tokens. Short answers need a larger alpha, or a floor.
    VAPO: Yue et al. 2025, arXiv 2504.05118, length-adaptive GAE; the paper has no clamp.
    """
    length = torch.tensor(lengths, dtype=torch.float64)
    return (1 - 1 / (alpha * length)).clamp(floor, 1.0).to(dtype)


def value_loss(value: Tensor, old_value: Tensor, returns: Tensor, weight: Tensor, *, clip: float | None) -> Tensor:
    """sum of weight * max((V - R)^2, (V_old + clamp(V - V_old, -clip, clip) - R)^2) / 2, a scalar.

    value (N,) needs grad    old_value (N,) of the policy that wrote    returns (N,) the targets    weight (N,)
    clip None: the first term alone. The pessimistic one of two: a value beyond the clip that overshoots is still
    pulled back. The reference implementation of PPO (Schulman et al. 2017, arXiv 1707.06347).
    """
    error = (value - returns).square()
    if clip is not None:
        near = old_value + (value - old_value).clamp(-clip, clip)
        error = torch.maximum(error, (near - returns).square())
    return (weight * error).sum() / 2


def explained_variance(value: Tensor, returns: Tensor) -> float | None:
    """1 - Var(R - V) / Var(R): 1 for a perfect critic, 0 for a constant one; None where the returns do not vary.

    value (N,)    returns (N,)
    """
    if len(returns) < 2 or bool((returns == returns[0]).all()):
        return None
    guess, target = (x.detach().cpu().double() for x in (value, returns))
    return (1 - (target - guess).var() / target.var()).item()
