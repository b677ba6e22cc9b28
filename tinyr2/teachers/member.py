"""One teacher of a panel at work: what it reads, what it thinks of it, and what the student is told.

In: the rollouts of a step, then its micro-batches. Out: an opinion of each micro-batch, or none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tinyr2.core.packing import pack
from tinyr2.core.types import Batch, Rollout
from tinyr2.models.head import Head
from tinyr2.models.pairs import Pairs
from tinyr2.objectives.distillation import linear
from tinyr2.objectives.divergence import Divergence
from tinyr2.teachers.boundaries import Boundaries
from tinyr2.teachers.marginal import Marginal
from tinyr2.teachers.minds import Mind, Thoughts
from tinyr2.teachers.opinion import Opinion, Spoken, Whole
from tinyr2.teachers.views import Paper, View, as_rollout
from tinyr2.tokens.align import Spans

Signal = Literal["exact", "chunk", "chunk_debiased", "mapped", "marginal"]


@dataclass(frozen=True, kw_only=True)
class Seat:
    """A teacher's place in the panel."""

    name: str
    tasks: frozenset[str] | None = None  # whose answers it judges; None: all
    weight: float = 1.0
    weight_end: float | None = None  # None: the weight stays
    signal: Signal = "chunk"  # what it says across vocabularies
    speaks: bool = False  # in one vocabulary too: log-probs of the sampled tokens instead of distributions
    temperature: float = 1.0
    anchor: Divergence | None = None  # it holds the student back by this one, beside the others, and teaches nothing
    # nats, of a special token of the student's that the teacher has no counterpart for, and so can never say; without
    # it a student that is told off for its text escapes to such tokens, of which nothing would be said
    never: float = -20.0

    def weight_at(self, progress: float) -> float:
        """How much it counts when a share `progress` of the steps is done; linear."""
        return self.weight if self.weight_end is None else linear(self.weight, self.weight_end, progress)

    def judges(self, rollout: Rollout) -> bool:
        """Whether answers to this problem's task are its business."""
        return self.tasks is None or rollout.problem.task in self.tasks


class Member:
    """A seat, a view and a mind; keeps the papers of the step."""

    def __init__(self, seat: Seat, view: View, mind: Mind, aid: Pairs | Boundaries | Marginal | None = None):
        """aid: what the signal needs: `mapped` Pairs, `chunk_debiased` Boundaries, `marginal` Marginal."""
        self.seat, self.view, self.mind, self._aid = seat, view, mind, aid
        self.unread = (0, 0)  # of the step's answers that are its business, those it got no paper of; and all
        self._papers: dict[int, tuple[Paper, Rollout]] = {}

    def prepare(self, rollouts: Sequence[Rollout]) -> None:
        """Before a step's micro-batches: write the papers, and let the mind see all of them."""
        self._papers, own = {}, [r for r in rollouts if self.seat.judges(r)]
        self.unread = (0, len(own))
        if self.view.plain:
            self.mind.visit(own)
            return
        for r, paper in zip(own, self.view.papers(own), strict=True):
            if paper is not None:
                self._papers[id(r)] = (paper, as_rollout(r, paper))
        self.unread = (len(own) - len(self._papers), len(own))
        self.mind.visit([read for _, read in self._papers.values()])

    def opinion(self, rollouts: Sequence[Rollout], batch: Batch, states: Tensor | None, head: Head | None,
                weight: float) -> Opinion | None:
        """What it says of the N learned tokens of `batch`; None where it reads none of the rollouts.

        states (N, D), head: the student's, for `chunk_debiased` alone
        """
        told = [i for i, r in enumerate(rollouts) if self.seat.judges(r) and (self.view.plain or id(r) in self._papers)]
        if not told:
            return None
        if self.view.plain:
            papers, reads = None, [rollouts[i] for i in told]
        else:
            papers = [self._papers[id(rollouts[i])][0] for i in told]
            reads = [self._papers[id(rollouts[i])][1] for i in told]
        same = self.view.plain and len(told) == len(rollouts)
        own = batch if same else pack(reads, batch.tokens.device)
        thoughts = self.mind.think(reads, own)
        if self.view.translator is None:
            return self._in_one_vocabulary(batch, own, told, thoughts, weight)
        places = Places.of(rollouts, told, papers, batch, own)
        if self.seat.signal == "marginal":
            return self._marginal([(rollouts[i], p) for i, p in zip(told, papers, strict=True)], places, batch, own,
                                  thoughts, weight)
        return self._across(places, batch, own, thoughts, (states, head), weight)

    def _in_one_vocabulary(self, batch: Batch, own: Batch, told: list[int], thoughts: Thoughts,
                           weight: float) -> Opinion:
        at = None if len(told) == len(batch.lengths) else _tokens_of(batch, told)
        if thoughts.topk is not None:
            return self._listed(len(own.learn), at, thoughts, weight)
        if thoughts.hidden is not None and not self.seat.speaks:
            return Opinion(name=self.seat.name, weight=weight, anchor=self.seat.anchor,
                           whole=Whole(hidden=thoughts.hidden, head=thoughts.head, at=at))
        span = torch.full_like(batch.learn, -1)
        span[slice(None) if at is None else at] = torch.arange(len(own.learn), device=span.device)
        return Opinion(name=self.seat.name, weight=weight,
                       spoken=Spoken(span=span, logp=thoughts.logp(own.targets, self.seat.temperature)))

    def _listed(self, count: int, at: Tensor | None, thoughts: Thoughts, weight: float) -> Opinion:
        """Lists of likeliest tokens, wherever the server gave one of the `count` tokens at `at`."""
        there = thoughts.at
        unknown = {"unknown": (float(count - len(there)), float(count))}
        if at is not None or len(there) < count:
            at = there if at is None else at[there]
        return Opinion(name=self.seat.name, weight=weight, facts=self._named(unknown),
                       whole=Whole(topk=thoughts.topk, at=at))

    def _across(self, places: "Places", batch: Batch, own: Batch, thoughts: Thoughts,
                student: tuple[Tensor | None, Head | None], weight: float) -> Opinion:
        spans, signal = places.spans, self.seat.signal
        said = thoughts.logp(own.targets, self.seat.temperature)
        if signal == "chunk_debiased":
            closes = self._aid.closes(spans, batch.targets, student, own.targets,
                                      (thoughts.hidden, thoughts.head), self.seat.temperature)
            spans = spans.merged(closes, places.ends)
        student_span, logp = self._with_never(
            torch.from_numpy(spans.student).to(batch.learn.device), _sums(spans, said), batch, places)
        whole, kept = None, torch.zeros(len(logp) + 1, dtype=torch.bool, device=student_span.device)  # the last: for -1
        kept[:spans.count] = torch.from_numpy(spans.one_to_one).to(kept.device)
        if signal == "exact":
            student_span = student_span.where(kept[student_span], -1)
        elif signal == "mapped":
            at = kept[student_span].nonzero()[:, 0]
            theirs = places.partners(student_span[at])
            # one to one, and yet other bytes: a first word with the space that the teacher's tokenizer puts before it
            alike = self._partner(batch.targets[at]) == own.targets[theirs]
            at, theirs = at[alike], theirs[alike]
            whole = Whole(hidden=thoughts.hidden[theirs], head=thoughts.head, at=at,
                          pairs=self._aid) if len(at) else None
            student_span = student_span.index_fill(0, at, -1)
        facts = places.facts | {"kept": (float((student_span >= 0).sum()) + (len(whole.at) if whole else 0),
                                         float(len(batch.learn)))}
        return Opinion(name=self.seat.name, weight=weight, facts=self._named(facts), whole=whole,
                       spoken=Spoken(span=student_span, logp=logp))

    def _partner(self, tokens: Tensor) -> Tensor:
        """The teacher's token of the same bytes (K,), for the student's (K,); -1: it has none."""
        size = int(torch.cat([tokens, self._aid.student]).max()) + 1
        partner = torch.full((size,), -1, dtype=torch.int64, device=tokens.device)
        partner[self._aid.student] = self._aid.teacher
        return partner[tokens]

    def _marginal(self, read: Sequence[tuple[Rollout, Paper]], places: "Places", batch: Batch, own: Batch,
                  thoughts: Thoughts, weight: float) -> Opinion:
        """Distributions wherever the teacher's tokens hold the student's whole; of other spans, their log-probs."""
        queries, theirs = [], 0
        starts = dict(zip((id(r) for r, _ in read), places.starts, strict=True))
        for rollout, paper in read:
            queries += self._aid.queries(rollout, paper, starts[id(rollout)], theirs)
            theirs += len(paper.response_ids)
        span, logp = self._with_never(torch.from_numpy(places.spans.student).to(batch.learn.device), _sums(
            places.spans, thoughts.logp(own.targets, self.seat.temperature)), batch, places)
        facts = places.facts | {"kept": (float((span >= 0).sum()), float(len(span)))}
        whole = None
        if queries:
            at = torch.tensor([q.token for q in queries], device=span.device)
            whole = Whole(topk=self._aid.lists(queries, thoughts.hidden, thoughts.head, self.seat.temperature), at=at)
            facts["whole"] = (float(len(at)), float(len(span)))
            span = span.index_fill(0, at, -1)
        return Opinion(name=self.seat.name, weight=weight, facts=self._named(facts), whole=whole,
                       spoken=Spoken(span=span, logp=logp))

    def _with_never(self, span: Tensor, logp: Tensor, batch: Batch, places: "Places") -> tuple[Tensor, Tensor]:
        """Spans and their log-probs with one more for each special token that the teacher can never say."""
        pieces = self.view.translator.student.pieces
        tokens = zip(span.tolist(), batch.targets.tolist(), places.read.tolist(), strict=True)
        silent = torch.tensor([i for i, (k, t, read) in enumerate(tokens)
                               if k < 0 and read and (t >= len(pieces) or not pieces[t])],
                              dtype=torch.int64, device=span.device)
        return (span.index_copy(0, silent, len(logp) + torch.arange(len(silent), device=span.device)),
                torch.cat([logp, logp.new_full((len(silent),), self.seat.never)]))

    def _named(self, facts: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
        return {f"teacher/{self.seat.name}/{name}": fact for name, fact in facts.items()}


@dataclass(frozen=True)
class Places:
    """Where the spans of several papers lie in two packs: the student's N learned tokens, and the teacher's."""

    spans: Spans  # over all papers end to end; -1 too for the tokens of rollouts without a paper
    ends: np.ndarray  # (m,) bool, the last span of its answer
    facts: dict[str, tuple[float, float]]
    starts: tuple[int, ...]  # of each paper's rollout: its first learned token among the N
    read: np.ndarray  # (N,) bool, tokens of these rollouts, without those that a teacher's prompt has already

    @classmethod
    def of(cls, rollouts: Sequence[Rollout], told: Sequence[int], papers: Sequence[Paper], batch: Batch,
           own: Batch) -> "Places":
        """papers: of the rollouts `told`, in this order"""
        learned, student, teacher, ends, sealed, count = batch.learned, [], [], [], [], 0
        read = []
        found = dict(zip(told, papers, strict=True))
        for i, r in enumerate(rollouts):
            if i not in found:
                student.append(np.full(learned[i], -1))
                read.append(np.zeros(learned[i], dtype=bool))
                continue
            fresh = np.arange(len(r.response_ids)) >= found[i].opened
            read.append(fresh if r.learn_mask is None else fresh[np.array(r.learn_mask)])
            spans = found[i].spans
            mine, theirs = _learned(spans, r)
            student.append(np.where(mine < 0, -1, mine + count))
            teacher.append(np.where(theirs < 0, -1, theirs + count))
            ends.append(np.arange(spans.count) == spans.count - 1)
            sealed.append(np.zeros(spans.count, dtype=bool) if spans.sealed is None else spans.sealed)
            count += spans.count
        joined = Spans(np.concatenate(student), np.concatenate(teacher), count, np.concatenate(sealed))
        total = float(sum(p.bytes for p in papers))
        facts = {"lost_bytes": (float(sum(p.lost for p in papers)), total),
                 "unpaired": (float(sum(p.unpaired for p in papers)), float(len(papers)))}
        starts = np.concatenate([[0], np.cumsum(learned)])
        return cls(joined, np.concatenate(ends), facts, tuple(int(starts[i]) for i in told),
                   np.concatenate(read))

    def partners(self, span: Tensor) -> Tensor:
        """The teacher's token (K,) of each one-to-one span (K,)."""
        first = np.zeros(self.spans.count, dtype=np.int64)
        inside = self.spans.teacher >= 0
        first[self.spans.teacher[inside]] = inside.nonzero()[0]
        return torch.from_numpy(first).to(span.device)[span]


def _learned(spans: Spans, rollout: Rollout) -> tuple[np.ndarray, np.ndarray]:
    """The span of each learned token, and of each of the teacher's; one with a token that is not learned is none."""
    if rollout.learn_mask is None:
        return spans.student, spans.teacher
    mask = np.array(rollout.learn_mask)
    whole = np.ones(spans.count + 1, dtype=bool)
    whole[spans.student[~mask]] = False  # -1 is the last
    return (np.where(whole[spans.student], spans.student, -1)[mask], np.where(whole[spans.teacher], spans.teacher, -1))


def _sums(spans: Spans, logp: Tensor) -> Tensor:
    """(M,) nats: the log-probs of each span's teacher tokens, added up."""
    of = torch.from_numpy(spans.teacher).to(logp.device)
    inside = of >= 0
    return logp.new_zeros(spans.count).index_add_(0, of[inside], logp[inside])


def _tokens_of(batch: Batch, rows: Sequence[int]) -> Tensor:
    """(K,) which learned tokens belong to these rollouts."""
    wanted = torch.zeros(len(batch.lengths), dtype=torch.bool, device=batch.row.device)
    wanted[list(rows)] = True
    return wanted[batch.row].nonzero()[:, 0]
