"""The value that flows: Problem → Rollout → Batch.

Frozen and keyword-only; a later room adds what it knows with `dataclasses.replace`. Missing is None, never 0.0.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from tinyr2.core.errors import DataError

Author = Literal["student", "teacher", "dataset"]
Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Message:
    """One turn of a chat, raw: no template has touched it.

    Message("user", "What is 2+2?")
    """

    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something to be answered.

    Problem(id="train:17", task="gsm8k", messages=(Message("user", "2+2?"),), answer="4")
    """

    id: str
    task: str
    messages: tuple[Message, ...]  # the prompt; ends with a user turn
    completion: tuple[Message, ...] | None = None  # a worked solution, where the data has one
    answer: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)  # the data's other columns, for reward functions


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One answer to one problem: n response tokens.

    Rollout(problem=p, group=0, sample=2, author="student", prompt_ids=(5, 9), response_ids=(7, 1), finish="stop",
            actor_logp=(-0.1, -0.7), temperature=1.0, policy_version=12)
    """

    problem: Problem
    group: int  # rollouts of one group answer the same problem in the same step
    sample: int  # 0 … G-1 inside the group
    author: Author
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]  # (n,) with the end token, if there was one
    learn_mask: tuple[bool, ...] | None = None  # (n,) None: learn every response token
    actor_logp: tuple[float, ...] | None = None  # (n,) nats at `temperature`; None where no policy of ours sampled
    temperature: float = 1.0
    finish: Finish
    policy_version: int | None = None  # optimizer steps behind the weights that wrote it
    text: str | None = None  # the response without special tokens
    reward: float | None = None  # None: no grader looked, or it could not decide
    reward_parts: Mapping[str, float | None] = field(default_factory=dict)
    right: bool | None = None  # what the verdict, one of the rewards, says; None: undecided, or nobody asked
    advantage: float | None = None  # the centred reward
    # one value per learned token, in nats or in the reward's unit
    old_logp: tuple[float, ...] | None = None  # by the learner's weights when the step began; None: actor_logp is
    reference_logp: tuple[float, ...] | None = None
    values: tuple[float, ...] | None = None  # what the critic expected before the token
    returns: tuple[float, ...] | None = None  # what the critic should have expected
    credit: tuple[float, ...] | None = None  # the token's own advantage, where it is not the whole answer's
    error: str | None = None  # why this rollout leaves the baseline and the loss

    def __post_init__(self):
        for name in ("learn_mask", "actor_logp"):
            value = getattr(self, name)
            if value is not None and len(value) != len(self.response_ids):
                raise DataError(f"{name}: {len(value)} values, {len(self.response_ids)} response tokens")
        for name in ("old_logp", "reference_logp", "values", "returns", "credit"):
            value = getattr(self, name)
            if value is not None and len(value) != self.learned:
                raise DataError(f"{name}: {len(value)} values, {self.learned} learned tokens")

    @property
    def learned(self) -> int:
        """How many of the response tokens are learned."""
        return len(self.response_ids) if self.learn_mask is None else sum(self.learn_mask)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """T packed tokens of B rollouts; the N in `learn` carry gradient.

    Packed "q a e" and "q e": T=5, position=[0,1,2,0,1], lengths=[3,2], learn=[1,2,4], row=[0,0,1].
    `logp[i]` belongs to token `learn[i]`, and comes from the hidden state at `learn[i] - 1`.
    """

    tokens: Tensor  # (T,) int64
    position: Tensor  # (T,) int64, restarts per rollout
    lengths: tuple[int, ...]  # (B,) tokens per rollout; their sum is T
    learn: Tensor  # (N,) int64, indices into T; never the first token of a rollout
    row: Tensor  # (N,) int64, the rollout each learned token belongs to
    on_policy: Tensor  # (N,) bool, the student wrote the token
    right: Tensor  # (N,) bool, the token's answer is known to be right
    actor_logp: Tensor | None = None  # (N,) f32 nats; NaN where no policy of ours sampled the token
    advantage: Tensor | None = None  # (N,) f32; the token's credit, or the rollout's advantage on each of its tokens
    reward: Tensor | None = None  # (N,) f32; the rollout's, on each of its tokens
    old_logp: Tensor | None = None  # (N,) f32 nats, before the step's first update
    reference_logp: Tensor | None = None  # (N,) f32 nats
    values: Tensor | None = None  # (N,) f32, the critic's before the step's first update
    returns: Tensor | None = None  # (N,) f32, its targets
    learner_logp: Tensor | None = None  # (N,) nats, detached, of the weights as they are; where it was asked for
    teacher_gap: Tensor | None = None  # (N,) nats, the teachers' log-prob of the token's span less the learner's
    teacher_entropy: Tensor | None = None  # (N,) nats, of the teacher's distribution; where it was asked for
    divergence_weight: float = 1.0  # of the divergence from the teacher who reads every token

    def __post_init__(self):
        n = len(self.learn)
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in ("tokens", "position", "lengths", "divergence_weight") or value is None:
                continue
            if len(value) != n:
                raise DataError(f"{f.name}: {len(value)} values, {n} learned tokens")
        if sum(self.lengths) != len(self.tokens) or len(self.position) != len(self.tokens):
            raise DataError(f"lengths add up to {sum(self.lengths)}, tokens {len(self.tokens)}, "
                            f"positions {len(self.position)}")

    @property
    def learned(self) -> list[int]:
        """(B,) learned tokens of each rollout."""
        return torch.bincount(self.row, minlength=len(self.lengths)).tolist()

    def select(self, at: Tensor) -> "Batch":
        """The same pack with some of its learned tokens; at (K,) int64 says which of the N."""
        some = {f.name: getattr(self, f.name)[at] for f in fields(self)
                if f.name not in ("tokens", "position", "lengths", "divergence_weight")
                and getattr(self, f.name) is not None}
        return replace(self, **some)

    @property
    def targets(self) -> Tensor:
        """(N,) int64, the learned tokens themselves."""
        return self.tokens[self.learn]
