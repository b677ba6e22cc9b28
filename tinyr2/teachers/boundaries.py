"""Where a span may close: where neither model expected the token that ends it to go on.

A token boundary says something of the bytes that follow: "Hel" as a token rules out the token "Hello". Two models that
cut differently are compared fairly where little probability was ruled out on either side (Minixhofer et al. 2025,
arXiv 2503.20083, on outcome chunk debiasing).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tinyr2.models.bias import extension_mass
from tinyr2.models.head import Head
from tinyr2.tokens.align import Spans


@dataclass(frozen=True)
class Order:
    """A vocabulary by its bytes: what strictly extends id v is order[first[v]:last[v]]; each (V,) int64."""

    order: Tensor
    first: Tensor
    last: Tensor


@dataclass(frozen=True)
class Boundaries:
    """Both vocabularies by their bytes, and how much probability a boundary may rule out."""

    student: Order
    teacher: Order
    threshold: float

    @torch.no_grad()
    def closes(self, spans: Spans, student_tokens: Tensor, student: tuple[Tensor, Head], teacher_tokens: Tensor,
               teacher: tuple[Tensor, Head], temperature: float) -> np.ndarray:
        """(m,) bool: the mass of the tokens that extend the span's last one is within the threshold, in both models."""
        out = np.ones(spans.count, dtype=bool)
        sides = ((spans.student, student_tokens, student, self.student),
                 (spans.teacher, teacher_tokens, teacher, self.teacher))
        for span, tokens, (hidden, head), order in sides:
            inside = (span >= 0).nonzero()[0]
            last = np.full(spans.count, -1)
            last[span[inside]] = inside  # the later one of a span stays
            known = last >= 0
            at = torch.from_numpy(last[known]).to(hidden.device)
            mass = extension_mass(hidden[at], head, tokens[at], order.order, order.first, order.last,
                                  temperature=temperature)
            out[known] &= (mass <= self.threshold).cpu().numpy()
        return out
