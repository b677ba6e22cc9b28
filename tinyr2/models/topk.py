"""A teacher that names its k likeliest tokens: everything else is one bucket, on both sides.

In: the teacher's ids and log-probs, and the student's logits at these ids. Out: the divergence over k + 1 buckets, and
its gradient with respect to the student's logits. Memory is that of (N, k).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tinyr2.core.errors import DataError
from tinyr2.objectives.divergence import NATS, Divergence, measure

# How far above 1 a list's probabilities may add up: log-probs in half precision are that coarse.
EXCESS = 1e-2


@dataclass(frozen=True)
class TopK:
    """What a teacher says of N tokens: its k likeliest ones each, at the temperature of the run.

    The mass that the k leave is one bucket, compared with the student's own mass outside the k. Where rounding leaves
    nothing or less, the bucket holds what the precision cannot tell from nothing: 1e-7 in float32.
    """

    ids: Tensor  # (N, k) int64, no token twice in a row
    logp: Tensor  # (N, k) nats, at the run's temperature

    def check(self, count: int, vocab: int) -> None:
        """DataError where this is no list of distinct tokens of the vocabulary with their probabilities."""
        shape = tuple(self.ids.shape)
        assert shape == tuple(self.logp.shape) and len(shape) == 2 and shape[1] > 0, f"ids {shape}, logp"
        assert shape[0] == count, f"{shape[0]} lists for {count} tokens"
        if count == 0:
            return
        low, high = int(self.ids.min()), int(self.ids.max())
        if low < 0 or high >= vocab:
            raise DataError(f"a teacher's list names token {low if low < 0 else high} of a vocabulary of {vocab}; "
                            "teacher and student must share one tokenizer")
        rows = self.ids.sort(-1).values
        if bool((rows[:, 1:] == rows[:, :-1]).any()):
            raise DataError("a teacher's list names a token twice; give each of the k likeliest once")
        most = float(self.logp.double().exp().sum(-1).max())
        if not most <= 1 + EXCESS:
            raise DataError(f"a teacher's listed probabilities add up to {most:.4g}; give normalized log-probs in "
                            "nats, at the run's temperature")

    def logp_of(self, targets: Tensor, part: slice) -> Tensor:
        """(n,) nats of the targets (n,) of a part; NaN where the list does not name the target."""
        named = self.ids[part] == targets[:, None]
        found = self.logp[part].masked_fill(~named, 0.0).sum(-1)
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
