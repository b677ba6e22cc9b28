"""A chunk of tokens against the whole vocabulary: what an objective wants to know, then what its gradient does.

In: a job, the chunk, and memory for its logits. Out: per-token scores, and, given the objective's gradient with respect
to them, the gradients of hidden states, weight and bias. The vocabulary goes by in blocks that stay in the caches; what
the gradient needs is kept from the first walk, so that no logit is made twice (but where one would have overflowed).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tinyr2.models.blend import Sides
from tinyr2.models.lesson import Lesson, Memory, Sums, View, WholeLesson, fits
from tinyr2.models.pairs import PairLesson, Shared
from tinyr2.models.products import Packed, by_input, by_weight
from tinyr2.models.side import Marks, Reader, Side, parts
from tinyr2.models.topk import ListLesson, TopK
from tinyr2.objectives.divergence import NATS, Divergence

# Logits of one model that are worked on at a time: on a CPU a few such blocks fit in the caches.
CPU_BLOCK, GPU_BLOCK = 2**19, 2**23
# Tokens side by side: what a product needs to run at full speed, and what one step of a vectorized loop takes.
CPU_ROWS, VECTOR = 256, 32


@dataclass(frozen=True, kw_only=True)
class TokenScores:
    """What an objective sees of n learned tokens, all at the temperature of the run."""

    learner_logp: Tensor  # (n,) nats, of the targets; requires grad while something is learned
    divergence: Tensor | None  # (n,) nats; requires grad likewise; None where none was asked for
    entropy: Tensor  # (n,) nats, detached
    teacher_logp: Tensor | None  # (n,) nats, of the targets, detached; NaN: unknown; None without a teacher
    part: slice  # which of the N tokens these are


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is the same for all chunks."""

    student: Side
    teacher: Sides | None
    shared: Shared | None  # None: the teacher has the student's vocabulary
    topk: TopK | None
    targets: Tensor  # (N,)
    divergence: Divergence | None
    learns: tuple[bool, ...]  # whether hidden, weight, bias want a gradient

    @property
    def keeps(self) -> bool:
        """Whether a chunk's logits outlive their block: for the gradient, or because the JSD reads them twice."""
        return any(self.learns) or self.twice

    @property
    def twice(self) -> bool:
        """Whether the divergence reads the logits a second time, when their sums are known."""
        return self.teacher is not None and self.divergence is not None and self.divergence.kind == "jsd"

    def narrow(self, vocab: int) -> bool:
        """Whether a vocabulary is one block of any chunk: then products are best done as they are written."""
        return self.student.weight.device.type == "cpu" and vocab * CPU_ROWS <= CPU_BLOCK

    @property
    def block(self) -> int:
        """Elements of a block."""
        return CPU_BLOCK if self.student.weight.device.type == "cpu" else GPU_BLOCK

    def rows(self, chunk_elements: int) -> int:
        """Tokens of a chunk, under this many logits per model."""
        vocab = len(self.student.weight)
        most = max(1, chunk_elements // vocab)
        if self.student.weight.device.type == "cpu":  # beyond this, products gain nothing and blocks get too short
            most = min(most, max(CPU_ROWS, CPU_BLOCK // vocab))
        return most - most % VECTOR if most > VECTOR else most

    def space(self, rows: int) -> list[Tensor | None]:
        """Memory for chunks of up to `rows` tokens: 2^s, the lesson's part, the softcap's slope where there is one."""
        vocab = len(self.student.weight)
        widths = [vocab, 0, vocab if any(self.learns) and self.student.bound is not None else 0]
        if self.teacher is not None and self.divergence is not None:
            widths[1] = vocab if self.shared is None else len(self.shared.student)
        sizes = (rows * w if self.keeps else min(rows * w, max(self.block, rows)) for w in widths)
        like = self.student.hidden
        return [torch.empty(size, dtype=self.student.work, device=like.device) if size else None for size in sizes]


class Chunk:
    """n tokens between the first walk over the vocabulary, `score`, and the second, `differentiate`."""

    def __init__(self, job: Job, part: slice, space: list[Tensor | None]):
        self._job, self._part = job, part
        self._targets, self._narrow = job.targets[part], job.narrow(len(job.student.weight))
        self._blocks = self._cut(len(job.student.weight))
        self._student = Reader(job.student, part, narrow=self._narrow)
        self._marks = Marks(self._targets[:, None], self._blocks)
        self._memory = Memory(space=space, tokens=len(self._targets), narrow=self._narrow, keeps=job.keeps)
        view = View(part=part, targets=self._targets, marks=self._marks, blocks=self._blocks, memory=self._memory,
                    work=job.student.work)
        self._target_bits = view.zeros()
        self._lesson = self._taught(view)

    def _cut(self, vocab: int) -> list[slice]:
        return list(parts(0, vocab, max(1, self._job.block // len(self._targets))))

    def _taught(self, view: View) -> Lesson:
        job = self._job
        if job.topk is not None:
            return ListLesson(view, job.topk, job.divergence)
        if job.teacher is None:
            return Lesson(view)
        blocks = self._cut(job.teacher.vocab)
        reader = job.teacher.reader(self._part, blocks, narrow=job.narrow(job.teacher.vocab))
        if job.shared is None:
            return WholeLesson(view, reader, job.divergence)
        return PairLesson(view, reader, job.shared, job.divergence, blocks)

    def score(self) -> TokenScores:
        """What the objective sees; what `differentiate` needs stays in the memory."""
        sums = self._walk()
        if not (fits(sums.raised) and self._lesson.fits()):
            self._student.refer_to_largest(self._blocks)
            self._lesson.refer_to_largest()
            sums = self._walk()
        value, self._scale = self._lesson.conclude(sums.raised)
        total = sums.raised.log2()
        return TokenScores(
            learner_logp=(self._target_bits - total) * NATS, divergence=value,
            entropy=(total - sums.weighted / sums.raised) * NATS, teacher_logp=self._lesson.logp(), part=self._part)

    def _walk(self) -> Sums:
        sums = Sums(*(torch.zeros_like(self._target_bits) for _ in range(2)))
        self._lesson.begin()
        for number, rows in enumerate(self._blocks):
            self._add(number, rows, sums)
        self._lesson.end(sums)
        return sums

    def _add(self, number: int, rows: slice, sums: Sums) -> None:
        lesson = self._lesson
        bits = self._student.block(rows, self._memory.block(2, rows))
        self._marks.read(number, bits, self._target_bits)
        raised = bits.exp2() if lesson.twice else torch.exp2(bits, out=self._memory.block(0, rows))
        lesson.mark(number, bits, raised)
        sums.raised += raised.sum(0)
        sums.weighted += torch.mul(raised, bits, out=lesson.scratch(rows, bits)).sum(0)
        lesson.add(number, rows, bits, raised)

    def differentiate(
        self, by_logp: Tensor | None, by_divergence: Tensor | None, grads: list[Tensor | None]
    ) -> None:
        """Adds the chunk's share to the gradients of hidden states (N, D), weight (V, D) and bias (V,).

        by_logp, by_divergence (n,): the objective's gradient by learner_logp and divergence, times the side's gain
        """
        if by_logp is None and by_divergence is None:
            return
        side = self._job.student
        to_states, to_weight, to_bias = grads
        weigh = None if to_weight is None else self._weigher()
        self._lesson.weigh(by_divergence, torch.zeros_like(self._scale) if by_logp is None else by_logp * self._scale)
        for number, rows in enumerate(self._blocks):
            pull = self._turn(number, rows, by_logp)
            if to_states is not None:
                to_states[self._part] += self._by_states(pull, side.weight[rows])
            if weigh is not None:
                to_weight[rows] += weigh(pull)
            if to_bias is not None:
                to_bias[rows] += pull.sum(1)

    def _turn(self, number: int, rows: slice, by_logp: Tensor | None) -> Tensor:
        """A block's gradient by the raw logits, (C, n), in the kept memory."""
        pull = self._lesson.turn(number, rows)
        if by_logp is not None:
            self._marks.write(number, pull, by_logp, add=True)
        slope = self._memory.block(2, rows)
        return pull if slope is None else pull.mul_(slope)

    def _by_states(self, pull: Tensor, weight: Tensor) -> Tensor:
        """pull (C, n)^T @ weight (C, D) → (n, D)."""
        work = self._job.student.work
        if weight.dtype != work:
            return torch.mm(pull.to(weight.dtype).t(), weight, out_dtype=work)
        # a wide block runs down its C rows, and a sum over these is what `by_weight` is made for
        return by_input(pull.t(), weight) if self._narrow else by_weight(pull, weight)

    def _weigher(self) -> Callable[[Tensor], Tensor]:
        """What turns a pull (C, n) into pull @ states (n, D) → (C, D)."""
        states, work = self._job.student.hidden[self._part], self._job.student.work
        if states.dtype != work:
            return lambda pull: torch.mm(pull.to(states.dtype), states, out_dtype=work)
        return (lambda pull: by_weight(pull.t(), states)) if self._narrow else Packed(states.t(), exact=True)
