"""What a chunk of tokens is taught: how a teacher's part of the walk over the vocabulary goes.

In: blocks (C, n) of the student's logits in bits, and their 2^s. Out: the divergence, the teacher's log-prob of the
targets, and the divergence's gradient by the student's logits. `Lesson` is the one without a divergence; `WholeLesson`
has a teacher of the same vocabulary, `ListLesson` (topk.py) one that names its k likeliest, `PairLesson` (pairs.py) one
of another vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tinyr2.models.blend import Reads
from tinyr2.models.side import Marks
from tinyr2.objectives.divergence import NATS, Divergence, Pull, add_jsd, add_kl, conclude_jsd, conclude_kl


@dataclass
class Sums:
    """Over the student's vocabulary, (n,) each: of 2^s and of s 2^s."""

    raised: Tensor
    weighted: Tensor


@dataclass(frozen=True)
class Memory:
    """What outlives a block: 2^s (0), the lesson's part (1), a softcap's slope (2); flat, None where not needed."""

    space: list[Tensor | None]
    tokens: int  # n, of the chunk
    narrow: bool  # tokens run down, in one block
    keeps: bool  # all blocks have their places; else they take turns in one

    def block(self, which: int, rows: slice) -> Tensor | None:
        """Memory `which` for these rows of the vocabulary, (C, n)."""
        flat, n = self.space[which], self.tokens
        if flat is None:
            return None
        if self.narrow:
            return flat[: n * rows.stop].view(n, -1).t()
        start = rows.start if self.keeps else 0
        return flat[start * n: (start + rows.stop - rows.start) * n].view(-1, n)


@dataclass(frozen=True)
class View:
    """What a lesson sees of its chunk."""

    part: slice  # which of the N tokens the n are
    targets: Tensor  # (n,)
    marks: Marks  # of the targets
    blocks: list[slice]  # the student's vocabulary
    memory: Memory
    work: torch.dtype

    def zeros(self) -> Tensor:
        """(n,)"""
        return torch.zeros(len(self.targets), dtype=self.work, device=self.targets.device)


def fits(total: Tensor) -> bool:
    """Whether no sum came near the largest number: a token's reference was far below its largest logit."""
    return bool((total < (2.0**100 if total.dtype == torch.float32 else 2.0**1000)).all())


class Lesson:
    """Nothing is compared."""

    twice = False  # whether memory 0 keeps s instead of 2^s, for a second walk when the sums are known

    def __init__(self, view: View):
        self._view = view
        self._on_raised: Tensor | None = None

    def begin(self) -> None:
        """Before a walk, which may be the second one."""

    def mark(self, number: int, bits: Tensor, raised: Tensor) -> None:
        """Before a block's 2^s are summed."""

    def scratch(self, rows: slice, bits: Tensor) -> Tensor:
        """Where a product over the block may go: the bits themselves, if `add` does not read them."""
        return bits

    def add(self, number: int, rows: slice, bits: Tensor, raised: Tensor) -> None:
        """A block of the student's vocabulary; bits may be overwritten."""

    def end(self, sums: Sums) -> None:
        """After a walk."""

    def fits(self) -> bool:
        """Whether the teacher's sums did not come near the largest number."""
        return True

    def refer_to_largest(self) -> None:
        """Before a second walk, where some sum did not fit."""

    def conclude(self, total: Tensor) -> tuple[Tensor | None, Tensor]:
        """The divergence (n,), and the factor (n,) that makes what memory 0 then holds probabilities; total: of 2^s."""
        return None, 1 / total

    def logp(self) -> Tensor | None:
        """The teacher's log-prob of the targets, (n,) nats; NaN: unknown."""
        return None

    def weigh(self, by_divergence: Tensor | None, by_logp: Tensor) -> None:
        """The objective's gradient (n,) by the divergence, and by learner_logp times the factor of `conclude`."""
        self._on_raised = -by_logp

    def turn(self, number: int, rows: slice) -> Tensor:
        """A block's gradient by the logits, (C, n), in memory; the share of the targets' own logits is not in it."""
        return self._view.memory.block(0, rows).mul_(self._on_raised)


class WholeLesson(Lesson):
    """A teacher of the student's vocabulary, whole."""

    def __init__(self, view: View, reader: Reads, spec: Divergence | None):
        super().__init__(view)
        self._reader, self._spec = reader, spec
        self.twice = spec is not None and spec.kind == "jsd"
        self._bits = view.zeros()
        self._pull: Pull | None = None
        self._on_kept: Tensor | None = None

    def begin(self) -> None:
        self._sum, self._cross = self._view.zeros(), self._view.zeros()

    def scratch(self, rows: slice, bits: Tensor) -> Tensor:
        return bits if self._spec is None else self._view.memory.block(1, rows)

    def add(self, number: int, rows: slice, bits: Tensor, raised: Tensor) -> None:
        teacher = self._reader.block(rows)
        self._view.marks.read(number, teacher, self._bits)
        if self._spec is None:
            self._sum += teacher.exp2_().sum(0)
        elif self.twice:
            self._view.memory.block(0, rows).copy_(bits)
            self._view.memory.block(1, rows).copy_(teacher)
            self._sum += teacher.exp2_().sum(0)
        else:
            total, cross = add_kl(self._spec.kind, bits, teacher, raised, self._view.memory.block(1, rows))
            self._sum += total
            self._cross += cross

    def fits(self) -> bool:
        return fits(self._sum)

    def refer_to_largest(self) -> None:
        self._reader.refer_to_largest(self._view.blocks)

    def conclude(self, total: Tensor) -> tuple[Tensor | None, Tensor]:
        if self._spec is None:
            return None, 1 / total
        if self.twice:
            return self._walk_again(total), torch.ones_like(total)
        value, self._pull = conclude_kl(self._spec.kind, self._cross, total, self._sum)
        return value, 1 / total

    def _walk_again(self, total: Tensor) -> Tensor:
        student_kl, teacher_kl = (torch.zeros_like(total) for _ in range(2))
        totals = total.log2(), self._sum.log2()
        for rows in self._view.blocks:
            ours, theirs = (self._view.memory.block(which, rows).sub_(log) for which, log in enumerate(totals))
            mine, other = add_jsd(self._spec.beta, ours, theirs)
            student_kl += mine
            teacher_kl += other
        value, self._pull = conclude_jsd(self._spec.beta, student_kl, teacher_kl)
        return value

    def logp(self) -> Tensor:
        return (self._bits - self._sum.log2()) * NATS

    def weigh(self, by_divergence: Tensor | None, by_logp: Tensor) -> None:
        super().weigh(by_divergence, by_logp)
        if by_divergence is not None:
            self._on_raised, self._on_kept = by_divergence * self._pull.e - by_logp, by_divergence * self._pull.x

    def turn(self, number: int, rows: slice) -> Tensor:
        if self._on_kept is None:
            return super().turn(number, rows)
        # not addcmul: its one rounding less would leave a student that is its teacher a gradient of 1e-10
        return self._view.memory.block(1, rows).mul_(self._on_kept).add_(super().turn(number, rows))
