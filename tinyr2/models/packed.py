"""The packed forward: B rows of different lengths in one sequence of T tokens, without padding and without a T×T mask.

In: a model, a Batch. Out: the hidden states that predict its learned tokens. Linear layers, norms and experts run on
the T tokens; only attention looks at rows, in buckets of similar length. A model class that is not in `PACKED` runs
padded through its stock forward, and says so once.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

PACKED = frozenset({"llama", "mistral", "qwen2", "qwen3"})  # classes whose packed log-probs the tests compare
MAX_PADDING = 0.15  # of a bucket's attention cells


@dataclass(frozen=True)
class Bucket:
    """Rows of similar length, gathered for one attention call.

    Lengths 3 and 2 packed at 0 and 3: cells=[[0,1,2],[3,4,3]], kept=[0,1,2,3,4], packed=[0,1,2,3,4].
    """

    cells: Tensor  # (b, L) int64, indices into the T packed tokens; a row's padding repeats its first token
    kept: Tensor  # (t,) int64, the flat cells that are not padding
    packed: Tensor  # (t,) int64, where those lie in the pack


@dataclass(frozen=True)
class Layout:
    """How attention finds the rows in a pack."""

    buckets: tuple[Bucket, ...]


def layout(lengths: Sequence[int], device: torch.device) -> Layout:
    """Group rows, longest first, so that no bucket holds more than `MAX_PADDING` padding."""
    starts = [0]
    for n in lengths:
        starts.append(starts[-1] + n)
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    groups: list[list[int]] = []
    held = 0
    for i in order:
        width = lengths[groups[-1][0]] if groups else 0
        if groups and held + lengths[i] >= (1 - MAX_PADDING) * width * (len(groups[-1]) + 1):
            groups[-1].append(i)
            held += lengths[i]
        else:
            groups.append([i])
            held = lengths[i]
    return Layout(tuple(_bucket([starts[i] for i in g], [lengths[i] for i in g], device) for g in groups))


def _bucket(starts: list[int], lengths: list[int], device: torch.device) -> Bucket:
    start = torch.tensor(starts)[:, None]
    length = torch.tensor(lengths)[:, None]
    column = torch.arange(lengths[0])[None]
    real = column < length
    cells = torch.where(real, start + column, start)
    return Bucket(cells.to(device), real.flatten().nonzero()[:, 0].to(device), cells[real].to(device))


def attend(query: Tensor, key: Tensor, value: Tensor, rows: Layout, *, scaling: float | None,
           dropout: float = 0.0, window: int | None = None) -> Tensor:
    """Causal attention inside each row of a pack.

    query (1, H, T, D)   key, value (1, H_kv, T, D)   → (1, T, H, D_v)
    """
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, H, D)
    parts, places = [], []
    for bucket in rows.buckets:
        b, width = bucket.cells.shape
        flat = bucket.cells.flatten()
        qb, kb, vb = (x.index_select(0, flat).view(b, width, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        mask = _band(width, window, q.device) if window is not None and width > window else None
        ob = F.scaled_dot_product_attention(qb, kb, vb, attn_mask=mask, is_causal=mask is None, scale=scaling,
                                            dropout_p=dropout, enable_gqa=q.shape[1] != k.shape[1])
        parts.append(ob.transpose(1, 2).reshape(b * width, q.shape[1], v.shape[-1]).index_select(0, bucket.kept))
        places.append(bucket.packed)
    values = torch.cat(parts)  # under autocast its dtype is not the query's
    return torch.empty_like(values).index_copy(0, torch.cat(places), values)[None]


def _band(width: int, window: int, device: torch.device) -> Tensor:
    i = torch.arange(width, device=device)
    return (i[:, None] >= i[None]) & (i[:, None] - i[None] < window)


def _interface(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
               scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None,
               tinyr2_rows: Layout, **_) -> tuple[Tensor, None]:
    """The shape in which transformers calls an attention function."""
    return attend(query, key, value, tinyr2_rows, scaling=scaling, dropout=dropout, window=sliding_window), None


AttentionInterface.register("tinyr2_packed", _interface)


@contextmanager
def attention(model: nn.Module, name: str) -> Iterator[None]:
    """Let `model` attend with the implementation `name`, and give back what it had."""
    config = model.config
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def supports_packing(model: nn.Module) -> bool:
    """Whether the model's class is one whose packed forward is known to be exact."""
    return model.config.model_type in PACKED


def body_of(model: nn.Module) -> nn.Module:
    """The model without its head, adapters in place."""
    return model.get_base_model().base_model if hasattr(model, "merge_and_unload") else model.base_model


def hidden_states(model: nn.Module, tokens: Tensor, position: Tensor, lengths: Sequence[int]) -> Tensor:
    """Last hidden states of a pack.

    tokens, position (T,) int64; lengths B ints that add up to T → (T, D) in the model's dtype.
    """
    body = body_of(model)
    if not supports_packing(model):
        return _padded(body, tokens, lengths)
    with attention(body, "tinyr2_packed"):
        out = body(input_ids=tokens[None], position_ids=position[None], use_cache=False,
                   tinyr2_rows=layout(lengths, tokens.device))
    return out.last_hidden_state[0]


def _padded(body: nn.Module, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
    warnings.warn(f"{type(body).__name__}: no exact packed forward is known for this class; it runs padded",
                  stacklevel=2)
    rows = torch.nn.utils.rnn.pad_sequence(tokens.split(list(lengths)), batch_first=True)
    real = torch.arange(rows.shape[1], device=rows.device)[None] < torch.tensor(lengths, device=rows.device)[:, None]
    out = body(input_ids=rows, attention_mask=real.long(), use_cache=False)
    return out.last_hidden_state[real]
