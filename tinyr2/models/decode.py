"""Decoding with a cache that has no padding: each row of the cache is a slot with a length of its own.

In: prompts, then one token per live slot and step. Out: the hidden states that predict the next tokens. The forward is
the stock one, with its attention replaced; only the classes in `packed.PACKED` can come here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from tinyr2.models.packed import Layout, attend, attention, body_of, layout


@dataclass(frozen=True)
class _Prefill:
    """Where the keys of packed prompt tokens go: token `source[i]` to slot `slot[i]`, column `column[i]`."""

    rows: Layout
    source: Tensor
    slot: Tensor
    column: Tensor


@dataclass(frozen=True)
class _Step:
    """One new token per slot: slot i has `column[i]` tokens before it; `mask` (R, 1, 1, L) hides what it lacks."""

    column: Tensor
    mask: Tensor


class SlotCache:
    """Keys and values of R live rows, in slots 0 … R-1, of `lengths` tokens each."""

    def __init__(self, device: torch.device):
        self.device = device
        self.lengths = torch.zeros(0, dtype=torch.long, device=device)
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._now: _Prefill | _Step | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def update(self, key: Tensor, value: Tensor, layer: int, *_, **__) -> tuple[Tensor, Tensor]:
        """What transformers' attention layers call: store new keys and values, return those to attend to."""
        if layer == len(self._keys):
            self._keys.append(key.new_empty(0, key.shape[1], 0, key.shape[3]))
            self._values.append(value.new_empty(0, value.shape[1], 0, value.shape[3]))
        now = self._now
        if isinstance(now, _Prefill):
            for store, new in ((self._keys, key), (self._values, value)):
                store[layer] = _fit(store[layer], len(self.lengths), int(now.column.max()) + 1)
                store[layer][now.slot, :, now.column] = new[0].transpose(0, 1)[now.source]
            return key, value
        rows, width = len(now.column), now.mask.shape[-1]
        index = torch.arange(rows, device=self.device)
        for store, new in ((self._keys, key), (self._values, value)):
            store[layer] = _fit(store[layer], rows, width)
            store[layer][index, :, now.column] = new[:, :, 0]
        return self._keys[layer][:rows, :, :width], self._values[layer][:rows, :, :width]

    def drop(self, gone: set[int]) -> list[int]:
        """Free slots; the last live ones move into the holes, so that a leaving row costs one row's copy.

        Returns the old slot of each new slot 0 … R'-1.
        """
        left = len(self) - len(gone)
        order = list(range(left))
        holes = [s for s in order if s in gone]
        movers = [s for s in range(left, len(self)) if s not in gone]
        for hole, mover in zip(holes, movers, strict=True):
            order[hole] = mover
            n = int(self.lengths[mover])
            for store in (*self._keys, *self._values):
                store[hole, :, :n] = store[mover, :, :n]
        self.lengths = self.lengths[torch.tensor(order, dtype=torch.long, device=self.device)]
        return order

    def get_seq_length(self, *_) -> int:
        """Part of what transformers expects of a cache; positions are always given, so nothing depends on it."""
        return int(self.lengths.max()) if len(self.lengths) else 0


def _fit(store: Tensor, rows: int, width: int) -> Tensor:
    """`store` with room for `rows` and `width`; columns grow by half so that copies stay rare."""
    if store.shape[0] >= rows and store.shape[2] >= width:
        return store
    wide = store.shape[2] if store.shape[2] >= width else max(width, store.shape[2] * 3 // 2, 32)
    # zeros, not empty: a masked cell still enters 0 · value, and an uninitialized NaN would spread
    out = store.new_zeros(max(rows, store.shape[0]), store.shape[1], wide, store.shape[3])
    out[:store.shape[0], :, :store.shape[2]] = store
    return out


def prefill(model: nn.Module, cache: SlotCache, prompts: Sequence[Sequence[int]], copies: Sequence[int]) -> Tensor:
    """Append slots: `copies[i]` of them for prompt i, whose keys are computed once.

    Returns (sum(copies), D): for each new slot, the state that predicts its first token.
    """
    lengths = [len(p) for p in prompts]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    source, slot, column, last = [], [], [], []
    new = len(cache)
    for i, n in enumerate(lengths):
        for _ in range(copies[i]):
            source.append(torch.arange(n) + starts[i])
            slot.append(torch.full((n,), new))
            column.append(torch.arange(n))
            last.append(int(starts[i + 1]) - 1)
            new += 1
    grown = torch.tensor([n for n, c in zip(lengths, copies, strict=True) for _ in range(c)], device=cache.device)
    cache.lengths = torch.cat([cache.lengths, grown])
    places = (torch.cat(x).to(cache.device) for x in (source, slot, column))
    cache._now = _Prefill(layout(lengths, cache.device), *places)
    tokens = torch.tensor([t for p in prompts for t in p], device=cache.device)
    position = torch.cat([torch.arange(n) for n in lengths]).to(cache.device)
    hidden = _forward(model, cache, tokens[None], position[None])
    return hidden[0, torch.tensor(last, device=cache.device)]


def step(model: nn.Module, cache: SlotCache, tokens: Tensor) -> Tensor:
    """Feed one token to each slot. tokens (R,) int64 → (R, D), the states that predict the next ones."""
    column = cache.lengths
    cache.lengths = column + 1
    width = int(cache.lengths.max())
    mask = torch.arange(width, device=cache.device)[None] <= column[:, None]
    cache._now = _Step(column, mask[:, None, None])
    return _forward(model, cache, tokens[:, None], column[:, None])[:, 0]


def _forward(model: nn.Module, cache: SlotCache, tokens: Tensor, position: Tensor) -> Tensor:
    body = body_of(model)
    with attention(body, "tinyr2_slots"):
        return body(input_ids=tokens, position_ids=position, past_key_values=cache, use_cache=True,
                    tinyr2_slots=cache).last_hidden_state


def _interface(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
               scaling: float | None = None, sliding_window: int | None = None, tinyr2_slots: SlotCache,
               **_) -> tuple[Tensor, None]:
    """The shape in which transformers calls an attention function."""
    now = tinyr2_slots._now
    if isinstance(now, _Prefill):
        return attend(query, key, value, now.rows, scaling=scaling, window=sliding_window), None
    mask = now.mask
    if sliding_window is not None and mask.shape[-1] > sliding_window:
        column = torch.arange(mask.shape[-1], device=mask.device)
        mask = mask & (column > now.column[:, None, None, None] - sliding_window)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling,
                                         enable_gqa=query.shape[1] != key.shape[1])
    return out.transpose(1, 2), None


AttentionInterface.register("tinyr2_slots", _interface)
