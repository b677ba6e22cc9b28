"""A teacher that names its k likeliest tokens: everything else is one bucket on both sides, or is left out.

In: the teacher's ids and log-probs, and the student's logits at these ids. Out: the divergence over k + 1 buckets, or
the corrected KL over the k, and its gradient with respect to the student's logits. Memory is that of (N, k).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tinyr2.core.errors import ConfigError, DataError
from tinyr2.models.lesson import Lesson, Sums, View
from tinyr2.models.side import Marks
from tinyr2.objectives.divergence import NATS, Divergence, measure, truncated

# How far above 1 a list's probabilities may add up: log-probs in half precision are that coarse.
EXCESS = 1e-2
# Bits of the student's logit where a list has no entry: 2 to this is 0, and 0 times it is not NaN.
ABSENT = -1e4


@dataclass(frozen=True)
class TopK:
    """What a teacher says of N tokens: its k likeliest ones each, at the temperature of the run.

    tail "bucket": the mass that the k leave is one bucket, compared with the student's own mass outside the k. Where
    rounding leaves nothing or less, the bucket holds what the precision cannot tell from nothing: 1e-7 in float32.
    tail "none": the rest is not looked at, and the KL is the corrected one of `objectives.divergence.truncated`.
    A list may be shorter than k: an entry with log-prob -inf is absent, whatever its id.
    """

    ids: Tensor  # (N, k) int64, no token twice in a row
    logp: Tensor  # (N, k) nats, at the run's temperature; -inf: no entry
    tail: Literal["bucket", "none"] = "bucket"

    def check(self, count: int, vocab: int) -> None:
        """DataError where this is no list of distinct tokens of the vocabulary with their probabilities."""
        shape = tuple(self.ids.shape)
        assert shape == tuple(self.logp.shape) and len(shape) == 2 and shape[1] > 0, f"ids {shape}, logp"
        assert shape[0] == count, f"{shape[0]} lists for {count} tokens"
        assert self.tail in ("bucket", "none"), f"tail bucket or none, not {self.tail}"
        if count == 0:
            return
        # absent entries stand as themselves: as many distinct numbers beyond the vocabulary
        beyond = torch.arange(vocab, vocab + shape[1], device=self.ids.device)
        absent = self.logp == -math.inf
        ids = self.ids.where(~absent, beyond)
        low, high = int(ids.min()), int(self.ids.masked_fill(absent, 0).max())
        if low < 0 or high >= vocab:
            raise DataError(f"a teacher's list names token {low if low < 0 else high} of a vocabulary of {vocab}; "
                            "teacher and student must share one tokenizer")
        rows = ids.sort(-1).values
        if bool((rows[:, 1:] == rows[:, :-1]).any()):
            raise DataError("a teacher's list names a token twice; give each of the k likeliest once")
        most = float(self.logp.double().exp().sum(-1).max())
        if not most <= 1 + EXCESS:
            raise DataError(f"a teacher's listed probabilities add up to {most:.4g}; give normalized log-probs in "
                            "nats, at the run's temperature")

    def check_divergence(self, spec: Divergence) -> None:
        """ConfigError where the list cannot tell this divergence."""
        if self.tail == "none" and spec.kind == "jsd":
            raise ConfigError("a teacher's list without its tail (tail: none) has no JSD; set the divergence to "
                              "reverse_kl or forward_kl, or the tail to bucket")

    def present(self, part: slice) -> Tensor | None:
        """(n, k) bool, which entries of a part are there; None: all."""
        there = self.logp[part] != -math.inf
        return None if bool(there.all()) else there

    def logp_of(self, targets: Tensor, part: slice) -> Tensor:
        """(n,) nats of the targets (n,) of a part; NaN where the list does not name the target."""
        logp = self.logp[part]
        named = (self.ids[part] == targets[:, None]) & (logp != -math.inf)
        found = logp.masked_fill(~named, 0.0).sum(-1)
        return found.masked_fill(~named.any(-1), float("nan"))


@dataclass(frozen=True)
class BucketPull:
    """A divergence's gradient by the student's logits: at the k ids, and as a factor on 2^s of every other token."""

    listed: Tensor  # (n, k)
    rest: Tensor  # (n,)


def compare(
    spec: Divergence, listed: Tensor, rest: Tensor, total: Tensor, teacher_logp: Tensor, *, whole: bool
) -> tuple[Tensor, BucketPull]:
    """The divergence (n,) nats over the k ids and the bucket of all others, and its pull.

    listed (n, k) the student's logits s there, in bits    rest, total (n,) its sums of 2^s outside the k, and over all
    teacher_logp (n, k) nats    whole: the k are the vocabulary, and there is no other bucket
    """
    floor = torch.finfo(total.dtype)
    teacher = teacher_logp.to(total.dtype).clamp_min(math.log(floor.tiny))
    student = (listed - total.log2()[:, None]) * NATS
    if whole:
        value, pull = measure(spec, student, teacher)
        return value, BucketPull(pull, torch.zeros_like(rest))
    rest = rest.clamp_min(floor.tiny)
    tail = (1 - teacher.double().exp().sum(-1)).clamp_min(floor.eps).to(total.dtype).log()
    student_tail = (rest.log2() - total.log2()) * NATS
    both = (torch.cat([named, other[:, None]], -1) for named, other in ((student, student_tail), (teacher, tail)))
    value, pull = measure(spec, *both)
    return value, BucketPull(pull[:, :-1], pull[:, -1] / rest)


def compare_truncated(
    spec: Divergence, listed: Tensor, total: Tensor, teacher_logp: Tensor
) -> tuple[Tensor, BucketPull]:
    """The corrected KL (n,) nats over the k ids alone, and its pull; arguments as in `compare`."""
    teacher = teacher_logp.to(total.dtype).clamp_min(math.log(torch.finfo(total.dtype).tiny))
    value, by_prob = truncated(spec.kind, student := (listed - total.log2()[:, None]) * NATS, teacher)
    # by_prob is p times the derivative by p; the softmax takes from every token its share of their sum
    prob, shift = student.exp(), by_prob.sum(-1)
    return value, BucketPull(by_prob - prob * shift[:, None], -shift / total)


class ListLesson(Lesson):
    """A teacher that names its k likeliest tokens."""

    def __init__(self, view: View, topk: TopK, spec: Divergence | None):
        super().__init__(view)
        self._topk, self._spec = topk, spec
        self._pull: BucketPull | None = None
        if spec is not None:
            present = topk.present(view.part)
            self._whole = present is None and topk.ids.shape[1] == view.blocks[-1].stop
            self._listed = Marks(topk.ids[view.part], view.blocks, present)
            self._bits = view.zeros()[:, None].expand(self._listed.shape).clone()
            self._nothing = torch.zeros_like(self._bits)
            if present is not None:
                self._bits[~present] = ABSENT

    def mark(self, number: int, bits: Tensor, raised: Tensor) -> None:
        if self._spec is not None:
            self._listed.read(number, bits, self._bits)
            self._listed.write(number, raised, self._nothing)

    def end(self, sums: Sums) -> None:
        if self._spec is None:
            return
        raised = self._bits.exp2()  # left out so far, so that the rest is summed and not a difference
        self._rest = sums.raised.clone()
        sums.raised += raised.sum(-1)
        sums.weighted += (raised * self._bits).sum(-1)

    def conclude(self, total: Tensor) -> tuple[Tensor | None, Tensor]:
        if self._spec is None:
            return None, 1 / total
        logp = self._topk.logp[self._view.part]
        if self._topk.tail == "none":
            value, self._pull = compare_truncated(self._spec, self._bits, total, logp)
        else:
            value, self._pull = compare(self._spec, self._bits, self._rest, total, logp, whole=self._whole)
        return value, 1 / total

    def logp(self) -> Tensor:
        return self._topk.logp_of(self._view.targets, self._view.part).to(self._view.work)

    def weigh(self, by_divergence: Tensor | None, by_logp: Tensor) -> None:
        super().weigh(by_divergence, by_logp)
        if self._spec is None:
            return
        self._at_listed = -(self._bits.exp2() * by_logp[:, None])
        if by_divergence is not None:
            self._on_raised = by_divergence * self._pull.rest - by_logp
            self._at_listed = by_divergence[:, None] * self._pull.listed + self._at_listed

    def turn(self, number: int, rows: slice) -> Tensor:
        pull = super().turn(number, rows)
        if self._spec is not None:
            self._listed.write(number, pull, self._at_listed)
        return pull
