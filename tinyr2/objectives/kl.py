"""The KL to a reference policy from the sampled tokens alone. In: log-probs of both. Out: an estimate per token."""

from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]


def estimate(estimator: Estimator, learner_logp: Tensor, reference_logp: Tensor) -> Tensor:
    """An estimate of KL(learner || reference) at each token that the learner sampled, (N,) nats.

    learner_logp (N,) nats, may need grad    reference_logp (N,) nats, of the same tokens
    With d = learner_logp - reference_logp (Schulman 2020, "Approximating KL Divergence"):
        k1  d                unbiased
        k2  d^2 / 2          biased, low variance
        k3  exp(-d) - 1 + d  unbiased, never negative
    That speaks of values. As a loss, where the gradient flows through the estimate itself, on-policy k1 has an
    expected gradient of zero, k2 has that of the token's KL, and k3 has not.
    """
    gap = learner_logp - reference_logp
    if estimator == "k1":
        return gap
    if estimator == "k2":
        return gap.square() / 2
    assert estimator == "k3", f"k1, k2 or k3, not {estimator}"
    return torch.expm1(-gap) + gap  # for small gaps exp(-d) - 1 would keep no digit
