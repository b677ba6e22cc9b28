"""A chunk of tokens against the whole vocabulary: what an objective wants to know, then what its gradient does.

In: a job, the chunk, and memory for its logits. Out: per-token scores, and, given the objective's gradient with respect
to them, the gradients of hidden states, weight and bias. The vocabulary goes by in blocks that stay in the caches; what
the gradient needs is kept from the first walk, so that no logit is made twice (but where one would have overflowed).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tinyr2.models.products import Packed, by_input, by_weight
from tinyr2.models.side import Marks, Reader, Side, parts
from tinyr2.models.topk import TopK, compare
from tinyr2.objectives.divergence import NATS, Divergence, Pull, add_jsd, add_kl, conclude_jsd, conclude_kl

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
    teacher: Side | None
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

    @property
    def narrow(self) -> bool:
        """Whether the vocabulary is one block of any chunk: then products are best done as they are written."""
        weight = self.student.weight
        return weight.device.type == "cpu" and len(weight) * CPU_ROWS <= CPU_BLOCK

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
        """Memory for chunks of up to `rows` tokens: 2^s, the teacher's part, the softcap's slope where there is one."""
        vocab = len(self.student.weight)
        size = rows * vocab if self.keeps else min(rows * vocab, max(self.block, rows))
        wanted = (True, self.teacher is not None and self.divergence is not None,
                  any(self.learns) and self.student.bound is not None)
        like = self.student.hidden
        return [torch.empty(size, dtype=self.student.work, device=like.device) if w else None for w in wanted]


@dataclass
class _Sums:
    """Over the vocabulary, (n,) each: of 2^s, of s 2^s, of the teacher's 2^t, and the divergence's own."""

    student: Tensor
    weighted: Tensor
    teacher: Tensor
    cross: Tensor

    def fits(self) -> bool:
        """Whether no sum came near the largest number: a token's reference was far below its largest logit."""
        limit = 2.0**100 if self.student.dtype == torch.float32 else 2.0**1000
        return bool(((self.student < limit) & (self.teacher < limit)).all())


class Chunk:
    """n tokens between the first walk over the vocabulary, `score`, and the second, `differentiate`."""

    def __init__(self, job: Job, part: slice, space: list[Tensor | None]):
        self._job, self._part, self._space = job, part, space
        self._targets = job.targets[part]
        self._blocks = list(parts(0, len(job.student.weight), max(1, job.block // len(self._targets))))
        self._student = Reader(job.student, part, narrow=job.narrow)
        self._teacher = None if job.teacher is None else Reader(job.teacher, part, narrow=job.narrow)
        self._marks = Marks(self._targets[:, None], self._blocks)
        self._target_bits, self._teacher_bits = (
            torch.zeros(len(self._targets), dtype=job.student.work, device=self._targets.device) for _ in range(2))
        buckets = job.topk is not None and job.divergence is not None
        self._listed = Marks(job.topk.ids[part], self._blocks) if buckets else None
        self._listed_bits = self._target_bits.new_zeros(self._listed.shape) if buckets else None

    def _kept(self, which: int, rows: slice) -> Tensor | None:
        """The block of memory `which` for these rows of the vocabulary, (C, n)."""
        flat, n = self._space[which], len(self._targets)
        if flat is None:
            return None
        if self._job.narrow:
            return flat[: n * rows.stop].view(n, -1).t()
        start = rows.start if self._job.keeps else 0
        return flat[start * n: (start + rows.stop - rows.start) * n].view(-1, n)

    def score(self) -> TokenScores:
        """What the objective sees; what `differentiate` needs stays in the memory."""
        sums = self._walk()
        if not sums.fits():
            for reader in (self._student, self._teacher):
                if reader is not None:
                    reader.refer_to_largest(self._blocks)
            sums = self._walk()
        value = self._conclude(sums)
        total = sums.student.log2()
        teacher_logp = None
        if self._teacher is not None:
            teacher_logp = (self._teacher_bits - sums.teacher.log2()) * NATS
        elif self._job.topk is not None:
            teacher_logp = self._job.topk.logp_of(self._targets, self._part).to(total.dtype)
        return TokenScores(
            learner_logp=(self._target_bits - total) * NATS, divergence=value,
            entropy=(total - sums.weighted / sums.student) * NATS, teacher_logp=teacher_logp, part=self._part)

    def _walk(self) -> _Sums:
        sums = _Sums(*(torch.zeros_like(self._target_bits) for _ in range(4)))
        for number, rows in enumerate(self._blocks):
            self._add(number, rows, sums)
        if self._listed is not None:  # their 2^s were left out, so that the rest is summed and not a difference
            raised = self._listed_bits.exp2()
            sums.cross = sums.student.clone()
            sums.student += raised.sum(-1)
            sums.weighted += (raised * self._listed_bits).sum(-1)
        return sums

    def _add(self, number: int, rows: slice, sums: _Sums) -> None:
        job = self._job
        bits = self._student.block(rows, self._kept(2, rows))
        self._marks.read(number, bits, self._target_bits)
        raised = bits.exp2() if job.twice else torch.exp2(bits, out=self._kept(0, rows))
        if self._listed is not None:
            self._listed.read(number, bits, self._listed_bits)
            self._listed.write(number, raised, torch.zeros_like(self._listed_bits))
        sums.student += raised.sum(0)
        kept = self._kept(1, rows)
        sums.weighted += torch.mul(raised, bits, out=bits if kept is None else kept).sum(0)
        if self._teacher is None:
            return
        teacher = self._teacher.block(rows)
        self._marks.read(number, teacher, self._teacher_bits)
        if kept is None:
            sums.teacher += teacher.exp2_().sum(0)
        elif job.twice:
            self._kept(0, rows).copy_(bits)
            kept.copy_(teacher)
            sums.teacher += teacher.exp2_().sum(0)
        else:
            total, cross = add_kl(job.divergence.kind, bits, teacher, raised, kept)
            sums.teacher += total
            sums.cross += cross

    def _conclude(self, sums: _Sums) -> Tensor | None:
        """The divergence; notes its pull, and the factor that makes the kept 2^s probabilities."""
        job, spec = self._job, self._job.divergence
        self._pull, self._scale = None, 1 / sums.student
        if spec is None:
            return None
        if self._listed is not None:
            value, self._pull = compare(spec, self._listed_bits, sums.cross, sums.student, job.topk.logp[self._part],
                                        whole=self._listed.shape[1] == len(job.student.weight))
        elif job.twice:
            value, self._pull = self._walk_again(spec.beta, sums)
            self._scale = torch.ones_like(sums.student)
        else:
            value, self._pull = conclude_kl(spec.kind, sums.cross, sums.student, sums.teacher)
        return value

    def _walk_again(self, beta: float, sums: _Sums) -> tuple[Tensor, Pull]:
        student_kl, teacher_kl = (torch.zeros_like(sums.student) for _ in range(2))
        totals = sums.student.log2(), sums.teacher.log2()
        for rows in self._blocks:
            ours, theirs = (self._kept(which, rows).sub_(total) for which, total in enumerate(totals))
            mine, other = add_jsd(beta, ours, theirs)
            student_kl += mine
            teacher_kl += other
        return conclude_jsd(beta, student_kl, teacher_kl)

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
        shares = self._shares(by_logp, by_divergence)
        for number, rows in enumerate(self._blocks):
            pull = self._turn(number, rows, by_logp, *shares)
            if to_states is not None:
                to_states[self._part] += self._by_states(pull, side.weight[rows])
            if weigh is not None:
                to_weight[rows] += weigh(pull)
            if to_bias is not None:
                to_bias[rows] += pull.sum(1)

    def _shares(self, by_logp: Tensor | None, by_divergence: Tensor | None) -> tuple[Tensor, ...]:
        """Factors (n,) on the two kept blocks, and what stands at the teacher's ids (n, k); None where nothing does."""
        on_raised, on_kept, at_listed = torch.zeros_like(self._scale), None, None
        if by_divergence is not None:
            if self._listed is None:
                on_raised, on_kept = by_divergence * self._pull.e, by_divergence * self._pull.x
            else:
                on_raised, at_listed = by_divergence * self._pull.rest, by_divergence[:, None] * self._pull.listed
        if by_logp is not None:
            on_raised = on_raised - by_logp * self._scale
        if self._listed is not None and by_logp is not None:
            prob = self._listed_bits.exp2() * (self._scale * by_logp)[:, None]
            at_listed = -prob if at_listed is None else at_listed - prob
        return on_raised, on_kept, at_listed

    def _turn(self, number: int, rows: slice, by_logp: Tensor | None, on_raised: Tensor, on_kept: Tensor | None,
              at_listed: Tensor | None) -> Tensor:
        """A block's gradient by the raw logits, (C, n), in the kept memory."""
        raised = self._kept(0, rows)
        if on_kept is None:
            pull = raised.mul_(on_raised)
        else:
            # not addcmul: its one rounding less would leave a student that is its teacher a gradient of 1e-10
            pull = self._kept(1, rows).mul_(on_kept).add_(raised.mul_(on_raised))
        if at_listed is not None:
            self._listed.write(number, pull, at_listed)
        if by_logp is not None:
            self._marks.write(number, pull, by_logp, add=True)
        slope = self._kept(2, rows)
        return pull if slope is None else pull.mul_(slope)

    def _by_states(self, pull: Tensor, weight: Tensor) -> Tensor:
        """pull (C, n)^T @ weight (C, D) → (n, D)."""
        work = self._job.student.work
        if weight.dtype != work:
            return torch.mm(pull.to(weight.dtype).t(), weight, out_dtype=work)
        # a wide block runs down its C rows, and a sum over these is what `by_weight` is made for
        return by_input(pull.t(), weight) if self._job.narrow else by_weight(pull, weight)

    def _weigher(self) -> Callable[[Tensor], Tensor]:
        """What turns a pull (C, n) into pull @ states (n, D) → (C, D)."""
        states, work = self._job.student.hidden[self._part], self._job.student.work
        if states.dtype != work:
            return lambda pull: torch.mm(pull.to(states.dtype), states, out_dtype=work)
        return (lambda pull: by_weight(pull.t(), states)) if self._job.narrow else Packed(states.t(), exact=True)
