"""What is minimized: a config, and the per-chunk objective that it means for one micro-batch.

In: a batch and the counts of the whole optimizer step. Out: a function from token scores to a scalar, which
`models.head.run` calls chunk by chunk. Every denominator is a count over the step, so micro-batches add up exactly.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor

from tinyr2.core.config import Config
from tinyr2.core.types import Batch, Rollout
from tinyr2.models.head import TokenScores
from tinyr2.objectives.distillation import linear
from tinyr2.objectives.divergence import Divergence
from tinyr2.objectives.policy import sampled_reverse_kl, truncated_importance, weighted_nll
from tinyr2.objectives.spans import position_weight

Objective = Callable[[TokenScores], Tensor]
Weigh = Callable[[TokenScores], Tensor]  # (n,) a factor for each token's term


class LossConfig(Config):
    """Token-level or sequence-level on-policy distillation."""

    level: Literal["token", "sequence"] = "token"
    divergence: Divergence = Divergence()
    # token level: the divergence over the full vocabulary, or its policy-gradient form on the sampled token
    estimator: Literal["full", "sampled"] = "full"
    # sequence level: reward_weight · L_reward + kl_weight · divergence, kl_weight going linearly to kl_weight_end
    reward_loss: Literal["reinforce", "weighted_nll"] = "reinforce"
    reward_weight: float = Field(0.8, ge=0)
    kl_weight: float = Field(0.2, ge=0)
    kl_weight_end: float = Field(0.05, ge=0)
    position_weight: float = Field(0.0, ge=0)  # IW-OPD's gamma: how much more the first tokens of an answer count

    @model_validator(mode="after")
    def _sampled_is_reverse(self) -> "LossConfig":
        if self.position_weight and (self.level != "token" or self.estimator != "sampled"):
            raise ValueError("position_weight weighs the terms of level: token with estimator: sampled (IW-OPD); set "
                             "these two, or position_weight to 0")
        if self.estimator == "sampled" and self.level == "sequence":
            raise ValueError("estimator: sampled is a token-level form; with level: sequence leave it at full")
        if self.estimator == "sampled" and self.divergence.kind != "reverse_kl":
            raise ValueError("estimator: sampled estimates the reverse KL only; set divergence.kind to reverse_kl or "
                             "estimator to full")
        return self

    def kl_weight_at(self, progress: float) -> float:
        """The weight of the divergence when a share `progress` of the steps is done."""
        return linear(self.kl_weight, self.kl_weight_end, progress)


@dataclass(frozen=True)
class Counts:
    """What a step's losses are divided by: learned tokens, sequences, and the sequences that the student wrote."""

    tokens: int
    sequences: int
    student_sequences: int


def count(rollouts: Sequence[Rollout]) -> Counts:
    """Counts over all rollouts of one optimizer step."""
    learned = [len(r.response_ids) if r.learn_mask is None else sum(r.learn_mask) for r in rollouts]
    own = sum(r.author == "student" for r in rollouts)
    return Counts(tokens=sum(learned), sequences=len(rollouts), student_sequences=own)


def likelihood(counts: Counts) -> Objective:
    """Supervised fine-tuning: mean negative log-likelihood per learned token."""
    return lambda s: weighted_nll(s.learner_logp, denom=counts.tokens)


def importance(batch: Batch, cap: float | None) -> Weigh | None:
    """The weights of tokens that were sampled in another precision than they are learned in.

    cap: None where both have one precision; then, and where no policy of ours sampled, nothing is weighed.
    """
    actor_logp = batch.actor_logp
    if cap is None or actor_logp is None:
        return None
    return lambda s: truncated_importance(s.learner_logp, actor_logp[s.part], cap)


def token_distillation(loss: LossConfig, batch: Batch, counts: Counts, weigh: Weigh | None = None) -> Objective:
    """Mean per learned token of the divergence from the teachers, and of its policy-gradient form.

    Teachers that compare distributions give the first, those that know log-probs of tokens or spans (`teacher_gap`) the
    second; both are nats of a KL.
    """
    gap, scale = batch.teacher_gap, batch.divergence_weight
    if gap is not None:  # a policy gradient of what the student did not sample would teach anything
        gap = gap * batch.on_policy
    if gap is not None and loss.position_weight:
        gap = gap * position_weight(gap, batch.learned, loss.position_weight)

    def objective(s: TokenScores) -> Tensor:
        total, weight = None, weigh and weigh(s)
        if loss.estimator == "full" and s.divergence is not None:
            divergence = s.divergence if weight is None else weight * s.divergence
            total = divergence.sum() / counts.tokens
        elif loss.estimator == "sampled" and s.teacher_logp is not None:
            total = sampled_reverse_kl(s.learner_logp, s.teacher_logp, weight, denom=counts.tokens)
        if total is not None and scale != 1.0:
            total = scale * total
        if gap is not None:
            said = gap[s.part] if weight is None else weight * gap[s.part]
            spoken = weighted_nll(s.learner_logp, said, denom=counts.tokens)
            total = spoken if total is None else total + spoken
        return _nothing_said(s) if total is None else total

    return objective


def sequence_distillation(loss: LossConfig, batch: Batch, counts: Counts, progress: float,
                          weigh: Weigh | None = None) -> Objective:
    """reward_weight · L_reward + kl_weight · divergence on what the student wrote.

    Both are sums over a sequence's tokens and means over sequences: nats per answer beside reward per answer, so that
    the two weights compare like with like. With on-policy samples the expected gradient of L_reward is that of
    −E[reward] (REINFORCE; Williams 1992, with the leave-one-out baseline of Kool et al. 2019). The divergence is that
    of each token's distributions, or the policy gradient of what teachers say of spans; the sampling is held constant,
    and `weigh` leaves it alone. A rollout without a verdict has weight 0 in L_reward, and keeps its divergence.
    """
    credit = batch.advantage if loss.reward_loss == "reinforce" else batch.reward
    compared = sequence_divergence(loss, batch, counts, progress)
    kl_weight, gap, scale = loss.kl_weight_at(progress), batch.teacher_gap, batch.divergence_weight

    def objective(s: TokenScores) -> Tensor:
        total = _nothing_said(s) if s.divergence is None else scale * compared(s)
        if gap is not None:
            said = gap[s.part] * batch.on_policy[s.part]
            total = total + kl_weight * weighted_nll(s.learner_logp, said, denom=max(1, counts.student_sequences))
        if credit is None:
            return total
        weight = credit[s.part].nan_to_num(0.0)
        weight = weight if weigh is None else weight * weigh(s)
        return total + loss.reward_weight * weighted_nll(s.learner_logp, weight, denom=counts.sequences)

    return objective


def token_divergence(counts: Counts, weigh: Weigh | None = None) -> Objective:
    """The part of `token_distillation` that reads divergences, of weight 1."""
    if weigh is None:
        return lambda s: s.divergence.sum() / counts.tokens
    return lambda s: (weigh(s) * s.divergence).sum() / counts.tokens


def sequence_divergence(loss: LossConfig, batch: Batch, counts: Counts, progress: float) -> Objective:
    """The part of `sequence_distillation` that reads divergences, of weight 1."""
    kl_weight = loss.kl_weight_at(progress)
    return lambda s: kl_weight * (s.divergence * batch.on_policy[s.part]).sum() / max(1, counts.student_sequences)


def _nothing_said(scores: TokenScores) -> Tensor:
    """0, where no teacher has anything to say."""
    return scores.learner_logp.new_zeros(())
