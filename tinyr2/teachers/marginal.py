"""A teacher's distribution over the student's next token, where the two cut text differently.

In: a teacher's states at its own tokens, and where these lie in the student's answers. Out: for the student's tokens,
one by one, the likeliest next tokens of the student's vocabulary in the teacher's eyes, and a tail.

A teacher that writes "03" as one token has, after "=", an opinion of the student's "0": that of all its tokens that the
student writes with "0" first. And once the student has written "0", of its "3": those that it writes with "0" and "3",
among those with "0". Where the teacher's token in progress may also be complete (probability rho), what it says next
counts for rho. After Phan et al. 2024 (arXiv 2410.09303) and Vieira et al. 2024 (arXiv 2412.03719), who look at bytes,
and at more than one token in progress.

Exact: the probability of the student's next token when the teacher's next token is drawn after its cuts of the text
so far, and written by the student's tokenizer. A longer token in place of the one in progress counts where the student
would have written it with the same tokens so far: with one tokenizer for both none does, and the answer is the
teacher's own distribution; with a student of single characters all do. Approximate:
- the teacher's tokens before the one in progress are those that its tokenizer makes;
- inside of a token, what would come if it were complete is not known: rho is the tail's;
- each of the teacher's tokens is written by itself: a student's token never reaches beyond it, so that a student whose
  tokens are the longer ones is told of their beginnings. Where it wrote such a token, nothing is asked;
- after a cut that the student's tokenizer would not make, little or nothing is known until the teacher's token ends;
- text that the student cannot write is left out, and the rest stands for the whole. A special token that has no
  counterpart is the tail's, as the student's own are.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tinyr2.core.types import Rollout
from tinyr2.models.head import Head, TopK, logits_of
from tinyr2.teachers.views import Paper
from tinyr2.tokens.prefixes import LOST, Prefixes, Side

_LISTED = 64  # tokens that a list names at most
_HELD = 2**24  # numbers of 4 bytes that are held at once


class Query(NamedTuple):
    """One student's token, and the teacher's states that speak of it."""

    token: int  # of the N learned ones
    inside: int | None  # the teacher's token in progress; before a cut, the one that ends there
    path: tuple[int, ...]  # the student's tokens of it, so far
    fresh: int | None  # the teacher's token that begins here, if one does


@dataclass(frozen=True)
class Marginal:
    """The student's and the teacher's vocabularies, and how one goes on in the other."""

    prefixes: Prefixes
    student_pieces: Sequence[bytes]
    teacher_pieces: Sequence[bytes]
    vocab: int  # of the student's head

    def queries(self, rollout: Rollout, paper: Paper, first: int, teacher_first: int) -> Iterator[Query]:
        """What can be asked of one answer, whose tokens begin at `first` and `teacher_first` in their packs.

        A student's token without a counterpart is asked for too: what the teacher says next belongs in its place.
        """
        ids, said, written = rollout.response_ids, paper.response_ids, self.prefixes.written
        ours = Side(ids, self.student_pieces)
        begins, whole = self.prefixes.held(paper.spans, ours, Side(said, self.teacher_pieces))
        place = self._places(rollout, first)
        silent, last, path = [], -1, ()
        for i, k in enumerate(paper.spans.student.tolist()):
            if k < 0:
                if ours.piece(ids[i]):  # lost bytes: the teacher did not read what was said before the next span
                    silent, last = [], -1
                elif i >= paper.opened:
                    silent.append(i)
                continue
            if k == last:
                states = teacher_first + begins[k], path, None
            else:
                # where the student did not write the token before as it would have to, that token is taken as complete
                before = begins[k] - 1
                known = last >= 0 and whole[last] and begins[last] == before and written[said[before]] == path
                states = teacher_first + before if known else None, path if known else (), teacher_first + begins[k]
                path = ()
            for token in (*silent, i) if whole[k] else silent if k != last else ():
                if place[token] >= 0:
                    yield Query(place[token], *states)
            silent, last, path = [], k, (*path, ids[i])

    def _places(self, rollout: Rollout, first: int) -> list[int]:
        """Where each response token is among the learned ones of the pack; -1: it is not learned."""
        n = len(rollout.response_ids)
        learned = np.ones(n, dtype=bool) if rollout.learn_mask is None else np.array(rollout.learn_mask, dtype=bool)
        return np.where(learned, first + np.cumsum(learned) - 1, -1).tolist()

    @torch.no_grad()
    def lists(self, queries: Sequence[Query], hidden: Tensor, head: Head, temperature: float) -> TopK:
        """The answers (K, k) to K > 0 queries; hidden (N_t, D): the states that predict the teacher's tokens."""
        tree = _Tree.of(self.prefixes, self.vocab, self.teacher_pieces, hidden.device)
        asked = _Asked.of(queries, self.prefixes)
        parts = []
        for part in asked.parts(len(head.weight), self.vocab):
            wanted = np.unique(part.states[part.states >= 0])
            logits = logits_of(hidden[torch.from_numpy(wanted).to(hidden.device)], head)
            prob = torch.softmax(logits.div_(temperature), -1)
            parts.append(tree.answers(part, np.searchsorted(wanted, part.states), prob).topk(min(_LISTED, self.vocab)))
        return TopK(ids=torch.cat([p.indices for p in parts]), logp=torch.cat([p.values for p in parts]).log())


@dataclass(frozen=True)
class _Asked:
    """n queries as arrays."""

    states: np.ndarray  # (n, 2) int64, inside and fresh; -1: none
    stretch: np.ndarray  # (n, 2) int64, what the token in progress may be: places [start, stop) in `Prefixes.order`
    depth: np.ndarray  # (n,) int64, the student's tokens of it

    @classmethod
    def of(cls, queries: Sequence[Query], prefixes: Prefixes) -> "_Asked":
        states = [(-1 if q.inside is None else q.inside, -1 if q.fresh is None else q.fresh) for q in queries]
        stretch = [(0, 0) if q.inside is None else prefixes.stretch(q.path) for q in queries]
        return cls(np.array(states), np.array(stretch), np.array([len(q.path) for q in queries]))

    def parts(self, teacher_vocab: int, vocab: int) -> Iterator["_Asked"]:
        """Runs of queries that hold about `_HELD` numbers each."""
        new = np.diff(self.states.max(-1), prepend=-1) > 0
        # logits, probabilities and a copy of each new state; sums of each query; indices, of 8 bytes, of each stretch
        cost = np.cumsum(3 * teacher_vocab * new + 3 * vocab + 12 * (self.stretch[:, 1] - self.stretch[:, 0]))
        cuts = np.flatnonzero(np.diff(cost // _HELD)) + 1
        for start, stop in zip([0, *cuts], [*cuts, len(cost)], strict=True):
            yield _Asked(self.states[start:stop], self.stretch[start:stop], self.depth[start:stop])


@dataclass(frozen=True)
class _Tree:
    """`Prefixes` on a device."""

    vocab: int
    order: Tensor
    tokens: Tensor
    begins: Tensor
    first: Tensor  # (V_t,) the column of each token's first one; `vocab` where it has none, the next where it is text

    @classmethod
    def of(cls, prefixes: Prefixes, vocab: int, pieces: Sequence[bytes], device: torch.device) -> "_Tree":
        most = int(prefixes.tokens.max(initial=0))
        assert most < vocab, f"token {most} of a student's head with {vocab}"
        text = np.array([bool(piece) for piece in pieces], dtype=bool)
        first = np.where(prefixes.first == LOST, vocab + text, prefixes.first)
        return cls(vocab, *(torch.from_numpy(x).to(device) for x in (
            prefixes.order, prefixes.tokens, prefixes.begins, first)))

    def answers(self, asked: _Asked, rows: np.ndarray, prob: Tensor) -> Tensor:
        """(n, V) the probabilities of the student's next tokens; what is left to 1 is unknown.

        rows (n, 2): which of the teacher's distributions prob (m, V_t) a query's states are
        """
        out, rho = self._going_on(asked, torch.from_numpy(rows[:, 0]).to(prob.device), prob)
        begins = asked.states[:, 1] >= 0
        at, row = (torch.from_numpy(x).to(prob.device) for x in (begins.nonzero()[0], rows[begins, 1]))
        out[at] += self._beginning(prob)[row] * rho[at]
        return out

    def _going_on(self, asked: _Asked, row: Tensor, prob: Tensor) -> tuple[Tensor, Tensor]:
        """((n, V) what the tokens in progress go on with, (n, 1) rho; 1 where there is none)."""
        n, columns = len(row), self.vocab + 2
        sizes, total = asked.stretch[:, 1] - asked.stretch[:, 0], int(np.diff(asked.stretch).sum())
        size, depth = (torch.from_numpy(x).to(prob.device) for x in (sizes, asked.depth))
        shift = torch.from_numpy(asked.stretch[:, 1] - np.cumsum(sizes)).to(prob.device)
        query = torch.repeat_interleave(torch.arange(n, device=prob.device), size, output_size=total)
        place = torch.arange(total, device=prob.device) + shift[query]
        # END and LOST are the last two columns, as in a list
        column = self.tokens[self.begins[place] + depth[query]].remainder(columns)
        flat = prob.new_zeros(n * columns)
        flat.index_add_(0, query * columns + column, prob[row[query], self.order[place]])
        out = flat.view(n, columns)
        out[:, LOST] = 0
        out /= out.sum(-1, keepdim=True).clamp_min(torch.finfo(prob.dtype).tiny)
        inside = torch.from_numpy(asked.states[:, :1] >= 0).to(prob.device)
        return out[:, :self.vocab], torch.where(inside, out[:, -1:], 1.0)

    def _beginning(self, prob: Tensor) -> Tensor:
        """(m, V) what the teacher's next tokens begin with; its special tokens without a counterpart are left to 1."""
        named, padded = prob.tensor_split([len(self.first)], -1)
        out = prob.new_zeros(self.vocab + 2, len(prob)).index_add_(0, self.first, named.t())[:-1].t()
        # summed: 1 less the text that the student cannot write would be lost to rounding where there is little else
        said = out.sum(-1, keepdim=True) + padded.sum(-1, keepdim=True)
        return out[:, :self.vocab] / said.clamp_min(torch.finfo(prob.dtype).tiny)
