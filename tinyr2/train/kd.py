"""Logits distillation on given completions: a soft label from the teacher, a hard one from the data.

In: a batch, the counts of the whole optimizer step, and how far the run is. Out: the two terms of the loss, each an
objective for one walk of the head: the hard one at temperature 1, the soft one at the temperature of the config.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from tinyr2.core.config import Config
from tinyr2.core.types import Batch
from tinyr2.objectives.distillation import by_entropy, linear, soft_hard
from tinyr2.train.loss import Counts, Objective


class KdConfig(Config):
    """soft_weight · T² · divergence at T + hard_weight · cross-entropy (Hinton et al. 2015, section 2).

    by: fixed; linear, to the two `_end`s; entropy, where the less sure the teacher is of a token, the more its hard
    label counts: soft_weight · (1 − H / ln V), and the rest of soft_weight goes to the hard label.
    """

    temperature: float = Field(2.0, gt=0.0)
    soft_weight: float = Field(0.5, ge=0.0)
    hard_weight: float = Field(0.5, ge=0.0)
    by: Literal["fixed", "linear", "entropy"] = "fixed"
    soft_weight_end: float = Field(0.0, ge=0.0)
    hard_weight_end: float = Field(1.0, ge=0.0)

    def weights(self, batch: Batch, vocab: int, progress: float) -> tuple[Tensor | float, Tensor | float]:
        """(soft, hard) for the N tokens when a share `progress` of the steps is done."""
        if self.by == "entropy":
            soft = by_entropy(batch.teacher_entropy, self.soft_weight, vocab)
            return soft, self.hard_weight + self.soft_weight - soft
        if self.by == "fixed":
            return self.soft_weight, self.hard_weight
        return (linear(self.soft_weight, self.soft_weight_end, progress),
                linear(self.hard_weight, self.hard_weight_end, progress))


def hard(kd: KdConfig, batch: Batch, counts: Counts, vocab: int, progress: float) -> Objective:
    """The data's labels: mean over tokens of hard_weight · cross-entropy."""
    _, weight = kd.weights(batch, vocab, progress)
    return lambda s: soft_hard(torch.zeros_like(s.learner_logp), -s.learner_logp, temperature=1.0, soft_weight=0.0,
                               hard_weight=_part(weight, s.part), denom=counts.tokens)


def soft(kd: KdConfig, batch: Batch, counts: Counts, vocab: int, progress: float) -> Objective:
    """The teacher's labels: mean over tokens of soft_weight · T² · divergence."""
    weight, _ = kd.weights(batch, vocab, progress)
    return lambda s: soft_hard(s.divergence, torch.zeros_like(s.learner_logp), temperature=kd.temperature,
                               soft_weight=_part(weight, s.part), hard_weight=0.0, denom=counts.tokens)


def _part(weight: Tensor | float, part: slice) -> Tensor | float:
    return weight[part] if isinstance(weight, Tensor) else weight
