"""Losses of the tokens that were written. In: tensors over the N learned tokens. Out: a scalar to minimize.

`denom` is the caller's, counted over the whole optimizer step, so micro-batches add up exactly.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tinyr2.objectives import rows


def weighted_nll(learner_logp: Tensor, weight: Tensor | float = 1.0, *, denom: float) -> Tensor:
    """-sum(weight * learner_logp) / denom, a scalar; the weight is held constant.

    learner_logp (N,) nats, needs grad    weight (N,), or one number for every token
    denom        tokens per step for a token mean, sequences per step for a mean of sequence sums
    One formula with three names: weight 1 is supervised fine-tuning, a sequence's reward on each of its tokens is
    reward-weighted likelihood, and its advantage there is REINFORCE (Williams 1992, theorem 1): minus the loss's
    gradient is an unbiased estimate of that of the expected reward, if the policy that is trained wrote the tokens.
    """
    constant = weight.detach() if isinstance(weight, Tensor) else weight
    return -(constant * learner_logp).sum() / denom


def sampled_reverse_kl(learner_logp: Tensor, teacher_logp: Tensor, weight: Tensor | None = None, *,
                       denom: float) -> Tensor:
    """Reverse KL(student || teacher) from the sampled tokens alone, as a policy gradient; a scalar.

    learner_logp (N,) nats, needs grad, of tokens that the student sampled    teacher_logp (N,) nats, of the same ones
    weight (N,), held constant, of each token's term; None: 1
    The advantage is log p_T(y) - log p_S(y), held constant. The plain value log p_S(y) - log p_T(y) would estimate the
    KL, yet as a loss it teaches nothing: its gradient is that of log p_S(y), whose mean over y ~ p_S is zero. What
    changes the KL is which tokens get drawn, and only the score-function form, weight times log p_S, follows that.
    Lu and Thinking Machines Lab 2025, "On-Policy Distillation", with discount 0.
    """
    advantage = teacher_logp - learner_logp
    return weighted_nll(learner_logp, advantage if weight is None else weight * advantage, denom=denom)


def truncated_importance(learner_logp: Tensor, actor_logp: Tensor, cap: float) -> Tensor:
    """min(p_learner(y) / p_actor(y), cap), (N,), held constant: what a token's loss term is multiplied by.

    learner_logp (N,) nats    actor_logp (N,) nats, of the policy that sampled; NaN where none did, and the weight is 1
    For an actor that has the learner's weights and other numerics. Yao et al. 2025, "Your Efficient RL Framework
    Secretly Brings You Off-Policy RL Training", truncated importance sampling.
    """
    log_ratio = (learner_logp - actor_logp).detach()
    return log_ratio.clamp(max=math.log(cap)).nan_to_num(0.0).exp()


def importance_weight(log_ratio: Tensor, lengths: Sequence[int], *, level: Literal["token", "sequence"],
                      mode: Literal["truncate", "mask"], cap: float, floor: float = 0.0) -> Tensor:
    """The ratio p_old / p_actor, bounded, (N,), held constant: what a token's loss term is multiplied by.

    log_ratio (N,) nats, old_logp - actor_logp; NaN where no policy of ours sampled, and the weight is 1
    lengths (B,), sum N    level  token: of each token; sequence: exp of the sum over the answer, at each of its tokens
    mode  truncate: clamped to [floor, cap]; mask: 0 outside of it
    Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training".
    """
    unknown = log_ratio.isnan()
    log_weight = log_ratio.detach().nan_to_num(nan=0.0)
    if level == "sequence":
        log_weight = rows.repeat(rows.total(log_weight, lengths), lengths)
    weight = log_weight.exp()
    bounded = weight.clamp(floor, cap)
    if mode == "mask":
        bounded = weight.where(weight == bounded, 0.0)
    return bounded.masked_fill(unknown, 1.0)


def clipped_surrogate(log_ratio: Tensor, advantage: Tensor, *, low: float, high: float,
                      dual: float | None = None) -> Tensor:
    """-min(r A, clip(r, 1 - low, 1 + high) A) of each token, (N,), to minimize; r = exp(log_ratio).

    log_ratio (N,) nats, learner_logp - old_logp, needs grad    advantage (N,), held constant
    low, high  the clip's reach; equal in PPO (Schulman et al. 2017, arXiv 1707.06347, eq. 7), high > low in DAPO's
               clip-higher (Yu et al. 2025, arXiv 2503.14476, eq. 10); low >= 1 leaves the lower side open
    dual       c > 1: where A < 0, -max(min(...), c A) (Ye et al. 2020, arXiv 1912.09729, eq. 5); None: no such bound
    """
    below, above = _bounds(advantage, low, high)
    if dual is not None:
        assert dual > 1, f"the dual clip is above 1, not {dual}"
        above = above.where(advantage >= 0, math.log(dual))
    # The same min, with the sign of A resolved: A >= 0 bounds the ratio above, A < 0 below. In log space, so that a
    # ratio beyond float32 has gradient 0 where it is clipped, and not 0 * inf.
    return -advantage.detach() * log_ratio.clamp(below, above).exp()


def clipped(log_ratio: Tensor, advantage: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Where the clip removed the gradient, at its lower and at its upper side; both (N,) bool.

    log_ratio (N,) nats    advantage (N,)    low, high as in `clipped_surrogate`
    """
    below, above = _bounds(advantage, low, high)
    return log_ratio < below, (log_ratio > above) & (advantage > 0)


def _bounds(advantage: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    floor = math.log1p(-low) if low < 1 else -math.inf
    free = torch.full_like(advantage, math.inf)
    return (-free).where(advantage >= 0, floor), free.where(advantage < 0, math.log1p(high))


@dataclass(frozen=True)
class Ratio:
    """The log-ratio of a whole answer at each of its tokens, for a loss that sees the tokens in chunks.

    Its value was known before the loss; only its slope is made anew, one token's share at each token.
    """

    base: Tensor  # (N,) nats
    gain: Tensor  # (N,) how fast the answer's log-ratio moves with a token's log-prob, times its length

    def log_ratio(self, learner_logp: Tensor, part: slice) -> Tensor:
        """(n,) nats, equal to base[part], with the gradient gain[part] in learner_logp (n,), which needs grad."""
        return self.base[part] + self.gain[part] * (learner_logp - learner_logp.detach())


def sequence_ratio(learner_logp: Tensor, old_logp: Tensor, lengths: Sequence[int], *,
                   level: Literal["sequence_mean", "sequence"]) -> Ratio:
    """The ratio p_learner(answer) / p_old(answer) that a sequence-level clip reads.

    learner_logp (N,) nats, of a first pass over the weights that are trained    old_logp (N,) nats
    sequence_mean  exp of the mean over the answer (GSPO: Zheng et al. 2025, arXiv 2507.18071, eq. 5 to 7)
    sequence       exp of the sum, the product of all token ratios (RLOO: Ahmadian et al. 2024, arXiv 2402.14740)
    With token weights 1 / (B n_i) the value and the gradient of sum_t weight_t f(log_ratio_t) are those of
    1/B sum_i f(log s_i).
    """
    gap = (learner_logp - old_logp).detach()
    base = rows.total(gap, lengths)
    length = torch.tensor(lengths).to(base)
    if level == "sequence_mean":
        base, length = base / length.clamp(min=1.0), torch.ones_like(length)
    return Ratio(base=rows.repeat(base, lengths), gain=rows.repeat(length, lengths))


def token_weight(lengths: Sequence[int], *, aggregation: Literal["token", "sequence", "constant"], tokens: int,
                 sequences: int, constant: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """What each token's loss term counts in the step's sum, (N,), on the CPU.

    lengths (B,) learned tokens per answer of this micro-batch    tokens, sequences: counts of the whole optimizer step
    token     1 / tokens                    every token counts the same (DAPO: arXiv 2503.14476, eq. 8)
    sequence  1 / (sequences * n_i)         every answer counts the same (GRPO: arXiv 2402.03300, eq. 3)
    constant  1 / (sequences * constant)    a sum over the answer; no length of the batch enters (Dr. GRPO: arXiv
              2503.20783, Section 3.2)
    """
    if aggregation == "token":
        return torch.full((sum(lengths),), 1 / tokens, dtype=dtype)
    if aggregation == "constant":
        return torch.full((sum(lengths),), 1 / (sequences * constant), dtype=dtype)
    share = torch.tensor([1 / (sequences * max(n, 1)) for n in lengths], dtype=dtype)
    return rows.repeat(share, lengths)
