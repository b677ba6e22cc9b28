"""What a token boundary rules out: the probability that the model gave to longer tokens that begin with the same bytes.

In: the states that predict tokens, the head, and the vocabulary in the order of its bytes (`tokens.byte_order`). Out: a
probability per token. In chunks: the logits of all tokens never exist at once.
"""

import torch
from torch import Tensor

from tinyr2.models.logits import Head, logits_of
from tinyr2.models.side import parts


@torch.no_grad()
def extension_mass(hidden: Tensor, head: Head, token: Tensor, order: Tensor, first: Tensor, last: Tensor, *,
                   temperature: float = 1.0, chunk_elements: int = 2**22) -> Tensor:
    """The probability of all tokens whose bytes strictly extend the token's, (N,) float64, detached.

    hidden (N, D), token (N,) int64: hidden[i] is the state that predicts token[i]
    order, first, last (V,) int64: the strict extensions of id v are order[first[v]:last[v]]; the head may have more
                    rows than these V, which extend nothing
    chunk_elements  logits that are held at once; at least one token's
    After "Hel" the text cannot go on as "Hello" would have, had the model meant that: at the first state, the mass of
    "Hello" is what the boundary after "Hel" rules out, for a model that writes its own tokenization. Two models'
    log-probs of a span compare fairly where this is small at the span's last token, on both sides: Minixhofer et al.
    2025, arXiv 2503.20083, on outcome chunk debiasing.
    """
    vocab = len(head.weight)
    assert len(order) == len(first) == len(last) <= vocab, f"order of {len(order)} tokens, head of {vocab}"
    assert len(hidden) == len(token) and temperature > 0, f"{len(hidden)} states, {len(token)} tokens, T {temperature}"
    masses = torch.zeros(len(token), dtype=torch.float64, device=hidden.device)
    for part in parts(0, len(token), max(1, chunk_elements // vocab)):
        # float64, so that a small mass outlives the subtraction of two sums near 1
        prob = (logits_of(hidden[part], head).double() / temperature).softmax(-1)
        before = torch.nn.functional.pad(prob[:, order].cumsum(-1), (1, 0))  # (n, V + 1), the mass before each place
        ends = torch.stack([first[token[part]], last[token[part]]], -1)
        masses[part] = before.gather(-1, ends).diff()[:, 0].clamp_min(0.0)
    return masses
