"""Divergences between a student's and a teacher's next-token distributions.

In: log-probabilities (n, V) of both, or their logits block by block of the vocabulary. Out: the divergence of each of
the n tokens, and its gradient with respect to the student's logits, in closed form.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from tinyr2.core.config import Config

NATS = math.log(2.0)  # nats in a bit


class Divergence(Config):
    """Which divergence.

    Divergence(kind="jsd", beta=0.1)
    """

    kind: Literal["reverse_kl", "forward_kl", "jsd"] = "reverse_kl"
    beta: float = Field(0.5, gt=0.0, lt=1.0)  # the teacher's share of the mixture; read by jsd alone

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value


def measure(spec: Divergence, student_logp: Tensor, teacher_logp: Tensor) -> tuple[Tensor, Tensor]:
    """The divergence of each token, (n,) nats, and its gradient with respect to the student's logits, (n, V).

    student_logp, teacher_logp (n, V) nats, normalized and finite: a probability may round to 0, its logarithm may not
    be -inf

    With S the student, T the teacher and M = beta T + (1 - beta) S (Agarwal et al. 2023, arXiv 2306.13649, Section 2):
        reverse_kl  KL(S||T)                                gradient  S (log S - log T - KL(S||T))
        forward_kl  KL(T||S)                                gradient  S - T
        jsd         beta KL(T||M) + (1 - beta) KL(S||M)     gradient  (1 - beta) S (log S - log M - KL(S||M))
    """
    assert student_logp.shape == teacher_logp.shape, f"{tuple(student_logp.shape)} and {tuple(teacher_logp.shape)}"
    student, teacher = student_logp.exp(), teacher_logp.exp()
    if spec.kind == "forward_kl":
        return _mean(teacher, teacher_logp - student_logp), student - teacher
    if spec.kind == "reverse_kl":
        gap = student_logp - teacher_logp
        value = _mean(student, gap)
        return value, student * (gap - value[:, None])
    beta = spec.beta
    mixture = torch.logaddexp(student_logp + math.log1p(-beta), teacher_logp + math.log(beta))
    gap = student_logp - mixture
    kl = _mean(student, gap)
    value = beta * _mean(teacher, teacher_logp - mixture) + (1 - beta) * kl
    return value, (1 - beta) * student * (gap - kl[:, None])


def truncated(kind: str, student_logp: Tensor, teacher_logp: Tensor) -> tuple[Tensor, Tensor]:
    """A KL of each token over a part of the vocabulary, corrected for what it leaves out.

    student_logp, teacher_logp (n, k) nats, finite, over k tokens whose probabilities need not add up to 1
    Out: the divergence (n,) nats, and S times its derivative by the student's probabilities S, (n, k)
        reverse_kl  sum of S (log S - log T) - S + T        S (log S - log T)
        forward_kl  sum of T (log T - log S) - T + S        S - T
    Every term is at least 0, and is 0 where S = T alone. The plain sum of S (log S - log T) over a part is least, and
    below 0, where the student has taken most of its mass out of the part. The generalized KL of unnormalized measures:
    Csiszar 1991, "Why Least Squares and Maximum Entropy?", Annals of Statistics 19.
    """
    student, teacher = student_logp.exp(), teacher_logp.exp()
    if kind == "reverse_kl":
        by_prob = student * (student_logp - teacher_logp)
        return (by_prob - student + teacher).sum(-1), by_prob
    assert kind == "forward_kl", f"reverse_kl or forward_kl, not {kind}"
    return (teacher * (teacher_logp - student_logp) - teacher + student).sum(-1), student - teacher


def _mean(prob: Tensor, values: Tensor) -> Tensor:
    # A sum and no batched product: products may run in TF32, which would leave three digits of a small divergence.
    return (prob * values).sum(-1)


@dataclass(frozen=True)
class Pull:
    """A divergence's gradient by the student's logits, from what two blocks (C, n) hold: x * kept + e * raised."""

    x: Tensor  # (n,)
    e: Tensor  # (n,)


def add_kl(kind: str, student: Tensor, teacher: Tensor, raised: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """A block of the vocabulary for one of the two KLs: the teacher's sum of 2^t, and the cross sum; both (n,).

    student, teacher (C, n) logits s and t in bits above any reference of each token: garbage afterwards
    raised           (C, n) 2^s    kept (C, n) receives what the gradient needs
    """
    if kind == "reverse_kl":
        gap = student.sub_(teacher)
        cross = torch.mul(raised, gap, out=kept).sum(0)
        return teacher.exp2_().sum(0), cross
    gap = torch.sub(teacher, student, out=student)
    torch.exp2(teacher, out=kept)
    return kept.sum(0), gap.mul_(kept).sum(0)


def conclude_kl(kind: str, cross: Tensor, student_sum: Tensor, teacher_sum: Tensor) -> tuple[Tensor, Pull]:
    """The KL (n,) nats and its pull from sums over all blocks: of `add_kl`'s cross, of 2^s and of 2^t."""
    shift = student_sum.log2() - teacher_sum.log2()
    if kind == "reverse_kl":
        mean = cross / student_sum
        scale = NATS / student_sum
        return (mean - shift) * NATS, Pull(scale, -scale * mean)
    return (cross / teacher_sum + shift) * NATS, Pull(-1 / teacher_sum, 1 / student_sum)


def add_jsd(beta: float, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """A block of the vocabulary for the JSD: KL(S||M)'s and KL(T||M)'s share of it, (n,) bits.

    student, teacher (C, n) log2-probs, finite; they turn into S and S (log2 S - log2 M), which the gradient needs
    """
    prob, teacher_prob = student.exp2(), teacher.exp2()
    # where both round to 0 the logarithm must stay finite, or 0 times it would be NaN
    mixture = torch.lerp(prob, teacher_prob, beta).clamp_min_(torch.finfo(prob.dtype).tiny).log2_()
    teacher_kl = teacher.sub_(mixture).mul_(teacher_prob).sum(0)
    kept = torch.mul(student.sub_(mixture), prob, out=teacher)
    student.copy_(prob)
    return kept.sum(0), teacher_kl


def conclude_jsd(beta: float, student_kl: Tensor, teacher_kl: Tensor) -> tuple[Tensor, Pull]:
    """The JSD (n,) nats and its pull from sums of `add_jsd`'s two shares over all blocks."""
    value = (beta * teacher_kl + (1 - beta) * student_kl) * NATS
    scale = torch.full_like(student_kl, (1 - beta) * NATS)
    return value, Pull(scale, -scale * student_kl)
