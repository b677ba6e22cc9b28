"""From logits to tokens: temperature, truncation, and inverse-CDF sampling with a uniform number of the row's own.

In: logits (R, V) of R rows and a uniform in [0, 1) each. Out: token ids (R,) and their log-probs (R,) in nats, at the
sampling temperature and over the whole vocabulary, whatever truncation did.
"""

import torch
from pydantic import Field
from torch import Tensor

from tinyr2.core.config import Config


class SamplingConfig(Config):
    """How tokens are drawn; names and neutral values are TRL's."""

    temperature: float = Field(1.0, ge=0.0)  # 0: greedy
    top_p: float = Field(1.0, gt=0.0, le=1.0)  # 1: off
    top_k: int = Field(0, ge=0)  # 0: off
    min_p: float = Field(0.0, ge=0.0, le=1.0)  # 0: off
    max_completion_length: int = Field(256, ge=1)  # tokens

    @property
    def truncates(self) -> bool:
        """Whether some tokens can never be drawn."""
        return self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0


def draw_tokens(logits: Tensor, uniform: Tensor, sampling: SamplingConfig) -> tuple[Tensor, Tensor]:
    """Draw one token per row.

    logits (R, V) any float dtype   uniform (R,) f64 in [0, 1)   → ids (R,) int64, logp (R,) f32 nats.
    Greedy decoding (temperature 0) reports log-probs at temperature 1.
    """
    logits = logits.float()
    greedy = sampling.temperature == 0.0
    logp = torch.log_softmax(logits if greedy else logits / sampling.temperature, dim=-1)
    ids = logp.argmax(-1) if greedy else _inverse_cdf(_truncate(logp.exp(), sampling), uniform)
    return ids, logp.gather(1, ids[:, None])[:, 0]


def _inverse_cdf(p: Tensor, uniform: Tensor) -> Tensor:
    """The first token at which the cumulative mass exceeds u · total; one of mass 0 is never drawn. (R, V) → (R,)"""
    cdf = p.cumsum(-1, dtype=torch.float64 if p.device.type != "mps" else torch.float32)
    point = uniform[:, None].to(cdf) * cdf[:, -1:]
    ids = torch.searchsorted(cdf, point, right=True)[:, 0]
    # u·total rounds up to total only where u is within one ulp of 1; the last token with mass is then the one meant
    last = (p > 0).long().cumsum(-1).argmax(-1)
    return torch.minimum(ids, last)


def _truncate(p: Tensor, sampling: SamplingConfig) -> Tensor:
    """Mass 0 for what top-k, top-p and min-p cut, in that order; the rest is left unnormalized."""
    if not sampling.truncates:
        return p
    if 0 < sampling.top_k < p.shape[-1]:
        kth = p.topk(sampling.top_k, dim=-1).values[:, -1:]
        p = p.masked_fill(p < kth, 0.0)
    if sampling.top_p < 1.0:
        ordered, index = p.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        cut = before >= sampling.top_p * ordered.sum(-1, keepdim=True)
        p = p.masked_fill(torch.zeros_like(cut).scatter(1, index, cut), 0.0)
    if sampling.min_p > 0.0:
        p = p.masked_fill(p < sampling.min_p * p.max(-1, keepdim=True).values, 0.0)
    return p
