"""A teacher of another vocabulary: the tokens that both have are compared one by one, everything else as one bucket.

In: ids of equal byte strings in the two vocabularies, and blocks of both models' logits. Out: the divergence over the
shared tokens and the bucket, and its gradient with respect to the student's logits, of shared tokens and of others.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tinyr2.core.errors import DataError
from tinyr2.models.blend import Reads
from tinyr2.models.lesson import Lesson, View, fits
from tinyr2.models.side import parts
from tinyr2.objectives.divergence import NATS, Divergence, Pull, add_jsd, add_kl, conclude_jsd, conclude_kl


@dataclass(frozen=True)
class Pairs:
    """Ids of one byte string in two vocabularies.

    "the" is student token 12 and teacher token 7, "a" is 3 and 3: student [12, 3], teacher [7, 3].
    """

    student: Tensor  # (S,) int64
    teacher: Tensor  # (S,) int64

    def check(self, student_vocab: int, teacher_vocab: int) -> None:
        """DataError where an id is out of range or has two partners, or nothing is shared."""
        shapes = tuple(self.student.shape), tuple(self.teacher.shape)
        assert shapes[0] == shapes[1] and len(shapes[0]) == 1, f"pairs of ids, not {shapes}"
        if len(self.student) == 0:
            raise DataError("student and teacher share no token; compare spans of bytes instead of distributions")
        for side, ids, vocab in (("student", self.student, student_vocab), ("teacher", self.teacher, teacher_vocab)):
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= vocab:
                raise DataError(f"shared tokens: {side} token {low if low < 0 else high} of a vocabulary of {vocab}; "
                                "make the pairs from the tokenizers of these two models")
            ordered = ids.sort().values
            if bool((twice := ordered[1:] == ordered[:-1]).any()):
                raise DataError(f"shared tokens: {side} token {int(ordered[1:][twice][0])} has two partners; keep one "
                                "pair of each byte string")


@dataclass(frozen=True)
class Shared:
    """Pairs in the order of a walk over the student's vocabulary, and what they leave."""

    student: Tensor  # (S,) ascending
    teacher: Tensor  # (S,) their partners
    student_rest: Tensor  # (V - S,) ascending
    teacher_rest: Tensor  # (V_teacher - S,) ascending
    place: Tensor  # (V,) where among the S a student's token is; -1: nowhere


def arrange(pairs: Pairs, student_vocab: int, teacher_vocab: int, device: torch.device) -> Shared:
    """The pairs, checked, for walks on `device`."""
    pairs.check(student_vocab, teacher_vocab)
    student, order = pairs.student.to(device).sort()
    teacher = pairs.teacher.to(device)[order]
    place = torch.full((student_vocab,), -1, dtype=torch.int64, device=device)
    place[student] = torch.arange(len(student), device=device)
    alone = torch.ones(teacher_vocab, dtype=torch.bool, device=device)
    alone[teacher] = False
    return Shared(student, teacher, (place < 0).nonzero()[:, 0], alone.nonzero()[:, 0], place)


def _cuts(ids: Tensor, blocks: list[slice]) -> list[slice]:
    """Which of the ascending ids lie in each block."""
    stops = torch.tensor([rows.stop for rows in blocks], device=ids.device)
    ends = [0, *torch.searchsorted(ids, stops).tolist()]
    return [slice(*ends[i: i + 2]) for i in range(len(blocks))]


class PairLesson(Lesson):
    """A teacher that shares S of the student's tokens.

    Events are the S tokens and the bucket of all others, whose logit is the log of its sum. A side that has no others
    gets a bucket of the least probability that the precision tells from none, held constant. Memory 1 is (S, n).
    """

    def __init__(self, view: View, reader: Reads, shared: Shared, spec: Divergence | None, teacher_blocks: list[slice]):
        super().__init__(view)
        self._reader, self._shared, self._spec, self._teacher_blocks = reader, shared, spec, teacher_blocks
        self.twice = spec is not None and spec.kind == "jsd"
        self._here = _cuts(shared.student, view.blocks)
        self._others = _cuts(shared.student_rest, view.blocks)
        self._place = shared.place[view.targets]
        self._bits = view.zeros()
        self._pull: Pull | None = None
        self._rest_pull = self._on_rest = self._on_kept = None

    def begin(self) -> None:
        self._cross, self._rest, self._teacher_rest = (self._view.zeros() for _ in range(3))
        widest = max(rows.stop - rows.start for rows in self._teacher_blocks)
        for some in parts(0, len(self._shared.teacher_rest), widest):
            self._teacher_rest += self._reader.block(self._shared.teacher_rest[some]).exp2_().sum(0)
        self._sum = self._teacher_rest.clone()

    def scratch(self, rows: slice, bits: Tensor) -> Tensor:
        return bits if self._spec is None else torch.empty_like(bits)

    def add(self, number: int, rows: slice, bits: Tensor, raised: Tensor) -> None:
        here = self._here[number]
        if self.twice:
            self._view.memory.block(0, rows).copy_(bits)
        if self._spec is not None:
            others = self._shared.student_rest[self._others[number]] - rows.start
            self._rest += raised.index_select(0, others).sum(0)
        if here.start == here.stop:
            return
        teacher = self._reader.block(self._shared.teacher[here])
        self._pick(here, teacher)
        if self._spec is None or self.twice:
            if self.twice:
                self._view.memory.block(1, here).copy_(teacher)
            self._sum += teacher.exp2_().sum(0)
            return
        local = self._local(number, rows)
        total, cross = add_kl(self._spec.kind, bits[local], teacher, raised[local], self._view.memory.block(1, here))
        self._sum += total
        self._cross += cross

    def _local(self, number: int, rows: slice) -> Tensor:
        return self._shared.student[self._here[number]] - rows.start

    def _pick(self, here: slice, teacher: Tensor) -> None:
        """Notes the logits of the targets' partners, as far as they are in the block."""
        row = self._place - here.start
        found = teacher.gather(0, row.clamp(0, len(teacher) - 1)[None])[0]
        self._bits = torch.where((row >= 0) & (row < len(teacher)), found, self._bits)

    def fits(self) -> bool:
        return fits(self._sum)

    def refer_to_largest(self) -> None:
        self._reader.refer_to_largest(self._teacher_blocks)

    def logp(self) -> Tensor:
        return ((self._bits - self._sum.log2()) * NATS).masked_fill(self._place < 0, float("nan"))

    def conclude(self, total: Tensor) -> tuple[Tensor | None, Tensor]:
        if self._spec is None:
            return None, 1 / total
        shared = self._shared
        bucket = None
        if len(shared.student_rest) or len(shared.teacher_rest):
            bucket = _bucket(self._rest, total, shared.student_rest), _bucket(
                self._teacher_rest, self._sum, shared.teacher_rest)
        if self.twice:
            return self._conclude_jsd(total, bucket), torch.ones_like(total)
        return self._conclude_kl(total, bucket), 1 / total

    def _conclude_kl(self, total: Tensor, bucket: tuple[Tensor, Tensor] | None) -> Tensor:
        kind, cross = self._spec.kind, self._cross
        if bucket is None:
            value, self._pull = conclude_kl(kind, cross, total, self._sum)
            return value
        mine, theirs = bucket
        kept = torch.empty_like(mine[None])
        _, share = add_kl(kind, mine.log2()[None], theirs.log2()[None], mine[None], kept)
        value, pull = conclude_kl(kind, cross + share, total, self._sum)
        if kind == "forward_kl" and not len(self._shared.student_rest):
            # what the teacher has outside cannot be followed: a bucket that is constant takes no mass from the others
            pull = Pull(pull.x, pull.e * (1 - theirs / self._sum))
        self._pull, self._rest_pull = pull, (pull.x * kept[0] + pull.e * mine) / mine
        return value

    def _conclude_jsd(self, total: Tensor, bucket: tuple[Tensor, Tensor] | None) -> Tensor:
        beta, view = self._spec.beta, self._view
        student_kl, teacher_kl = (torch.zeros_like(total) for _ in range(2))
        totals = total.log2(), self._sum.log2()
        kept = None
        if bucket is not None:
            mine, kept = (x.log2().sub(log)[None] for x, log in zip(bucket, totals, strict=True))
            student_kl, teacher_kl = add_jsd(beta, mine, kept)
        for number, rows in enumerate(view.blocks):
            ours = view.memory.block(0, rows).sub_(totals[0])
            if (here := self._here[number]).start < here.stop:
                share = add_jsd(beta, ours[self._local(number, rows)], view.memory.block(1, here).sub_(totals[1]))
                student_kl, teacher_kl = student_kl + share[0], teacher_kl + share[1]
            ours.exp2_()
        value, self._pull = conclude_jsd(beta, student_kl, teacher_kl)
        if kept is not None:
            self._rest_pull = (self._pull.x * kept[0] + self._pull.e * mine[0]) / mine[0]
        return value

    def weigh(self, by_divergence: Tensor | None, by_logp: Tensor) -> None:
        super().weigh(by_divergence, by_logp)
        if by_divergence is None:
            return
        if self._rest_pull is not None:
            self._on_rest = by_divergence * self._rest_pull - by_logp
        self._on_raised, self._on_kept = by_divergence * self._pull.e - by_logp, by_divergence * self._pull.x

    def turn(self, number: int, rows: slice) -> Tensor:
        here = self._here[number]
        if self._on_kept is None:
            return super().turn(number, rows)
        raised = self._view.memory.block(0, rows)
        local = self._local(number, rows)
        at_shared = raised[local].mul_(self._on_raised)
        if here.start < here.stop:
            at_shared = self._view.memory.block(1, here).mul_(self._on_kept).add_(at_shared)
        if self._on_rest is not None:
            raised.mul_(self._on_rest)
        raised[local] = at_shared
        return raised


def _bucket(rest: Tensor, total: Tensor, others: Tensor) -> Tensor:
    """A side's 2^s outside the shared tokens, (n,), as far above nothing as its logarithm and its inverse need it."""
    info = torch.finfo(total.dtype)
    return torch.maximum(rest, total * (info.tiny / info.eps if len(others) else info.eps))
