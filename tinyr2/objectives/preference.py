"""Losses of pairs, of which one side was preferred. In: one number per side and pair. Out: a scalar to minimize."""

from torch import Tensor
from torch.nn.functional import logsigmoid


def dpo_loss(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0,
             denom: float) -> Tensor:
    """-sum of log sigmoid(beta * (chosen - rejected)) / denom, a scalar.

    chosen, rejected (P,) nats, need grad: the sum over the completion's tokens of learner_logp - reference_logp
    label_smoothing  the chance that a pair's sides were swapped (Mitchell 2023, "A note on DPO with noisy preferences")
    denom            pairs per step
    Rafailov et al. 2023, arXiv 2305.18290, eq. 7.
    """
    margin = beta * (chosen - rejected)
    right, swapped = logsigmoid(margin), logsigmoid(-margin)
    return -((1 - label_smoothing) * right + label_smoothing * swapped).sum() / denom


def bradley_terry(chosen: Tensor, rejected: Tensor, *, margin: Tensor | float = 0.0, center: float = 0.0,
                  denom: float) -> Tensor:
    """-sum of log sigmoid(chosen - rejected - margin) / denom, plus center times the mean of (chosen + rejected)^2.

    chosen, rejected (P,) scores of a reward model, need grad    margin one number, or (P,) one of each pair
    center           how strongly scores are held around zero, which pairs alone leave open
    denom            pairs per step
    Ouyang et al. 2022, InstructGPT, arXiv 2203.02155, eq. 1; the margin: Touvron et al. 2023, Llama 2, arXiv
    2307.09288, eq. 2; the centering: Eisenstein et al. 2023, arXiv 2312.09244.
    """
    loss = -logsigmoid(chosen - rejected - margin)
    return (loss + center * (chosen + rejected).square()).sum() / denom
