"""One model's logits, a chunk of tokens by a block of the vocabulary at a time.

In: hidden states and an output head. Out: blocks (C, n) of logits in bits, C rows of the vocabulary by n tokens. The
vocabulary runs down: then a chunk's hidden states, which are small, are the operand that is laid out once, and the wide
weight is read as it lies. Bits, because 2^x costs a quarter of e^x; the change of base is one factor on the states.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tinyr2.models.logits import Head, precision
from tinyr2.models.products import Packed, linear

BITS = math.log2(math.e)  # bits in a nat


@dataclass(frozen=True)
class Side:
    """One model: states and head, detached, in the dtype that products read, and what happens to its raw logits."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    work: torch.dtype  # float32 or float64: logits and all sums
    gain: float  # scale / temperature
    bound: float | None  # softcap / temperature

    @property
    def factor(self) -> float:
        """What a raw logit is multiplied with: the result is in bits, or what tanh takes."""
        return self.gain * BITS if self.bound is None else self.gain / self.bound

    def bend(self, logits: Tensor) -> Tensor:
        """Raw logits times `factor` become bits, in place."""
        return logits if self.bound is None else logits.tanh_().mul_(self.bound * BITS)


def prepare(hidden: Tensor, head: Head, temperature: float) -> Side:
    """A side for `hidden` (N, D); asks whether autocast is on."""
    seen, work = precision(hidden)
    return Side(
        hidden=hidden.detach().to(seen),
        weight=head.weight.detach().to(seen),
        bias=None if head.bias is None else head.bias.detach().to(work),
        work=work,
        gain=head.scale / temperature,
        bound=None if head.softcap is None else head.softcap / temperature,
    )


class Reader:
    """The logits of a chunk's n tokens, in bits above a reference of each token: its largest one in the first block.

    `narrow` is for a vocabulary that is one block: tokens then run down in memory, as products give them.
    """

    def __init__(self, side: Side, part: slice, *, narrow: bool):
        self._side, states = side, side.hidden[part]
        self._exact = states.dtype == side.work  # then the factor rides along with the product
        self._states = states
        self._packed = Packed(states * side.factor, exact=True) if self._exact and not narrow else None
        self._reference: Tensor | None = None

    def block(self, rows: slice | Tensor, slope: Tensor | None = None) -> Tensor:
        """(C, n) bits of a stretch of the vocabulary, or of its ids (C,).

        slope (C, n), given where there is a softcap, receives the cap's own derivative.
        """
        side, before = self._side, self._reference
        folds = before is not None and self._packed is not None and side.bound is None
        x = self._multiply(side.weight[rows], -before if folds else None)
        if not self._exact:
            x.mul_(side.factor)
        if side.bias is not None:
            x.add_(side.bias[rows, None], alpha=side.factor)
        x = side.bend(x)
        if slope is not None:
            torch.mul(x, 1 / (side.bound * BITS), out=slope).square_().neg_().add_(1.0)
        if before is None:
            self._reference = x.amax(0)
        return x if folds else x.sub_(self._reference)

    def _multiply(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """weight (C, D) @ states (n, D)^T + bias (n,) → (C, n)."""
        if self._packed is not None:
            self._packed.bias = bias
            return self._packed(weight)
        if self._exact:
            return linear(self._states, weight * self._side.factor).t()
        return torch.mm(weight, self._states.t(), out_dtype=self._side.work)  # CUDA's own argument

    def refer_to_largest(self, blocks: list[slice]) -> None:
        """Takes each token's largest logit of all blocks for its reference: 2^bits is then at most 1."""
        largest = torch.stack([self.block(rows).amax(0) for rows in blocks]).amax(0)
        self._reference = self._reference + largest


class Marks:
    """Places in a chunk, k tokens of the vocabulary for each of n tokens, found again in blocks."""

    def __init__(self, ids: Tensor, blocks: list[slice], present: Tensor | None = None):
        """ids (n, k) int64, no token twice in a row; blocks in order, over the whole vocabulary.

        present (n, k) bool: where an id counts; the others, which may be any number, are not marked. None: all do.
        """
        self.shape = ids.shape
        flat = ids.flatten()
        # in the vocabulary's order, so that a block's marks lie together
        self._slot = flat.argsort() if len(blocks) > 1 else torch.arange(len(flat), device=ids.device)
        if present is not None:
            self._slot = self._slot[present.flatten()[self._slot]]
        self._id = flat[self._slot]
        self._token = self._slot // ids.shape[1]
        stops = torch.tensor([rows.stop for rows in blocks], device=ids.device)
        self._ends = [0, *torch.searchsorted(self._id, stops).tolist()]
        self._starts = [rows.start for rows in blocks]

    def _within(self, number: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
        some = slice(self._ends[number], self._ends[number + 1])
        return (self._id[some] - self._starts[number], self._token[some]), self._slot[some]

    def read(self, number: int, block: Tensor, out: Tensor) -> None:
        """Copies the marked values of block `number` (C, n) to their places in out (n, k)."""
        places, slot = self._within(number)
        if len(slot):
            out.view(-1)[slot] = block[places]

    def write(self, number: int, block: Tensor, values: Tensor, *, add: bool = False) -> None:
        """Puts, or adds, values (n, k) at the marked places of block `number` (C, n)."""
        places, slot = self._within(number)
        if len(slot):
            mine = values.reshape(-1)[slot]
            block[places] = block[places] + mine if add else mine


def parts(start: int, stop: int, size: int) -> Iterator[slice]:
    """Slices of at most `size`, end to end."""
    return (slice(i, min(i + size, stop)) for i in range(start, stop, size))
