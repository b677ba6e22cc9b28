"""From logits to tokens: temperature, truncation, and inverse-CDF sampling with a uniform number of the row's own.

In: logits (R, V) of R rows and a uniform in [0, 1) each. Out: token ids (R,) and their log-probs (R,) in nats, at the
sampling temperature and over the whole vocabulary, whatever truncation did. A row's outcome depends on that row alone,
to the bit: every reduction runs within a row, in an order that the number of rows does not change.
"""

import math
from collections.abc import Callable

import torch
from pydantic import Field, field_validator
from torch import Tensor

from tinyr2.core.config import Config
from tinyr2.core.errors import RunError

# Elements handled at a time on a CPU (8 MB): their probabilities stay in the cache between passes, and in memory that
# the allocator has at hand, where larger tensors would be mapped, page by page, on each call.
_CHUNK = 2**21
_BLOCK = 256  # tokens summed together in a wide vocabulary; near sqrt(V), so that neither level of the search is long
_WIDE = 1024  # from more tokens than this on, many rows cost less through block sums than in one cumulative sum
_HEAD = 256  # tokens sorted for top-p, in the hope that they hold the share


class SamplingConfig(Config):
    """How tokens are drawn, and what ends an answer; names and neutral values are TRL's."""

    temperature: float = Field(1.0, ge=0.0)  # 0: greedy
    top_p: float = Field(1.0, gt=0.0, le=1.0)  # 1: off
    top_k: int = Field(0, ge=0)  # 0: off
    min_p: float = Field(0.0, ge=0.0, le=1.0)  # 0: off
    max_completion_length: int = Field(256, ge=1)  # tokens
    stop_strings: tuple[str, ...] = ()  # texts that end an answer, itself kept

    @field_validator("stop_strings")
    @classmethod
    def _no_empty_string(cls, strings: tuple[str, ...]) -> tuple[str, ...]:
        if "" in strings:
            raise ValueError("an empty string is part of every text and would end each answer at its first token; "
                             "remove it")
        return strings

    @property
    def truncates(self) -> bool:
        """Whether some tokens can never be drawn."""
        return self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0


def draw_tokens(logits: Tensor, uniform: Tensor, sampling: SamplingConfig) -> tuple[Tensor, Tensor]:
    """Draw one token per row.

    logits (R, V) any float dtype   uniform (R,) f64 in [0, 1)   → ids (R,) int64, logp (R,) f32 nats.
    The token is the first at which the cumulative mass exceeds u · total; one of mass 0 is never drawn. Greedy
    decoding (temperature 0) takes the first of the best and reports log-probs at temperature 1. RunError: a row holds
    NaN or +inf, or no finite number. Devroye 1986, chapter III.2 (inversion).
    """
    if logits.numel() <= _CHUNK or logits.device.type != "cpu":
        ids, logp = _draw(logits, uniform, sampling)
    else:
        rows = max(1, _CHUNK // logits.shape[1])
        parts = [_draw(x, u, sampling) for x, u in zip(logits.split(rows), uniform.split(rows), strict=True)]
        ids, logp = map(torch.cat, zip(*parts, strict=True))
    if math.isnan(logp.sum().item()):  # asked last: it waits for the device
        raise RunError("the model's logits hold NaN or +inf, or nothing but -inf, so no token can be drawn: its "
                       "weights have diverged; go back to an earlier checkpoint, or train with a lower learning_rate")
    return ids, logp


def _draw(logits: Tensor, uniform: Tensor, sampling: SamplingConfig) -> tuple[Tensor, Tensor]:
    logits = logits.float()
    if sampling.temperature == 0.0:
        ids = _argmax(logits)
        return ids[:, 0], torch.log_softmax(logits, dim=-1).gather(1, ids)[:, 0]
    # softmax works row by row within the cache; its own sum, in float32, is put right by `total`
    p = torch.softmax(logits if sampling.temperature == 1.0 else logits / sampling.temperature, dim=-1)
    mass = _cumulative(p)
    total = mass[:, -1:]  # (R, 1), 1 but for rounding
    if sampling.truncates:
        kept = _truncate(p, total, sampling)
        ids = _inverse_cdf(kept, _cumulative(kept), uniform)
    else:
        ids = _inverse_cdf(p, mass, uniform)
    return ids[:, 0], (p.gather(1, ids) / total).log().float()[:, 0]


def _cumulative(p: Tensor) -> Tensor:
    """Mass up to each token (R, V), or up to each block's end (R, blocks) in a wide vocabulary; f64 if there is one."""
    exact = torch.float32 if p.device.type == "mps" else torch.float64
    return (_by_block(p, torch.sum) if p.shape[1] > _WIDE else p).cumsum(-1, dtype=exact)


def _inverse_cdf(p: Tensor, mass: Tensor, uniform: Tensor) -> Tensor:
    """The first token at which the cumulative mass exceeds u · total. p (R, V), its `_cumulative` → ids (R, 1).

    In a row of NaN there is none; it gets the last.
    """
    below = 1.0 - torch.finfo(mass.dtype).eps / 2  # u · total must stay below total, also where u is next to 1
    point = mass[:, -1:] * below * uniform[:, None]
    found = torch.searchsorted(mass, point, right=True)
    if p.shape[1] <= _WIDE:
        return found.clamp_(max=p.shape[1] - 1)
    # What the blocks before hold is taken off. Rounding may leave a point outside of its block, by 1e-7 of its mass.
    point -= torch.where(found > 0, mass.gather(1, (found - 1).clamp_(min=0)), 0.0)
    window, tokens = _window(p, found)
    inner = window.cumsum(-1, dtype=mass.dtype)
    point = torch.minimum(point, inner[:, -1:] * below)
    return tokens.gather(1, torch.searchsorted(inner, point, right=True).clamp_(max=_BLOCK - 1))


def _argmax(x: Tensor) -> Tensor:
    """The first of a row's largest values. (R, V) → (R, 1)"""
    if x.shape[1] <= _WIDE:
        return x.argmax(-1, keepdim=True)
    window, tokens = _window(x, _by_block(x, torch.amax).argmax(-1, keepdim=True))
    return tokens.gather(1, window.argmax(-1, keepdim=True))


def _by_block(x: Tensor, reduce: Callable[[Tensor, int], Tensor]) -> Tensor:
    """(R, V) → (R, blocks), each run of `_BLOCK` tokens reduced to one number; the last run may be shorter."""
    whole = x.shape[1] // _BLOCK * _BLOCK
    found = reduce(x[:, :whole].unflatten(1, (-1, _BLOCK)), -1)
    return found if whole == x.shape[1] else torch.cat([found, reduce(x[:, whole:], -1)[:, None]], dim=1)


def _window(x: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """One block (R, 1) of each row: its values and its tokens, both (R, _BLOCK).

    A short block repeats the last token, which changes neither what comes first nor that a token has mass.
    """
    tokens = (block * _BLOCK + torch.arange(_BLOCK, device=x.device)).clamp_(max=x.shape[1] - 1)
    return x.gather(1, tokens), tokens


def _truncate(p: Tensor, total: Tensor, sampling: SamplingConfig) -> Tensor:
    """Mass 0 for what top-k, top-p and min-p cut, in that order; the rest is left unnormalized.

    p (R, V) of mass `total` (R, 1). Ties with the k-th token stay. Fan et al. 2018 (top-k); Holtzman et al. 2020, eq. 2
    (top-p); Nguyen et al. 2024 (min-p).
    """
    if 0 < sampling.top_k < p.shape[-1]:
        kth = p.topk(sampling.top_k, dim=-1).values[:, -1:]
        p = p.masked_fill(p < kth, 0.0)
        total = _cumulative(p)[:, -1:]
    if sampling.top_p < 1.0:
        p = _top_p(p, sampling.top_p * total, _HEAD)
    if sampling.min_p > 0.0:
        p = p.masked_fill(p < sampling.min_p * p.amax(-1, keepdim=True), 0.0)
    return p


def _top_p(p: Tensor, share: Tensor, width: int) -> Tensor:
    """Mass 0 for all but the fewest tokens that hold `share` (R, 1) of a row's mass.

    The `width` likeliest are sorted; the rows in which these hold less are sorted again, 16 times as far.
    """
    ordered, tokens = p.topk(min(width, p.shape[1]), dim=-1)
    upto = ordered.cumsum(-1, dtype=share.dtype)
    kept = torch.zeros_like(p).scatter_(1, tokens, ordered.masked_fill(upto - ordered >= share, 0.0))
    short = upto[:, -1] < share[:, 0]
    if width < p.shape[1] and bool(short.any()):
        kept[short] = _top_p(p[short], share[short], 16 * width)
    return kept
