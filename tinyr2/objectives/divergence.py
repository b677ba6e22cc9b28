"""Divergences between a student's and a teacher's next-token distributions, over the whole vocabulary.

In: log-probabilities (n, V) of both. Out: the divergence of each of the n tokens, and its gradient with respect to the
student's logits, in closed form.
"""

import math
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from tinyr2.core.config import Config


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


def measure(
    spec: Divergence,
    student_logp: Tensor,
    teacher_logp: Tensor,
    *,
    student_prob: Tensor | None = None,
    gradient: bool = True,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The divergence of each token, (n,) nats, and its gradient with respect to the student's logits, (n, V).

    student_logp, teacher_logp (n, V) nats, normalized and finite: a probability may round to 0, its logarithm may not
    be -inf    student_prob (n, V) exp(student_logp), where the caller has it already
    gradient   False: only the values; None stands for the gradient
    overwrite  True: teacher_logp's memory may be used, and is garbage afterwards (or holds the gradient)

    With S the student, T the teacher and M = beta T + (1 - beta) S (Agarwal et al. 2023, arXiv 2306.13649, Section 2):
        reverse_kl  KL(S||T)                                gradient  S (log S - log T - KL(S||T))
        forward_kl  KL(T||S)                                gradient  S - T
        jsd         beta KL(T||M) + (1 - beta) KL(S||M)     gradient  (1 - beta) S (log S - log M - KL(S||M))
    """
    assert student_logp.shape == teacher_logp.shape, f"{tuple(student_logp.shape)} and {tuple(teacher_logp.shape)}"
    prob = student_logp.exp() if student_prob is None else student_prob
    work = teacher_logp if overwrite else teacher_logp.clone()
    if spec.kind == "reverse_kl":
        return _reverse_kl(student_logp, prob, work, gradient)
    if spec.kind == "forward_kl":
        return _forward_kl(student_logp, prob, work, gradient)
    return _jsd(student_logp, prob, work, gradient, spec.beta)


def _reverse_kl(student_logp: Tensor, prob: Tensor, work: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
    gap = torch.sub(student_logp, work, out=work)
    value = _mean(prob, gap)
    return value, gap.sub_(value[:, None]).mul_(prob) if gradient else None


def _forward_kl(student_logp: Tensor, prob: Tensor, work: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
    gap = work - student_logp
    teacher_prob = work.exp_()
    value = _mean(teacher_prob, gap)
    return value, torch.sub(prob, teacher_prob, out=teacher_prob) if gradient else None


def _jsd(
    student_logp: Tensor, prob: Tensor, work: Tensor, gradient: bool, beta: float
) -> tuple[Tensor, Tensor | None]:
    mixture = torch.logaddexp(student_logp + math.log1p(-beta), work + math.log(beta))
    teacher_prob = work.exp()
    teacher_kl = _mean(teacher_prob, work.sub_(mixture))
    gap = torch.sub(student_logp, mixture, out=mixture)
    student_kl = _mean(prob, gap)
    value = beta * teacher_kl + (1 - beta) * student_kl
    return value, gap.sub_(student_kl[:, None]).mul_(prob).mul_(1 - beta) if gradient else None


def _mean(prob: Tensor, values: Tensor) -> Tensor:
    # A sum and no batched product: products may run in TF32, which would leave three digits of a small divergence.
    return (prob * values).sum(-1)
