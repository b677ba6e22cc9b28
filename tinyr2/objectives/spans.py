"""Spans: runs of tokens that a teacher with another tokenizer can only judge as one. In: log-probs of the learned
tokens, the span of each, the teacher's log-prob of each span. Out: what the tokens of a span are credited with.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tinyr2.objectives import rows


def span_gap(learner_logp: Tensor, span: Tensor, span_logp: Tensor) -> Tensor:
    """log p_T(span) - log p_S(span) at each token of the span, the whole of it and never a share; (N,), held constant.

    learner_logp (N,) nats, of all tokens of the spans: a micro-batch's, not a chunk's, which may cut a span
    span (N,) int64, the span that each token belongs to; -1: none
    span_logp (M,) nats, the teacher's log-prob of each span's bytes; NaN or infinite: unknown
    0 where there is no span, or the teacher's log-prob is unknown: see `span_known`.

    In `policy.weighted_nll` these are the weights of a policy gradient with credit per span (discount 0). What it
    estimates, for tokens that the student sampled: let k(x, c) be the chance that the tokens c, written after x, are a
    span, given that they are written. The expected gradient is that of

        sum over x, c of p(x) k(x, c) S(c|x) (log S(c|x) - log T(c|x)),

    with p(x), the chance that x is written, and k held constant: the reverse KL of the spans, each where it begins, and
    no credit for what a choice does to later spans or cuts. Where the tokens up to a span's end settle that it ends
    there, k is 0 or 1 and the spans after x are all there is: then this is KL(S || T) of the next span, once for each
    place where one begins. That takes spans that hold every token. Where some are left out, each term is the corrected
    one, S (log S - log T) - S + T; over all tokens the two corrections have no gradient, as the chances of all answers
    add up to 1. Spans of one token are `policy.sampled_reverse_kl`. Added up once per span, an answer's gaps are its
    whole log p_T - log p_S, by the chain rule.
    """
    gap = _gaps(learner_logp.detach(), span, span_logp)
    named = span.clamp_min(0)
    return gap[named].masked_fill(~span_known(span, span_logp), 0.0).to(learner_logp.dtype)


def span_known(span: Tensor, span_logp: Tensor) -> Tensor:
    """Which tokens a teacher speaks of: those in a span whose log-prob is a finite number; (N,) bool."""
    return _padded(span_logp.isfinite())[span.clamp_min(0)] & (span >= 0)


def position_weight(gap: Tensor, lengths: Sequence[int], gamma: float, *, eps: float = 1e-8) -> Tensor:
    """w_t = 1 + gamma (1 - sum_{i<t} |A_i| / (sum_i |A_i| + eps)) of each answer, (N,), held constant.

    gap (N,) nats, the advantages A, log p_T - log p_S    lengths (B,) learned tokens per answer, sum N
    gamma  how much more than 1 an answer's first token counts; the weight falls to 1 as the answer's gap is used up
    IW-OPD: arXiv 2606.22600, the position weight; gamma 0.5 there. Without any gap every token weighs 1 + gamma.
    """
    size, places = rows.pad(gap.detach().abs().double(), lengths)
    if size.numel() == 0:
        return gap.detach().clone()
    before = size.cumsum(1) - size
    weight = 1 + gamma * (1 - before / (size.sum(1, keepdim=True) + eps))
    return weight[places].to(gap.dtype)


def _gaps(logp: Tensor, span: Tensor, span_logp: Tensor) -> Tensor:
    """(M,) or, where there is no span, (1,), float64: the gap of each span."""
    target = _padded(span_logp.double())
    inside = span >= 0
    # in float64: long spans keep the digits of their sum, and a span that is one token gives that token's own gap
    own = torch.zeros_like(target).index_add_(0, span[inside], logp[inside].double())
    return target - own


def _padded(x: Tensor) -> Tensor:
    return x if len(x) else x.new_zeros(1)
