"""A teacher that is a table, and the student's next token by enumeration: slow, and sharing nothing with the library.

In: two tokenizers and a student's text. Out: a rollout, its paper, the table's states, and what it says by brute force.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from tinyr2.core.types import Message, Problem, Rollout
from tinyr2.models.head import Head
from tinyr2.teachers.marginal import Marginal
from tinyr2.teachers.views import Paper, View
from tinyr2.tokens.prefixes import Prefixes
from tinyr2.tokens.translate import Translator


def rollout_of(ids, **more):
    """An answer of these ids to any question."""
    problem = Problem(id="0", task="t", messages=(Message("user", "0"),), answer="1")
    return Rollout(**({"problem": problem, "group": 0, "sample": 0, "author": "student", "prompt_ids": (3,),
                       "response_ids": tuple(ids), "finish": "length"} | more))


@dataclass(frozen=True)
class Table:
    """A teacher whose distribution after some of its tokens is drawn anew for every such sequence."""

    size: int
    power: float = 3.0  # how far apart probabilities lie
    rare: tuple[int, ...] = ()  # tokens that it all but never says

    def after(self, ids):
        """(V,) float64."""
        seed = [len(ids), *(int(i) for i in ids)]
        logits = self.power * np.random.default_rng(seed).standard_normal(self.size)
        logits[list(self.rare)] -= 40
        return np.exp(logits - np.log(np.exp(logits).sum()))


@dataclass(eq=False)
class Case:
    """A student's tokenizer, a teacher's, and a table of the teacher's.

    padding: ids that each head has beyond its tokenizer    trained: whether the teacher all but never says what has no
    counterpart
    """

    ours: object
    theirs: object
    padding: int = 0
    trained: bool = False

    @cached_property
    def translator(self):
        return Translator(self.ours, self.theirs)

    @cached_property
    def table(self):
        silent = tuple(i for i, written in enumerate(self.written) if not written)
        return Table(len(self.written), rare=silent if self.trained else ())

    @cached_property
    def marginal(self):
        ours, theirs = self.translator.student, self.translator.teacher
        roles = {int(t): int(s) for s, t in zip(*self.translator.pairs, strict=True)
                 if not (theirs.pieces[t] and ours.pieces[s])}
        return Marginal(Prefixes(ours.ids_of_bytes(), theirs.pieces, roles, ours), ours.pieces, theirs.pieces,
                        ours.vocab + self.padding)

    def paper(self, rollout) -> Paper:
        (paper,) = View(translator=self.translator).papers([rollout])
        return paper

    def queries(self, rollout, first=0, teacher_first=0):
        """(What is asked, the paper)."""
        paper = self.paper(rollout)
        return list(self.marginal.queries(rollout, paper, first, teacher_first)), paper

    def ask(self, rollout):
        """{learned token: (V,) float64 probabilities} in one walk over an answer."""
        asked, paper = self.queries(rollout)
        found = self.marginal.lists(asked, self.states(paper), Head(torch.eye(self.table.size).double()), 1.0)
        dense = torch.zeros(len(asked), self.marginal.vocab, dtype=torch.float64)
        dense.scatter_(1, found.ids, found.logp.exp())
        return {q.token: row for q, row in zip(asked, dense, strict=True)}

    def states(self, paper):
        """(N_t, V) log-probs, which a head that changes nothing reads."""
        return torch.from_numpy(np.log([self.table.after(paper.response_ids[:j])
                                        for j in range(len(paper.response_ids))]))

    @cached_property
    def written(self):
        """By the teacher's id."""
        return [*map(self.write, range(len(self.translator.teacher.pieces))), *[()] * self.padding]

    def write(self, token):
        """A teacher's token as the student's ids: of a role, its counterpart; -2 for the bytes that it cannot write.

        () of a special token without a counterpart.
        """
        theirs, ours = self.translator.teacher, self.translator.student
        if not theirs.pieces[token]:
            pairs = dict(zip(self.translator.pairs[1].tolist(), self.translator.pairs[0].tolist(), strict=True))
            return (pairs[token],) if token in pairs else ()
        (encoded,) = ours.encode_all([theirs.pieces[token]], opens=[False])
        if b"".join(ours.pieces[i] for i in encoded.ids) == theirs.pieces[token]:
            return encoded.ids
        out, rest = [], theirs.pieces[token]
        while rest:
            fits = [i for piece, i in ours.ids_of_bytes().items() if rest.startswith(piece)]
            if not fits:
                return (*out, -2)
            out.append(max(fits, key=lambda i: len(ours.pieces[i])))
            rest = rest[len(ours.pieces[out[-1]]):]
        return tuple(out)

    def enumerated(self, before, path, ended):
        """(V,) the probabilities of the student's next token, when the teacher has written `before` and is in a token
        of which the student has written `path`. ended: the teacher's own such token; None: it goes on.

        What begins with bytes that the student cannot write is taken as not said; special tokens without a counterpart
        and ids beyond the tokenizer are said, but no token of the student's has their probability.
        """
        out, total = np.zeros(self.marginal.vocab), 0.0
        following = None
        if ended is not None:
            following, said = np.zeros(self.marginal.vocab), 0.0
            for token, prob in enumerate(self.table.after((*before, *ended))):
                written = self.written[token]
                if written[:1] == (-2,):
                    continue
                said += prob
                if written:
                    following[written[0]] += prob
            following /= said
        for token, prob in enumerate(self.table.after(before)) if path else ():
            written = self.written[token]
            if written[:len(path)] != path or written[len(path):] == (-2,):
                continue
            total += prob
            if written != path:
                out[written[len(path)]] += prob
            elif following is not None:
                out += prob * following
        return out / total if path else following
