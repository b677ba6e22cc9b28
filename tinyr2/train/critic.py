"""The critic: what reward is still to come, guessed before every token.

In: rollouts. Out: their values; and, with targets, the gradient of the value loss. A critic has a body of its own, or
sits on the policy's; either way its `score` is a linear layer over last hidden states, zero at first.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from tinyr2.core.config import Config
from tinyr2.core.packing import pack, split
from tinyr2.core.types import Batch, Rollout
from tinyr2.models.packed import hidden_states, without_dropout
from tinyr2.models.scalar import scalars
from tinyr2.objectives.policy import token_weight
from tinyr2.objectives.value import explained_variance, value_loss
from tinyr2.train.step import Learner, predicting


class ValueConfig(Config):
    """The critic, and how it learns."""

    trunk: Literal["separate", "shared"] = "separate"  # a body of its own, or the policy's
    path: str | None = None  # where a separate body begins: a reward model, or None, the policy's own folder
    lam: float = Field(1.0, ge=0, le=1)  # of the critic's targets; the policy's is advantage.lam
    clip: float | None = Field(0.2, gt=0)  # how far a step's updates may move a value; None: any far
    weight: float = Field(0.5, gt=0)  # of the value loss; in a shared trunk beside the policy's
    learning_rate_factor: float = Field(1.0, gt=0)  # times train.learning_rate; a separate body's and the score's
    num_iterations: int = Field(1, ge=1)  # passes over a step's rollouts; a shared trunk's are the policy's
    num_mini_batches: int = Field(1, ge=1)  # optimizer steps a pass
    pretrain_steps: int = Field(0, ge=0)  # at most so many first steps in which the critic learns and the policy waits
    pretrain_until: float = Field(0.5, le=1)  # explained variance of a step's fresh answers that ends them


class ValueHead(nn.Module):
    """A zero `score` over a body's hidden states."""

    def __init__(self, width: int):
        super().__init__()
        self.score = nn.Linear(width, 1, bias=False)
        nn.init.zeros_(self.score.weight)

    def get_input_embeddings(self) -> None:
        """None: those are the body's."""

    def get_output_embeddings(self) -> None:
        """None: a critic writes nothing."""


@dataclass(frozen=True, kw_only=True)
class Critic:
    """What reads values: `body` runs the forward, `head` has the score."""

    body: Learner
    head: nn.Module

    def of_states(self, states: Tensor) -> Tensor:
        """states (n, D) → values (n,)."""
        return scalars(self.head, states)


@torch.no_grad()
def assess(critic: Critic, rollouts: Sequence[Rollout]) -> tuple[list[Rollout], list[float]]:
    """The rollouts with `values` (n,), and the value (B,) after each one's last token."""
    device, found = next(critic.head.parameters()).device, {}
    for some in split(rollouts, critic.body.tokens_per_micro_batch):
        batch = pack(some, device)
        with critic.body.autocast(), without_dropout(critic.body.model):
            states = hidden_states(critic.body.model, batch.tokens, batch.position, batch.lengths)
        ends = torch.tensor(batch.lengths, device=device).cumsum(0) - 1
        values, after = critic.of_states(states[batch.learn - 1]), critic.of_states(states[ends])
        for r, part, last in zip(some, values.split(batch.learned), after.tolist(), strict=True):
            found[id(r)] = replace(r, values=tuple(part.tolist())), last
    return [found[id(r)][0] for r in rollouts], [found[id(r)][1] for r in rollouts]


def accumulate_value(critic: Critic, rollouts: Sequence[Rollout], config: ValueConfig) -> float:
    """Add the value loss's gradient (mean over the step's tokens) to a separate critic; returns the loss."""
    tokens, total = sum(r.learned for r in rollouts), 0.0
    for some in split(rollouts, critic.body.tokens_per_micro_batch):
        batch = pack(some, next(critic.head.parameters()).device)
        with critic.body.autocast():
            states = predicting(critic.body, batch)
        loss = loss_of(critic, batch, states, config, tokens)
        loss.backward()
        total += float(loss.detach())
    return total


def loss_of(critic: Critic, batch: Batch, states: Tensor, config: ValueConfig, tokens: int) -> Tensor:
    """The value loss of one micro-batch, a scalar with its gradient; `tokens` counts the whole optimizer step."""
    weight = token_weight(batch.learned, aggregation="token", tokens=tokens, sequences=1).to(states.device)
    values = critic.of_states(states)
    return config.weight * value_loss(values, batch.values, batch.returns, weight, clip=config.clip)


def fit(rollouts: Sequence[Rollout]) -> float | None:
    """Explained variance of fresh values by their targets, over all learned tokens; None where targets are equal."""
    values, returns = (torch.tensor([v for r in rollouts for v in getattr(r, name)]) for name in ("values", "returns"))
    return explained_variance(values, returns)
