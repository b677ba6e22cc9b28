"""Numbers of a policy-gradient step, under TRL's names where the meaning is the same.

In: scores, losses and what was collected. Out: flat mappings of floats; every mean is over tokens, not over batches.
"""

from collections import defaultdict
from dataclasses import dataclass, field

import torch

from tinyr2.objectives import kl as kls
from tinyr2.objectives.policy import clipped, sequence_ratio
from tinyr2.train.collect import Collection
from tinyr2.train.credit import old_logp
from tinyr2.train.policy_loss import PolicyLoss
from tinyr2.train.step import Scores


@dataclass
class UpdateMetrics:
    """Sums and counts over all updates of a step."""

    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, scores: Scores, loss: PolicyLoss) -> None:
        """What one update's clip removed, and how far the policy is from the reference."""
        known = [r for r in scores.rollouts if r.credit is not None]
        assert len(known) == len(scores.rollouts), "what is learned from has credit"
        logp = scores.learner_logp
        credit = torch.tensor([c for r in known for c in r.credit]).to(logp)
        low, high = clipped(self._log_ratio(scores, loss), credit, loss.config.epsilon,
                            loss.config.epsilon_high or loss.config.epsilon)
        for name, mask in (("low", low), ("high", high), ("region", low | high)):
            self.note(f"clip_ratio/{name}_mean", float(mask.sum()), len(mask))
        if all(r.reference_logp is not None for r in known):
            reference = torch.tensor([v for r in known for v in r.reference_logp]).to(logp)
            self.note("kl", float(kls.estimate("k3", logp, reference).double().sum()), len(logp))

    def means(self) -> dict[str, float]:
        """Over all tokens of all updates."""
        return {name: total / self.counts[name] for name, total in self.sums.items()}

    def note(self, name: str, total: float, count: int) -> None:
        """Add `count` tokens' values, whose sum is `total`."""
        self.sums[name] += total
        self.counts[name] += count

    @staticmethod
    def _log_ratio(scores: Scores, loss: PolicyLoss) -> torch.Tensor:
        logp = scores.learner_logp
        if loss.corrects and any(r.old_logp is None for r in scores.rollouts):
            return torch.zeros_like(logp)  # one update: the learner is its own old policy
        old = torch.tensor([v for r in scores.rollouts for v in old_logp(r)]).to(logp)
        if loss.config.ratio == "token":
            return logp - old
        lengths = [r.learned for r in scores.rollouts]
        return sequence_ratio(logp, old, lengths, level=loss.config.ratio).base


def collection_metrics(found: Collection, kept: int) -> dict[str, float]:
    """How the step's groups were come by, and what share of the rollouts cannot be learned from.

    kept: rollouts, of those collected, that have a verdict and a baseline
    """
    decided = sum(r.reward is not None and r.error is None for r in found.written)
    out = {"sampling/rounds": float(found.rounds), "sampling/equal_groups_ratio": found.equal / found.groups,
           "sampling/kept_groups_ratio": len({r.group for r in found.kept}) / found.groups,
           "rollouts/dropped_ratio": 1 - decided / len(found.written), "rollouts/learned": float(kept)}
    return out
