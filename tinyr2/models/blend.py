"""Several teachers of one vocabulary as one distribution: their average, or their product.

In: states, heads and weights. Out: blocks of the blend's logits in bits, read like those of a single model. A product
adds its parts' logits. An average adds their probabilities, so it walks each part's vocabulary once more beforehand,
for the sums that turn logits into probabilities: its parts' logits are made twice, and none is kept.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from tinyr2.core.errors import ConfigError
from tinyr2.models.logits import Head
from tinyr2.models.side import Reader, Side, prepare

How = Literal["average", "product"]
Rows = slice | Tensor  # of the vocabulary: a stretch, or (C,) ids


@dataclass(frozen=True)
class Blend:
    """Teachers of one vocabulary, each with its own states, and how they become one distribution q.

    average  q = sum_i w_i q_i: what a token gets when a teacher is drawn for it. Its forward KL to the student has the
             gradient of the weighted sum of the parts' forward KLs
    product  q proportional to prod_i q_i^w_i, all parts must allow what it allows. The reverse KL to it has the
             gradient of the weighted sum of the parts' reverse KLs
    Heskes 1998, "Selecting Weighting Factors in Logarithmic Opinion Pools", for the two pools.
    """

    hidden: tuple[Tensor, ...]  # (N, D_i) each
    heads: tuple[Head, ...]
    weights: tuple[float, ...]  # > 0; divided by their sum
    how: How = "average"

    @property
    def vocab(self) -> int:
        """Tokens that the parts have in common: all of them."""
        return len(self.heads[0].weight)

    def check(self, count: int) -> None:
        """ConfigError where a weight is not a positive number, or the parts differ in the size of their vocabulary."""
        sizes = [len(head.weight) for head in self.heads]
        assert len(self.hidden) == len(sizes) == len(self.weights) > 0, "each part: states, a head and a weight"
        assert all(len(states) == count for states in self.hidden), f"{[len(h) for h in self.hidden]} states, {count}"
        if not all(math.isfinite(w) and w > 0 for w in self.weights):
            raise ConfigError(f"a blend of teachers has the weights {self.weights}; make each one positive, and leave "
                              "out the teachers that do not count")
        if len(set(sizes)) > 1:
            raise ConfigError(f"a blend has teachers of {sizes} tokens; a blend is over one vocabulary: read all with "
                              "head_of(model, vocab=the tokenizer's size), or sum the divergences instead")


class Reads(Protocol):
    """A distribution's logits in bits above a reference of each token's."""

    def block(self, rows: Rows) -> Tensor:
        """(C, n) bits."""

    def refer_to_largest(self, blocks: list[slice]) -> None:
        """Takes each token's largest logit of all blocks for its reference."""


@dataclass(frozen=True)
class Sides:
    """A blend ready to be read; of one part, it is that part."""

    parts: tuple[Side, ...]
    shares: tuple[float, ...]  # add up to 1
    how: How

    @property
    def vocab(self) -> int:
        """Rows of the vocabulary."""
        return len(self.parts[0].weight)

    def reader(self, part: slice, blocks: list[slice], *, narrow: bool) -> Reads:
        """The blend's logits of a chunk's tokens; blocks: the vocabulary, in pieces that fit."""
        readers = [Reader(side, part, narrow=narrow) for side in self.parts]
        if len(readers) == 1:
            return readers[0]
        kind = _Average if self.how == "average" else _Product
        return kind(readers, self.shares, blocks)


def prepare_blend(blend: Blend, temperature: float) -> Sides:
    """The sides of a blend; asks whether autocast is on."""
    total = math.fsum(blend.weights)
    return Sides(parts=tuple(prepare(h, head, temperature) for h, head in zip(blend.hidden, blend.heads, strict=True)),
                 shares=tuple(weight / total for weight in blend.weights), how=blend.how)


class _Product:
    """sum_i w_i log q_i, but for a constant of each token's."""

    def __init__(self, readers: Sequence[Reader], shares: Sequence[float], blocks: list[slice]):
        self._parts = list(zip(readers, shares, strict=True))
        self._reference: Tensor | None = None

    def block(self, rows: Rows) -> Tensor:
        (reader, share), *others = self._parts
        bits = reader.block(rows).mul_(share)
        for reader, share in others:
            bits.add_(reader.block(rows), alpha=share)
        if self._reference is None:
            self._reference = bits.amax(0)
        return bits.sub_(self._reference)

    def refer_to_largest(self, blocks: list[slice]) -> None:
        largest = torch.stack([self.block(rows).amax(0) for rows in blocks]).amax(0)
        self._reference = self._reference + largest


class _Average:
    """log2 sum_i w_i q_i: log-probs, so that no reference is needed."""

    def __init__(self, readers: Sequence[Reader], shares: Sequence[float], blocks: list[slice]):
        self._parts = [(reader, math.log2(share) - _log2_sum(reader, blocks))
                       for reader, share in zip(readers, shares, strict=True)]

    def block(self, rows: Rows) -> Tensor:
        # in logarithms throughout: a probability may round to 0, its logarithm may not be -inf
        (reader, shift), *others = self._parts
        bits = reader.block(rows).add_(shift)
        for reader, shift in others:
            torch.logaddexp2(bits, reader.block(rows).add_(shift), out=bits)
        return bits

    def refer_to_largest(self, blocks: list[slice]) -> None:
        """Nothing to do: probabilities do not overflow."""


def _log2_sum(reader: Reader, blocks: list[slice]) -> Tensor:
    """log2 of the sum of 2^bits over the vocabulary, (n,)."""
    total = None
    for rows in blocks:
        bits = reader.block(rows)
        largest = bits.amax(0)
        part = bits.sub_(largest).exp2_().sum(0).log2_().add_(largest)
        total = part if total is None else torch.logaddexp2(total, part)
    return total
