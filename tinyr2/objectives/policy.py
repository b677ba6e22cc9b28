"""Losses of the tokens that were written. In: tensors over the N learned tokens. Out: a scalar to minimize.

`denom` is the caller's, counted over the whole optimizer step, so micro-batches add up exactly.
"""

import math

from torch import Tensor


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
