"""One optimizer step's gradient: rollouts in, gradients on the model's parameters and per-token scores out."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tinyr2.core.types import Batch, Rollout
from tinyr2.data.packing import pack, split
from tinyr2.models.head import Head, HeadResult, TokenScores, head_of, run
from tinyr2.models.packed import hidden_states
from tinyr2.objectives.divergence import Divergence
from tinyr2.teachers.local import Teacher, consult
from tinyr2.train.loss import Objective


@dataclass(frozen=True, kw_only=True)
class Learner:
    """The model being trained and how its forward runs."""

    model: nn.Module
    vocab: int
    tokens_per_micro_batch: int
    autocast: Callable[[], AbstractContextManager] = nullcontext
    gradient_checkpointing: bool = False  # keep each layer's input alone, and compute the rest again

    @property
    def dtype(self) -> torch.dtype:
        """Of its matrix products; the head's log-probs are float32 in any case."""
        weight = self.model.get_output_embeddings().weight
        kind = weight.device.type
        with self.autocast():
            return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


@dataclass(frozen=True)
class Scores:
    """What the forward saw, detached: one value per learned token, in the order of `rollouts`."""

    rollouts: list[Rollout]  # in the order in which they were packed
    row: Tensor  # (N,) the rollout of each token
    learner_logp: Tensor  # (N,) nats
    entropy: Tensor  # (N,) nats
    actor_logp: Tensor  # (N,) nats; NaN where no policy of ours sampled the token
    divergence: Tensor | None  # (N,) nats
    teacher_logp: Tensor | None  # (N,) nats
    loss: float

    @classmethod
    def joined(cls, parts: Sequence["Scores"]) -> "Scores":
        """Those of several optimizer steps, as if they had been one; the loss is their mean."""
        rows, before = [], 0
        for part in parts:
            rows.append(part.row + before)
            before += len(part.rollouts)
        streams = ("learner_logp", "entropy", "actor_logp", "divergence", "teacher_logp")
        return cls(rollouts=[r for part in parts for r in part.rollouts], row=torch.cat(rows),
                   loss=sum(part.loss for part in parts) / len(parts),
                   **{name: _cat([getattr(part, name) for part in parts]) for name in streams})


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How the rollouts of a step are read, beside the objective."""

    temperature: float = 1.0  # that sampled
    divergence: Divergence | None = None
    teacher: Teacher | None = None
    score_first: bool = False  # fill `Batch.learner_logp`: for an objective that must know a whole answer's log-prob
    keep_groups: bool = False  # rollouts of one group travel in one micro-batch
    also: Callable[[Batch, Tensor], Tensor] | None = None  # one more loss, of the states (N, D) that predict the tokens


def accumulate(learner: Learner, rollouts: Sequence[Rollout], objective: Callable[[Batch], Objective],
               reading: Reading = Reading()) -> Scores:
    """Add the gradient of the step's loss to the parameters, micro-batch by micro-batch.

    Without rollouts (every one of a step may fail) the loss is 0, no parameter has a gradient, and no score is there.
    """
    head = head_of(learner.model, learner.vocab)
    teacher, parts = reading.teacher, []
    for some in split(rollouts, learner.tokens_per_micro_batch, keep_groups=reading.keep_groups):
        batch = pack(some, head.weight.device)
        with learner.autocast():
            if teacher is not None:
                batch = consult(teacher, batch)
            states = predicting(learner, batch)
            # the head as the sampler reads it, so that both compute log-probs in one precision
            if reading.score_first:
                batch = replace(batch, learner_logp=_logp(states, head, batch, reading.temperature))
            result = run(states, head, batch.targets, objective(batch), temperature=reading.temperature,
                         divergence=reading.divergence, teacher_hidden=batch.teacher_hidden,
                         teacher_head=teacher.head if teacher else None)
            loss = result.loss if reading.also is None else result.loss + reading.also(batch, states)
        if loss.requires_grad:
            loss.backward()
        parts.append((some, batch, result))
    return _join(parts) if parts else _nothing(head.weight.device)


@torch.no_grad()
def score(learner: Learner, rollouts: Sequence[Rollout], temperature: float = 1.0) -> list[tuple[float, ...]]:
    """The log-probs (n,) in nats that the model gives to each rollout's learned tokens, rollout by rollout."""
    head = head_of(learner.model, learner.vocab)
    return per_rollout(learner, rollouts, lambda batch: _logp(predicting(learner, batch), head, batch, temperature))


@torch.no_grad()
def per_rollout(learner: Learner, rollouts: Sequence[Rollout],
                measure: Callable[[Batch], Tensor]) -> list[tuple[float, ...]]:
    """What `measure` finds for the learned tokens (N,) of each micro-batch, given back rollout by rollout."""
    device = next(learner.model.parameters()).device
    found: dict[int, tuple[float, ...]] = {}
    for some in split(rollouts, learner.tokens_per_micro_batch):
        batch = pack(some, device)
        with learner.autocast(), without_dropout(learner.model):
            values = measure(batch)
        for r, part in zip(some, values.split(batch.learned), strict=True):
            found[id(r)] = tuple(part.tolist())
    return [found[id(r)] for r in rollouts]


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """In eval mode, as it was sampled from; and back."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def predicting(learner: Learner, batch: Batch) -> Tensor:
    """The states (N, D) that predict the learned tokens."""
    return hidden_states(learner.model, batch.tokens, batch.position, batch.lengths,
                         gradient_checkpointing=learner.gradient_checkpointing)[batch.learn - 1]


@torch.no_grad()
def _logp(states: Tensor, head: Head, batch: Batch, temperature: float) -> Tensor:
    return run(states.detach(), head, batch.targets, _no_loss, temperature=temperature).learner_logp


def _no_loss(scores: TokenScores) -> Tensor:
    return scores.learner_logp.new_zeros(())


def _join(parts: list[tuple[list[Rollout], Batch, HeadResult]]) -> Scores:
    rollouts = [r for some, _, _ in parts for r in some]
    rows, before = [], 0
    for some, batch, _ in parts:
        rows.append(batch.row + before)
        before += len(some)
    results = [result for _, _, result in parts]
    return Scores(
        rollouts=rollouts, row=torch.cat(rows), loss=sum(float(r.loss.detach()) for r in results),
        learner_logp=torch.cat([r.learner_logp for r in results]), entropy=torch.cat([r.entropy for r in results]),
        actor_logp=torch.cat([_or_nan(b.actor_logp, r.learner_logp) for _, b, r in parts]),
        divergence=_cat([r.divergence for r in results]), teacher_logp=_cat([r.teacher_logp for r in results]),
    )


def _nothing(device: torch.device) -> Scores:
    none = torch.zeros(0, device=device)
    return Scores(rollouts=[], row=none.long(), learner_logp=none, entropy=none, actor_logp=none, divergence=None,
                  teacher_logp=None, loss=0.0)


def _or_nan(values: Tensor | None, like: Tensor) -> Tensor:
    return torch.full_like(like, float("nan")) if values is None else values.to(like)


def _cat(values: list[Tensor | None]) -> Tensor | None:
    return None if any(v is None for v in values) else torch.cat(values)
