"""Packed rows: answers end to end. In: the learned tokens per answer, `lengths` (B,). Out: masks and sums of rows.

A row may be empty. A packed value (N,) is the row-major reading of a padded one (B, n_max) under `mask`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def mask(lengths: Sequence[int], device: torch.device) -> Tensor:
    """(B, n_max) bool: which places of the padded form hold a token."""
    counts = torch.tensor(lengths, dtype=torch.int64, device=device)
    return torch.arange(max(lengths, default=0), device=device) < counts[:, None]


def pad(x: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The padded form (B, n_max) of x (N,), zeros where there is no token, and its mask."""
    assert len(x) == sum(lengths), f"{len(x)} values, {sum(lengths)} tokens"
    places = mask(lengths, x.device)
    padded = x.new_zeros(places.shape)
    padded[places] = x
    return padded, places


def repeat(x: Tensor, lengths: Sequence[int]) -> Tensor:
    """Each row's value x (B,) at each of its tokens, (N,)."""
    assert len(x) == len(lengths), f"{len(x)} values, {len(lengths)} rows"
    return x.repeat_interleave(torch.tensor(lengths, dtype=torch.int64, device=x.device))


def total(x: Tensor, lengths: Sequence[int]) -> Tensor:
    """The sum of each row of x (N,), (B,). In float64: the rows beside it change the order of a sum, not its digits."""
    exact = x.dtype if x.device.type == "mps" else torch.float64  # which has no float64
    return pad(x.to(exact), lengths)[0].sum(1).to(x.dtype)


def remaining(lengths: Sequence[int], device: torch.device) -> Tensor:
    """(N,) int64: how many tokens of the row follow each token, n - 1 - t."""
    counts = torch.tensor(lengths, dtype=torch.int64, device=device)
    ends = counts.cumsum(0).repeat_interleave(counts)
    return ends - 1 - torch.arange(len(ends), device=device)
