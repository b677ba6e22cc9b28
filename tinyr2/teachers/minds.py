"""Where a teacher's knowledge sits: in this process, swapped in for a moment, or behind a server.

In: papers, as rollouts in the teacher's own ids. Out: the states or the log-probs of their response tokens.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from tinyr2.core.packing import pack, split
from tinyr2.core.types import Batch, Rollout
from tinyr2.models.head import Head, TopK, score_tokens
from tinyr2.models.packed import without_dropout
from tinyr2.teachers.local import Teacher, states_of


@dataclass(frozen=True, kw_only=True)
class Thoughts:
    """Of the n learned tokens of some papers, end to end: states and a head, log-probs, or lists of a server."""

    hidden: Tensor | None = None  # (n, D)
    head: Head | None = None
    said: Tensor | None = None  # (n,) f32 nats, NaN: unknown; where there are no states
    topk: TopK | None = None  # the likeliest tokens at the K tokens of `at`, in place of all these
    at: Tensor | None = None  # (K,) int64, which of the n

    def logp(self, targets: Tensor, temperature: float) -> Tensor:
        """(n,) nats of the tokens themselves."""
        if self.hidden is None:
            assert self.said is not None, "lists do not name every token"
            return self.said
        return score_tokens(self.hidden, self.head, targets, temperature=temperature).learner_logp


class Mind(Protocol):
    """What a teacher thinks with."""

    def visit(self, papers: Sequence[Rollout]) -> None:
        """Before a step's micro-batches: all its papers, for those who cannot be asked in between."""

    def think(self, papers: Sequence[Rollout], batch: Batch) -> Thoughts:
        """Of a micro-batch; `batch` holds the same papers, packed."""


@dataclass
class Resident:
    """A model that stays beside the learner."""

    teacher: Teacher

    def visit(self, papers: Sequence[Rollout]) -> None:
        """Nothing is needed ahead of time."""

    @torch.no_grad()
    def think(self, papers: Sequence[Rollout], batch: Batch) -> Thoughts:
        """States at the learned tokens; without dropout, also where the teacher is the student that learns."""
        with without_dropout(self.teacher.model):
            return Thoughts(hidden=states_of(self.teacher, batch), head=self.teacher.head)


@dataclass
class Visitor:
    """A model that is loaded once per step, reads all its papers, and leaves: its states and its head stay.

    After DeepSeek-V4 (arXiv 2606.19348): hidden states are cached, and no logits.
    """

    load: Callable[[], Teacher]
    tokens_per_micro_batch: int
    _head: Head | None = field(default=None, init=False)
    _states: dict[int, Tensor] = field(default_factory=dict, init=False)

    @torch.no_grad()
    def visit(self, papers: Sequence[Rollout]) -> None:
        """Read every paper; those of the step before are forgotten."""
        self._states = {}
        if not papers:
            return
        teacher = self.load()
        head = teacher.head
        self._head = Head(head.weight.clone(), None if head.bias is None else head.bias.clone(), head.scale,
                          head.softcap)
        for some in split(papers, self.tokens_per_micro_batch):
            batch = pack(some, head.weight.device)
            states = states_of(teacher, batch)
            self._states |= {id(r): part for r, part in zip(some, states.split(batch.learned), strict=True)}

    def think(self, papers: Sequence[Rollout], batch: Batch) -> Thoughts:
        """The states that the visit left."""
        return Thoughts(hidden=torch.cat([self._states[id(r)] for r in papers]), head=self._head)


@dataclass
class Distant:
    """A server: `ask` gives, for (prompt, response) pairs in its ids, the log-probs of each response's tokens."""

    ask: Callable[[Sequence[tuple[tuple[int, ...], tuple[int, ...]]]], Iterable[Sequence[float | None]]]
    _said: dict[int, tuple[float, ...]] = field(default_factory=dict, init=False)

    def visit(self, papers: Sequence[Rollout]) -> None:
        """Ask for all papers of the step at once. What is not said is NaN."""
        said = self.ask([(r.prompt_ids, r.response_ids) for r in papers]) if papers else []
        self._said = {}
        for r, values in zip(papers, said, strict=True):
            mask = r.learn_mask or (True,) * len(r.response_ids)
            self._said[id(r)] = tuple(float("nan") if v is None else v
                                      for v, learned in zip(values, mask, strict=True) if learned)

    def think(self, papers: Sequence[Rollout], batch: Batch) -> Thoughts:
        """What the server said."""
        values = [v for r in papers for v in self._said[id(r)]]
        return Thoughts(said=torch.tensor(values, dtype=torch.float32, device=batch.tokens.device))


Row = tuple[tuple[int, float], ...] | None  # a token's likeliest, (id, nats); None: the server did not say


@dataclass
class Listing:
    """A server that names its k likeliest tokens: `ask` gives a row for each token of each response; None: no row.

    Ids beyond the vocabulary, which a padded head may name, are left to the tail.
    """

    ask: Callable[[Sequence[tuple[tuple[int, ...], tuple[int, ...]]]], Iterable[Sequence[Row] | None]]
    k: int
    vocab: int
    tail: Literal["bucket", "none"] = "bucket"
    _rows: dict[int, list[Row]] = field(default_factory=dict, init=False)

    def visit(self, papers: Sequence[Rollout]) -> None:
        """Ask for all papers of the step at once."""
        told = self.ask([(r.prompt_ids, r.response_ids) for r in papers]) if papers else []
        self._rows = {}
        for r, rows in zip(papers, told, strict=True):
            rows = (None,) * len(r.response_ids) if rows is None else rows
            mask = r.learn_mask or (True,) * len(r.response_ids)
            self._rows[id(r)] = [row for row, learned in zip(rows, mask, strict=True) if learned]

    def think(self, papers: Sequence[Rollout], batch: Batch) -> Thoughts:
        """The lists, each k long: what is missing has log-prob -inf."""
        rows = [row for r in papers for row in self._rows[id(r)]]
        known = [[entry for entry in row or () if entry[0] < self.vocab] for row in rows]
        empty = [(0, -math.inf)] * self.k
        listed = torch.tensor([(row + empty)[:self.k] for row in known], dtype=torch.float64).view(len(rows), self.k, 2)
        ids, logp = listed[..., 0].long(), listed[..., 1].float()  # ids are exact in float64
        at = (logp > -math.inf).any(-1).nonzero()[:, 0]
        ids, logp, at = (x.to(batch.tokens.device) for x in (ids[at], logp[at], at))
        return Thoughts(topk=TopK(ids, logp, self.tail), at=at)
