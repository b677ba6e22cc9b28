"""A teacher's distribution over the student's next token, where the two cut text differently.

In: a teacher's states at its own tokens, and where these lie in the student's answers. Out: for the student's tokens,
one by one, the likeliest next tokens of the student's vocabulary in the teacher's eyes, and a tail.

A teacher that writes "03" as one token has, after "=", an opinion of the student's "0": that of all its tokens that
begin with "0". And once the student has written "0", of its "3": those that go on with "3", among those that begin with
"0". So a student's token has the probability of all that the teacher's token in progress may become. Where that token
may also be complete (probability rho), what it would say next counts for rho. Nothing else is approximated than the
teacher's earlier cuts, which are those that its tokenizer makes; after Phan et al. 2024 (arXiv 2410.09303) and Vieira et
al. 2024 (arXiv 2412.03719), who take more of these into account.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tinyr2.core.types import Rollout
from tinyr2.models.head import Head, TopK, logits_of
from tinyr2.teachers.views import Paper
from tinyr2.tokens.prefixes import Prefixes

_LISTED = 64  # tokens that a list names at most
_ELEMENTS = 2**22  # probabilities that are held at once


@dataclass(frozen=True)
class Query:
    """One student's token, and the teacher's states that speak of it.

    inside: the teacher's token in progress, and how much of it has been read; before a cut, the whole of it
    fresh: the teacher's token that begins here, if one does
    """

    token: int  # of the N learned ones
    inside: int | None
    read: bytes
    fresh: int | None


@dataclass(frozen=True)
class Marginal:
    """The student's and the teacher's vocabularies, and how one goes on in the other."""

    prefixes: Prefixes
    student_pieces: Sequence[bytes]
    teacher_pieces: Sequence[bytes]
    vocab: int  # of the student's head

    def queries(self, rollout: Rollout, paper: Paper, first: int, teacher_first: int) -> Iterator[Query]:
        """What can be asked of one answer, whose tokens begin at `first` and `teacher_first` in their packs.

        A span of several teacher's tokens is cut by the student's in other places: nothing is asked inside of it.
        """
        spans, count = paper.spans, paper.spans.count
        ours = [np.flatnonzero(spans.student == k) for k in range(count)]
        theirs = [np.flatnonzero(spans.teacher == k) for k in range(count)]
        place = self._places(rollout, first)
        silent: list[int] = []  # the student's tokens without a counterpart, before the next cut
        following = {int(tokens[0]): k for k, tokens in enumerate(ours)}
        for i in range(len(spans.student)):
            k = following.get(i)
            if spans.student[i] < 0 and not self._piece(rollout.response_ids[i]):
                silent.append(i)
            if k is None:
                continue
            fresh = int(theirs[k][0])
            before = fresh - 1 if fresh and self.teacher_pieces[paper.response_ids[fresh - 1]] else None
            said = b"" if before is None else self.teacher_pieces[paper.response_ids[before]]
            covered = len(theirs[k]) == 1 and self._fit(rollout, ours[k], paper.response_ids[fresh])
            for token in (*silent, *([i] if covered else [])):
                if place[token] >= 0:
                    yield Query(place[token], None if before is None else teacher_first + before, said,
                                teacher_first + fresh)
            silent = []
            read = self._piece(rollout.response_ids[i])
            for token in ours[k][1:] if covered else ():
                if place[token] >= 0:
                    yield Query(place[token], teacher_first + fresh, read, None)
                read += self._piece(rollout.response_ids[token])

    def _places(self, rollout: Rollout, first: int) -> np.ndarray:
        """Where each response token is among the learned ones of the pack; -1: it is not learned."""
        n = len(rollout.response_ids)
        learned = np.ones(n, dtype=bool) if rollout.learn_mask is None else np.array(rollout.learn_mask)
        return np.where(learned, first + np.cumsum(learned) - 1, -1)

    def _piece(self, token: int) -> bytes:
        return self.student_pieces[token] if token < len(self.student_pieces) else b""

    def _fit(self, rollout: Rollout, tokens: np.ndarray, teacher: int) -> bool:
        """Whether the student's tokens of a span spell the teacher's one; a role's need not."""
        return len(tokens) == 1 or b"".join(
            self._piece(rollout.response_ids[t]) for t in tokens) == self.teacher_pieces[teacher]

    @torch.no_grad()
    def lists(self, queries: Sequence[Query], hidden: Tensor, head: Head, temperature: float) -> TopK:
        """The answers (K, k) to K queries; hidden (N_t, D): the states that predict the teacher's tokens."""
        step = max(1, _ELEMENTS // (2 * len(head.weight) + self.vocab))
        k = min(_LISTED, self.vocab)
        parts = [self._some(queries[i:i + step], hidden, head, temperature).topk(k)
                 for i in range(0, len(queries), step)]
        prob, ids = torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts])
        return TopK(ids=ids, logp=prob.log())

    def _some(self, queries: Sequence[Query], hidden: Tensor, head: Head, temperature: float) -> Tensor:
        """(n, V) the probabilities of the student's next tokens; what is left to 1 goes to none of them."""
        wanted = sorted({s for q in queries for s in (q.inside, q.fresh) if s is not None})
        row = {s: i for i, s in enumerate(wanted)}
        prob = torch.softmax(logits_of(hidden[wanted], head) / temperature, -1)
        out = prob.new_zeros(len(queries), self.vocab)
        rho = prob.new_ones(len(queries))  # of a fresh token: the chance that the one before is complete
        groups: dict[bytes, list[int]] = {}
        for i, q in enumerate(queries):
            if q.inside is not None:
                groups.setdefault(q.read, []).append(i)
        for read, members in groups.items():
            at = torch.tensor(members, device=prob.device)
            seen = prob[torch.tensor([row[queries[i].inside] for i in members], device=prob.device)]
            rho[at] = self._add(out, at, seen, read, 1.0)
        begins = [i for i, q in enumerate(queries) if q.fresh is not None]
        if begins:
            at = torch.tensor(begins, device=prob.device)
            seen = prob[torch.tensor([row[queries[i].fresh] for i in begins], device=prob.device)]
            self._add(out, at, seen, b"", rho[at][:, None])
        return out

    def _add(self, out: Tensor, at: Tensor, seen: Tensor, read: bytes, share: Tensor | float) -> Tensor:
        """Add to out[at] what the distributions seen (n, V_t) say after `read`; (n,) the chance that no more comes."""
        found = self.prefixes.after(read)
        ids, firsts, ended = (torch.from_numpy(x).to(seen.device) for x in (found.ids, found.firsts, found.ended))
        going = seen[:, ids]
        complete = seen[:, ended].sum(-1)
        total = (going.sum(-1) + complete).clamp_min(torch.finfo(seen.dtype).tiny)[:, None]
        total = total if read else torch.ones_like(total)  # of anything, what has no counterpart is the tail's
        named = firsts >= 0
        said = out.new_zeros(len(at), self.vocab).index_add_(1, firsts[named], going[:, named] / total * share)
        out[at] += said
        return complete / total[:, 0]
