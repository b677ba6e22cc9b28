"""What a policy-gradient step minimizes: a config, and the per-chunk objective that it means for one micro-batch.

In: a batch with its credit, and the counts of the whole optimizer step. Out: a function from token scores to a scalar.
Clip × ratio × aggregation × KL × importance correction are independent choices; `train/presets.py` names points.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor

from tinyr2.core.config import Config
from tinyr2.core.types import Batch, Rollout
from tinyr2.models.head import TokenScores
from tinyr2.objectives import kl as kls
from tinyr2.objectives.divergence import Divergence
from tinyr2.objectives.policy import Ratio, clipped_surrogate, importance_weight, sequence_ratio, token_weight
from tinyr2.train.credit import KlConfig
from tinyr2.train.loss import Objective


class ImportanceConfig(Config):
    """What corrects for an actor whose log-probs are not the learner's: weights π_old/π_actor, bounded."""

    # auto: truncate at token level where decoding or learning is in bfloat16, else none
    mode: Literal["auto", "none", "truncate", "mask"] = "auto"
    level: Literal["token", "sequence"] = "token"  # sequence: the product of an answer's ratios
    cap: float = Field(2.0, gt=0)
    floor: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> "ImportanceConfig":
        if self.floor >= self.cap:
            raise ValueError(f"floor {self.floor} is not below cap {self.cap}")
        return self


class OpdConfig(Config):
    """A teacher's word beside the reward."""

    weight: float = Field(1.0, gt=0)
    # advantage: weight · (log π_teacher − log π_old) is added to each token's credit; loss: weight · divergence
    place: Literal["advantage", "loss"] = "loss"
    divergence: Divergence = Divergence()  # read where place is loss


class PolicyLossConfig(Config):
    """How advantages become a loss; names are TRL's where it has them."""

    ratio: Literal["token", "sequence_mean", "sequence"] = "token"  # π/π_old of what is clipped
    epsilon: float = Field(0.2, gt=0)  # the ratio is not rewarded for going below 1 − epsilon
    epsilon_high: float | None = Field(None, gt=0)  # nor above 1 + epsilon_high; None: epsilon
    delta: float | None = Field(None, gt=1)  # dual clip: with a negative advantage the ratio counts as this at most
    # token: mean over tokens; sequence: mean over answers of their token means; constant: sum over an answer's tokens,
    # divided by `constant`, mean over answers
    aggregation: Literal["token", "sequence", "constant"] = "token"
    constant: float | None = Field(None, gt=0)  # None: rollout.max_completion_length
    positive_nll: float = Field(0.0, ge=0)  # weight of the likelihood of right answers (VAPO)
    mask_truncated_completions: bool = False  # answers that were cut off stay in the baseline and leave the loss (DAPO)
    importance: ImportanceConfig = ImportanceConfig()


@dataclass(frozen=True)
class StepCounts:
    """What one optimizer step's losses are divided by."""

    tokens: int
    sequences: int
    right_tokens: int  # of right answers

    @classmethod
    def of(cls, rollouts: Sequence[Rollout]) -> "StepCounts":
        """Counts over all rollouts of one optimizer step."""
        return cls(sum(r.learned for r in rollouts), len(rollouts), sum(r.learned for r in rollouts if r.right))


@dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """The loss of one optimizer step."""

    config: PolicyLossConfig
    kl: KlConfig
    counts: StepCounts
    constant: float  # what aggregation `constant` divides by
    opd: OpdConfig | None = None
    corrects: bool = False  # for an actor that is not the learner

    @property
    def score_first(self) -> bool:
        """Whether whole answers must be scored before any token's term is known."""
        return self.config.ratio != "token" or (self.corrects and self.config.importance.level == "sequence")

    def on(self, batch: Batch) -> Objective:
        """The objective of one micro-batch."""
        weight = self._weight(batch)
        nll = self.config.positive_nll * batch.right.float() / max(1, self.counts.right_tokens)
        ratio = None
        if self.config.ratio != "token":
            ratio = sequence_ratio(batch.learner_logp, self._old(batch, batch.learner_logp), batch.learned,
                                   level=self.config.ratio)
        known = self._correction(batch, batch.learner_logp) if batch.learner_logp is not None else None

        def objective(s: TokenScores) -> Tensor:
            part, logp = s.part, s.learner_logp
            log_ratio = self._log_ratio(batch, ratio, s)
            terms = clipped_surrogate(log_ratio, batch.advantage[part], low=self.config.epsilon,
                                      high=self.config.epsilon_high or self.config.epsilon, dual=self.config.delta)
            factor = known[part] if known is not None else self._correction(batch, logp, part)
            terms = terms if factor is None else terms * factor
            if self.kl.place == "loss" and self.kl.beta:
                terms = terms + self._penalty(batch, s)
            if self.opd is not None and self.opd.place == "loss":
                terms = terms + self.opd.weight * s.divergence
            return (terms * weight[part]).sum() - (nll[part] * logp).sum()

        return objective

    def _weight(self, batch: Batch) -> Tensor:
        return token_weight(batch.learned, aggregation=self.config.aggregation, tokens=self.counts.tokens,
                            sequences=self.counts.sequences, constant=self.constant).to(batch.tokens.device)

    def _old(self, batch: Batch, learner_logp: Tensor, part: slice = slice(None)) -> Tensor:
        """log π_old: what was scored before the first update, or what the actor said, which is the same where both
        compute alike; where they do not and there is but one update, the learner's own."""
        if batch.old_logp is not None:
            return batch.old_logp[part]
        return learner_logp.detach() if self.corrects else batch.actor_logp[part]

    def _log_ratio(self, batch: Batch, ratio: Ratio | None, s: TokenScores) -> Tensor:
        if ratio is not None:
            return ratio.log_ratio(s.learner_logp, s.part)
        return s.learner_logp - self._old(batch, s.learner_logp, s.part)

    def _correction(self, batch: Batch, learner_logp: Tensor, part: slice = slice(None)) -> Tensor | None:
        """(n,) importance weights; at sequence level for the whole micro-batch alone."""
        chosen = self.config.importance
        if not self.corrects:
            return None
        gap = self._old(batch, learner_logp, part) - batch.actor_logp[part]
        lengths = batch.learned if chosen.level == "sequence" else [len(gap)]
        mode = "mask" if chosen.mode == "mask" else "truncate"
        return importance_weight(gap.detach(), lengths, level=chosen.level, mode=mode, cap=chosen.cap,
                                 floor=chosen.floor)

    def _penalty(self, batch: Batch, s: TokenScores) -> Tensor:
        """(n,) β · KL of each token, times its own ratio where that is asked for."""
        estimate = kls.estimate(self.kl.estimator, s.learner_logp, batch.reference_logp[s.part])
        if self.kl.ratio:
            estimate = estimate * (s.learner_logp - self._old(batch, s.learner_logp, s.part)).exp()
        return self.kl.beta * estimate
