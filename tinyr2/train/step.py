"""One optimizer step's gradient: rollouts in, gradients on the model's parameters and per-token scores out."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tinyr2.core.packing import pack, split
from tinyr2.core.types import Batch, Rollout
from tinyr2.models.head import Head, HeadResult, head_of, run, score_tokens
from tinyr2.models.packed import hidden_states, without_dropout
from tinyr2.objectives.divergence import Divergence
from tinyr2.objectives.spans import span_gap
from tinyr2.teachers.opinion import Judge, Opinion
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
    divergence: Tensor | None  # (N,) nats, the teachers' weighted sum; 0 where none compares distributions
    teacher_logp: Tensor | None  # (N,) nats, of the one teacher that read every token
    loss: float
    teacher_gap: Tensor | None = None  # (N,) nats, the teachers' weighted log-ratio of each token's span
    facts: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # of the teachers: (sum, count) by name

    @classmethod
    def joined(cls, parts: Sequence["Scores"]) -> "Scores":
        """Those of several optimizer steps, as if they had been one; the loss is their mean."""
        rows, before = [], 0
        for part in parts:
            rows.append(part.row + before)
            before += len(part.rollouts)
        streams = ("learner_logp", "entropy", "actor_logp", "divergence", "teacher_logp", "teacher_gap")
        return cls(rollouts=[r for part in parts for r in part.rollouts], row=torch.cat(rows),
                   loss=sum(part.loss for part in parts) / len(parts), facts=_summed([part.facts for part in parts]),
                   **{name: _cat([getattr(part, name) for part in parts]) for name in streams})


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How the rollouts of a step are read, beside the objective."""

    temperature: float = 1.0  # that sampled
    divergence: Divergence | None = None  # from the teachers' distributions
    judge: Judge | None = None  # the teachers
    # what the objective does with divergences, for those of teachers who do not read every token, or are not alone
    compare: Callable[[Batch], Objective] | None = None
    anchor: Callable[[Batch], Objective] | None = None  # the same for those who hold the student back; None: unheard
    teaching_temperature: float | None = None  # divergences have this one, and a walk of their own; None: not so
    teacher_entropy: bool = False  # fill `Batch.teacher_entropy` from the one teacher that compares every token
    shows_states: bool = False  # the judge reads the student's states, so these come first
    apart: Callable[[Rollout], Hashable] | None = None  # rollouts that differ in this share no micro-batch
    score_first: bool = False  # fill `Batch.learner_logp`: for an objective that must know a whole answer's log-prob
    keep_groups: bool = False  # rollouts of one group travel in one micro-batch
    also: Callable[[Batch, Tensor], Tensor] | None = None  # one more loss, of the states (N, D) that predict the tokens
    forward: Callable[[Batch], Tensor] | None = None  # gives the states (N, D) in place of `predicting`


def accumulate(learner: Learner, rollouts: Sequence[Rollout], objective: Callable[[Batch], Objective],
               reading: Reading = Reading()) -> Scores:
    """Add the gradient of the step's loss to the parameters, micro-batch by micro-batch.

    Without rollouts (every one of a step may fail) the loss is 0, no parameter has a gradient, and no score is there.
    """
    head = head_of(learner.model, learner.vocab)
    parts = []
    for some in split(rollouts, learner.tokens_per_micro_batch, keep_groups=reading.keep_groups, apart=reading.apart):
        batch = pack(some, head.weight.device)
        with learner.autocast():
            states, opinions = _read(learner, some, batch, reading)
            batch, first = _heard(batch, states, head, opinions, reading)
            result = run(states, head, batch.targets, objective(batch), **_teaching(first, reading))
            loss, divergence, facts = _compared(result, batch, states, head, first, opinions, reading)
            total = loss if reading.also is None else loss + reading.also(batch, states)
        if total.requires_grad:
            total.backward()
        parts.append((some, batch, replace(result, loss=loss.detach(), divergence=divergence), facts))
    return _join(parts) if parts else _nothing(head.weight.device)


def _read(learner: Learner, some: list[Rollout], batch: Batch, reading: Reading) -> tuple[Tensor, list[Opinion]]:
    """The student's states, and what the teachers say; these first, so that their memory is free again."""
    opinions = []
    if reading.judge is not None and not reading.shows_states:
        opinions = reading.judge(some, batch, None)
    states = predicting(learner, batch) if reading.forward is None else reading.forward(batch)
    if reading.judge is not None and reading.shows_states:
        opinions = reading.judge(some, batch, states.detach())
    return states, opinions


def _heard(batch: Batch, states: Tensor, head: Head, opinions: Sequence[Opinion],
           reading: Reading) -> tuple[Batch, Opinion | None]:
    """The batch with what is known before the loss, and the first opinion that the same walk of the head can read."""
    spoken = [o for o in opinions if o.spoken is not None]
    # the head as the sampler reads it, so that both compute log-probs in one precision
    if reading.score_first or spoken:
        batch = replace(batch, learner_logp=_logp(states, head, batch, reading.temperature))
    if spoken:
        gaps = [o.weight * span_gap(batch.learner_logp, o.spoken.span, o.spoken.logp) for o in spoken]
        batch = replace(batch, teacher_gap=torch.stack(gaps).sum(0) if len(gaps) > 1 else gaps[0])
    first = next((o for o in opinions if o.complete), None)
    if reading.teacher_entropy and first is not None:
        batch = replace(batch, teacher_entropy=_entropy(first, batch, reading))
    if reading.teaching_temperature is not None:
        first = None  # the head walks once for each temperature
    return batch if first is None else replace(batch, divergence_weight=first.weight), first


@torch.no_grad()
def _entropy(opinion: Opinion, batch: Batch, reading: Reading) -> Tensor:
    temperature = reading.teaching_temperature or reading.temperature
    return score_tokens(opinion.whole.hidden, opinion.whole.head, batch.targets, temperature=temperature).entropy


def _teaching(opinion: Opinion | None, reading: Reading) -> dict[str, Any]:
    """What `run` is told of a teacher."""
    if opinion is None:
        return {"temperature": reading.temperature}
    told: dict[str, Any] = {"temperature": reading.teaching_temperature or reading.temperature}
    if opinion.anchor is not None:
        told = {"temperature": reading.temperature}
    divergence = opinion.anchor or reading.divergence
    whole = opinion.whole
    if whole.topk is not None:
        return told | {"divergence": divergence, "teacher_topk": whole.topk}
    if whole.blend is not None:
        return told | {"divergence": divergence, "teacher_blend": whole.blend}
    return told | {"divergence": divergence, "teacher_hidden": whole.hidden, "teacher_head": whole.head,
                   "teacher_pairs": whole.pairs}


def _compared(result: HeadResult, batch: Batch, states: Tensor, head: Head, first: Opinion | None,
              opinions: Sequence[Opinion], reading: Reading) -> tuple[Tensor, Tensor | None, dict]:
    """The loss with the divergences from the other teachers; all of them, weighted, at each token; what each said."""
    facts = [_heard_of(o, batch) for o in opinions]
    loss, divergence = result.loss, result.divergence
    if first is not None and divergence is not None:
        facts.append({f"teacher/{first.name}/kl": _total(divergence)})
    others = [o for o in opinions if o is not first and o.whole is not None
              and (o.anchor is None or reading.anchor is not None)]
    if divergence is not None and batch.divergence_weight != 1.0:
        divergence = divergence * batch.divergence_weight
    if divergence is None and any(o.anchor is None for o in others):
        divergence = torch.zeros_like(result.learner_logp)
    for opinion in others:
        at = opinion.whole.at
        some = batch if at is None else batch.select(at)
        found = run(states if at is None else states[at], head, some.targets,
                    _weighted(opinion.weight, (reading.anchor if opinion.anchor else reading.compare)(some)),
                    **_teaching(opinion, reading))
        loss = loss + found.loss
        if opinion.anchor is None:
            at = slice(None) if at is None else at
            divergence[at] = divergence[at] + opinion.weight * found.divergence
        facts.append({f"teacher/{opinion.name}/kl": _total(found.divergence)})
    return loss, divergence, _summed(facts)


def _heard_of(opinion: Opinion, batch: Batch) -> Mapping[str, tuple[float, float]]:
    """An opinion's own facts; where it speaks of tokens or spans, how far it is from the student, and what it left."""
    if opinion.spoken is None:
        return opinion.facts
    said = opinion.spoken
    named = said.span >= 0
    unknown = float((~said.logp[said.span[named]].isfinite()).sum())
    gap = span_gap(batch.learner_logp, said.span, said.logp)
    once = {f"teacher/{opinion.name}/gap": _total(-gap[named]),
            f"teacher/{opinion.name}/unknown": (unknown, float(named.sum()))}
    return {**opinion.facts, **once}


def _total(values: Tensor) -> tuple[float, float]:
    return float(values.sum()), float(len(values))


def _weighted(weight: float, objective: Objective) -> Objective:
    return lambda scores: weight * objective(scores)


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


def predicting(learner: Learner, batch: Batch) -> Tensor:
    """The states (N, D) that predict the learned tokens."""
    return hidden_states(learner.model, batch.tokens, batch.position, batch.lengths,
                         gradient_checkpointing=learner.gradient_checkpointing)[batch.learn - 1]


@torch.no_grad()
def _logp(states: Tensor, head: Head, batch: Batch, temperature: float) -> Tensor:
    return score_tokens(states, head, batch.targets, temperature=temperature).learner_logp


def _join(parts: list[tuple[list[Rollout], Batch, HeadResult, Mapping[str, tuple[float, float]]]]) -> Scores:
    rollouts = [r for some, *_ in parts for r in some]
    rows, before = [], 0
    for some, batch, *_ in parts:
        rows.append(batch.row + before)
        before += len(some)
    results = [result for _, _, result, _ in parts]
    return Scores(
        rollouts=rollouts, row=torch.cat(rows), loss=sum(float(r.loss) for r in results),
        learner_logp=torch.cat([r.learner_logp for r in results]), entropy=torch.cat([r.entropy for r in results]),
        actor_logp=torch.cat([_or_nan(b.actor_logp, r.learner_logp) for _, b, r, _ in parts]),
        divergence=_or_none([r.divergence for r in results], results),
        teacher_gap=_or_none([b.teacher_gap for _, b, *_ in parts], results),
        teacher_logp=_cat([r.teacher_logp for r in results]),
        facts=_summed([facts for *_, facts in parts]),
    )


def _summed(parts: Sequence[Mapping[str, tuple[float, float]]]) -> dict[str, tuple[float, float]]:
    """Sums and counts added up by name."""
    total: dict[str, tuple[float, float]] = {}
    for part in parts:
        for name, (value, count) in part.items():
            before = total.get(name, (0.0, 0.0))
            total[name] = (before[0] + value, before[1] + count)
    return total


def _nothing(device: torch.device) -> Scores:
    none = torch.zeros(0, device=device)
    return Scores(rollouts=[], row=none.long(), learner_logp=none, entropy=none, actor_logp=none, divergence=None,
                  teacher_logp=None, loss=0.0)


def _or_nan(values: Tensor | None, like: Tensor) -> Tensor:
    return torch.full_like(like, float("nan")) if values is None else values.to(like)


def _or_none(values: list[Tensor | None], results: Sequence[HeadResult]) -> Tensor | None:
    """(N,) of what teachers say, which is 0 where none says anything; None where none does anywhere."""
    if all(v is None for v in values):
        return None
    return torch.cat([torch.zeros_like(r.learner_logp) if v is None else v
                      for v, r in zip(values, results, strict=True)])


def _cat(values: list[Tensor | None]) -> Tensor | None:
    return None if any(v is None for v in values) else torch.cat(values)
