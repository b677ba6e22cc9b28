"""Distillation on given text: soft targets beside hard ones, and hidden states beside both.

In: per-token divergences, negative log-likelihoods and hidden states. Out: a scalar to minimize, or a distance per
token.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor


def soft_hard(divergence: Tensor, nll: Tensor, *, temperature: float, soft_weight: Tensor | float,
              hard_weight: Tensor | float, denom: float) -> Tensor:
    """sum(soft_weight * T^2 * divergence + hard_weight * nll) / denom, a scalar; the weights are held constant.

    divergence (N,) nats, between student and teacher both at temperature T, needs grad
    nll        (N,) nats, -log p_S of the data's token, needs grad
    soft_weight, hard_weight  (N,), or one number each    denom  tokens per step
    The gradients of soft targets shrink as 1 / T^2; with the factor the two weights keep their meaning when T changes.
    Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", Section 2.
    """
    soft, hard = (w.detach() if isinstance(w, Tensor) else w for w in (soft_weight, hard_weight))
    return (soft * temperature**2 * divergence + hard * nll).sum() / denom


def by_entropy(teacher_entropy: Tensor, soft_weight: float, vocab: int) -> Tensor:
    """The soft targets' share of each token, soft_weight * (1 - H / ln vocab), (N,), held constant.

    teacher_entropy H (N,) nats    soft_weight >= 0, the share where the teacher is sure    vocab: tokens, > 1
    The hard target's share is the rest of what the two have together: where the teacher is unsure, the data's token
    counts more. In [0, soft_weight]; what rounding takes beyond is cut off.
    """
    assert soft_weight >= 0 and vocab > 1, f"soft_weight {soft_weight}, vocab {vocab}"
    most = teacher_entropy.new_tensor(float(vocab)).log()
    return soft_weight * (1 - teacher_entropy.detach() / most).clamp(0.0, 1.0)


def linear(start: float, end: float, progress: float) -> float:
    """A weight that goes from start to end as the share of the steps that are done, `progress`, goes from 0 to 1."""
    assert 0 <= progress <= 1, f"progress {progress}"
    return start + (end - start) * progress


def hidden_gap(student: Tensor, teacher: Tensor, kind: Literal["mse", "cosine"]) -> Tensor:
    """How far each token's states are apart, (N,).

    student (N, D), projected to the teacher's width, needs grad    teacher (N, D), held constant
    mse     the mean over the D of the squared difference
    cosine  1 - cos of the angle between the two, in [0, 2]; it leaves the states' lengths alone
    """
    assert student.shape == teacher.shape, f"{tuple(student.shape)} and {tuple(teacher.shape)}"
    teacher = teacher.detach()
    if kind == "mse":
        return (student - teacher).square().mean(-1)
    assert kind == "cosine", f"mse or cosine, not {kind}"
    return 1 - F.cosine_similarity(student, teacher, dim=-1)
