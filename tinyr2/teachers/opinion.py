"""What a teacher says of a batch's N learned tokens: log-probs of spans, full distributions, or the k likeliest tokens.

A full distribution is kept as hidden states and a head, never as logits. What a teacher does not say is absent, not 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from tinyr2.core.types import Batch, Rollout
from tinyr2.models.head import Blend, Head, TopK
from tinyr2.models.pairs import Pairs
from tinyr2.objectives.divergence import Divergence


@dataclass(frozen=True, kw_only=True)
class Spoken:
    """Log-probs of spans: tokens that cover, together, the bytes that tokens of the teacher's cover.

    With one vocabulary each token is a span of its own. "12" as one student token, "1" "2" as the teacher's two: one
    span, whose logp is the sum of the teacher's two.
    """

    span: Tensor  # (N,) int64, the span of each learned token; -1: nothing is said of it
    logp: Tensor  # (M,) f32 nats, of each span; NaN: the teacher does not know


@dataclass(frozen=True, kw_only=True)
class Whole:
    """Next-token distributions at some of the learned tokens: of one model, of several in a blend, or as lists."""

    hidden: Tensor | None = None  # (K, D_teacher), the states that predict
    head: Head | None = None
    blend: Blend | None = None  # in place of these two
    topk: TopK | None = None  # in place of them: the K tokens' likeliest ones, and a tail
    at: Tensor | None = None  # (K,) int64, which of the N; None: all of them in order
    pairs: Pairs | None = None  # ids of equal byte strings in two vocabularies; None: one vocabulary


@dataclass(frozen=True, kw_only=True)
class Opinion:
    """What one teacher says, and how much it counts."""

    name: str
    weight: float = 1.0
    spoken: Spoken | None = None
    whole: Whole | None = None
    anchor: Divergence | None = None  # its distributions are compared by this one, beside the loss of all others
    facts: dict[str, tuple[float, float]] = field(default_factory=dict)  # for the metrics: (sum, count)

    @property
    def complete(self) -> bool:
        """Whether one walk over the student's vocabulary can compare every token with this teacher."""
        return self.whole is not None and self.whole.at is None and self.anchor is None


# What the teachers say of a micro-batch; the student's states (N, D) are there where they were asked for.
Judge = Callable[[Sequence[Rollout], Batch, Tensor | None], list[Opinion]]
