"""The packed forward: B rows of different lengths in one sequence of T tokens, without padding and without a T×T mask.

In: a model, a Batch. Out: the hidden states that predict its learned tokens. Linear layers, norms and experts run on
the T tokens, ordered by the length of their rows; only attention looks at rows, in buckets of similar length. Classes
in `PACKED` go through `dense.dense_layer` in full precision, those in `STOCK_PACKED` through their stock layers; a
class in neither runs padded through its stock forward, and says so once.
"""

import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PretrainedConfig

from tinyr2.core.errors import ConfigError
from tinyr2.models.dense import dense_layer, fits, normalized
from tinyr2.models.fused import drop_padding, move, short_attention

PACKED = frozenset({"llama", "mistral", "qwen2", "qwen3"})  # classes whose packed log-probs the tests compare
STOCK_PACKED = frozenset({"deepseek_v2", "deepseek_v3"})  # the same, of stock layers with our attention
STEADY = frozenset({"default", "linear", "llama3", "yarn"})  # rotary angles that depend on a token's position alone
MAX_PADDING = 0.15  # of a bucket's attention cells
SHORT = 128  # rows up to this long are attended to at once on a CPU; longer ones are worth skipping hidden blocks


@dataclass(frozen=True)
class Bucket:
    """b rows of similar length, adjacent in a pack that is ordered by length.

    Lengths 3 and 2: rows=2, width=3, tokens=5, cells=[0,1,2,3,4,3], kept=[0,1,2,3,4]. Equal lengths have no cells.
    """

    rows: int
    width: int  # of the longest row
    tokens: int  # t, without padding
    cells: Tensor | None  # (b · width,) int64, indices into the t tokens; a row's padding repeats its first token
    kept: Tensor | None  # (t,) int64, the cells that are not padding


@dataclass(frozen=True)
class Layout:
    """How attention finds the rows in a pack: `order` (T,) brings the longest to the front, `back` (T,) undoes it."""

    order: Tensor
    back: Tensor
    buckets: tuple[Bucket, ...]


def layout(lengths: Sequence[int], device: torch.device, *, padding: float = MAX_PADDING) -> Layout:
    """Group rows, longest first, so that no bucket holds a larger share of `padding`; 0 groups equal lengths alone."""
    starts = torch.tensor([0, *lengths]).cumsum(0)
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    groups: list[list[int]] = []
    for n in (lengths[i] for i in longest_first):
        if groups and sum(groups[-1]) + n >= (1 - padding) * groups[-1][0] * (len(groups[-1]) + 1):
            groups[-1].append(n)
        else:
            groups.append([n])
    order = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in longest_first])
    return Layout(order.to(device), order.argsort().to(device), tuple(_bucket(g, device) for g in groups))


def _bucket(lengths: list[int], device: torch.device) -> Bucket:
    rows, width, tokens = len(lengths), lengths[0], sum(lengths)
    if rows * width == tokens:
        return Bucket(rows, width, tokens, None, None)
    length = torch.tensor(lengths)[:, None]
    start = length.cumsum(0) - length
    column = torch.arange(width)[None]
    cells = torch.where(column < length, start + column, start).flatten()
    kept = (column < length).flatten().nonzero()[:, 0]
    return Bucket(rows, width, tokens, cells.to(device), kept.to(device))


def attend(query: Tensor, key: Tensor, value: Tensor, rows: Layout, *, scaling: float | None,
           dropout: float = 0.0, window: int | None = None) -> Tensor:
    """Causal attention inside each row of a pack.

    query (1, H, T, D)   key, value (1, H_kv, T, D)   → (1, T, H, D_v)
    """
    qkv = [move(x[0].transpose(0, 1), rows.order, rows.back) for x in (query, key, value)]
    return move(attend_ordered(rows, qkv, scaling, dropout, window), rows.back, rows.order)[None]


def attend_ordered(rows: Layout, qkv: Sequence[Tensor], scaling: float | None, dropout: float,
                   window: int | None) -> Tensor:
    """`attend` on query, key and value (T, H, D) whose tokens lie in `rows.order`."""
    sizes = [bucket.tokens for bucket in rows.buckets]
    scaling = qkv[0].shape[-1] ** -0.5 if scaling is None else scaling
    out = [_attend_bucket(bucket, part, scaling, dropout, window)
           for bucket, *part in zip(rows.buckets, *(x.split(sizes) for x in qkv), strict=True)]
    return out[0] if len(out) == 1 else torch.cat(out)


def _attend_bucket(bucket: Bucket, qkv: list[Tensor], scaling: float, dropout: float, window: int | None) -> Tensor:
    b, width = bucket.rows, bucket.width
    if bucket.cells is not None:
        qkv = [move(x, bucket.cells, bucket.kept) for x in qkv]
    q, k, v = (x.view(b, width, *x.shape[1:]) for x in qkv)
    window = None if window is None or window >= width else window
    if _short(q, dropout):
        out = short_attention(q, k, v, scaling, window)
    else:
        mask = None if window is None else _band(width, window, q.device)
        # torch's fused attention wants values as wide as keys, and would else hold all scores at once
        wide = F.pad(v, (0, q.shape[-1] - v.shape[-1])) if q.shape[-1] > v.shape[-1] else v
        out = F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, wide)), attn_mask=mask, is_causal=mask is None, scale=scaling,
            dropout_p=dropout, enable_gqa=q.shape[2] != k.shape[2]).transpose(1, 2)[..., :v.shape[-1]]
    out = out.reshape(b * width, *out.shape[2:])
    return out if bucket.kept is None else drop_padding(out, bucket.kept)


def _short(query: Tensor, dropout: float) -> bool:
    return query.shape[1] <= SHORT and query.device.type == "cpu" and dropout == 0 and fits(query)


def _band(width: int, window: int, device: torch.device) -> Tensor:
    i = torch.arange(width, device=device)
    return (i[:, None] >= i[None]) & (i[:, None] - i[None] < window)


def _interface(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
               scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None,
               tinyr2_rows: Layout, **_) -> tuple[Tensor, None]:
    """The shape in which transformers calls an attention function; the tokens lie in `tinyr2_rows.order`."""
    qkv = [x[0].transpose(0, 1) for x in (query, key, value)]
    return attend_ordered(tinyr2_rows, qkv, scaling, dropout, sliding_window)[None], None


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


@contextmanager
def _lean_experts(model: nn.Module) -> Iterator[None]:
    """No copy of an expert's weights per token, which is what transformers' `batched_mm` makes."""
    config = model.config
    before = getattr(config, "_experts_implementation", None)
    if before == "batched_mm":
        config._experts_implementation = "grouped_mm"
    try:
        yield
    finally:
        if before == "batched_mm":
            config._experts_implementation = before


def supports_packing(model: nn.Module) -> bool:
    """Whether the model is of a dense class whose packed forward is known to be exact."""
    return model.config.model_type in PACKED


def is_steady(config: PretrainedConfig) -> bool:
    """Whether rotary angles do not depend on the longest row of a batch (as they do with dynamic and longrope)."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = [part for part in rope.values() if isinstance(part, dict)] or [rope]  # some classes have one for each layer
    return all(kind.get("rope_type", "default") in STEADY for kind in kinds)


def body_of(model: nn.Module) -> nn.Module:
    """The model without its head, adapters in place."""
    return model.get_base_model().base_model if hasattr(model, "merge_and_unload") else model.base_model


def hidden_states(model: nn.Module, tokens: Tensor, position: Tensor, lengths: Sequence[int], *,
                  gradient_checkpointing: bool = False) -> Tensor:
    """Last hidden states of a pack.

    tokens, position (T,) int64; lengths B ints that add up to T → (T, D) in the model's dtype.
    With gradient_checkpointing the backward pass computes each layer again, from its input, which alone is kept.
    ConfigError for rotary positions with which a row's states depend on the longest row beside it.
    """
    return layer_states(model, tokens, position, lengths, (), gradient_checkpointing=gradient_checkpointing)[0]


def layer_states(model: nn.Module, tokens: Tensor, position: Tensor, lengths: Sequence[int],
                 layers: Collection[int], *, gradient_checkpointing: bool = False) -> tuple[Tensor, dict[int, Tensor]]:
    """`hidden_states`, and by number, counted from 0, what each of these decoder layers puts out: (T, D), not normed.

    Both carry gradient. A layer's output is the input of the next, so looking at it costs nothing.
    """
    body = body_of(model)
    if not is_steady(model.config):
        raise ConfigError(f"{type(model).__name__}: its rope_type ties every row's positions to the longest row of the "
                          f"batch; give a model whose config says one of {', '.join(sorted(STEADY))}")
    if model.config.model_type not in PACKED | STOCK_PACKED:
        return _padded(body, tokens, lengths, layers)
    count, seen = len(tokens), {}
    tokens, position, lengths = _round_up(tokens, position, lengths)
    rows = layout(lengths, tokens.device)
    position = position[rows.order][None]
    x = body.embed_tokens(tokens[rows.order])
    rotary = body.rotary_emb(x[None], position)
    for i, layer in enumerate(body.layers[:body.config.num_hidden_layers]):
        run = partial(_layer, body, layer, rows, position, rotary)
        x = checkpoint(run, x, use_reentrant=False) if gradient_checkpointing and torch.is_grad_enabled() else run(x)
        if i in layers:
            seen[i] = move(x, rows.back, rows.order)[:count]
    return move(normalized(body.norm, x), rows.back, rows.order)[:count], seen


def _round_up(tokens: Tensor, position: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor, Sequence[int]]:
    """One more row, which nobody reads, so that few different T occur: at most a 32nd of the tokens.

    oneDNN generates code, and keeps memory, for each T that it meets.
    """
    count = len(tokens)
    grain = max(1, 2 ** ((count // 32).bit_length() - 1)) if tokens.device.type == "cpu" else 1
    if not (more := -count % grain):
        return tokens, position, lengths
    return F.pad(tokens, (0, more)), torch.cat([position, torch.arange(more)]), [*lengths, more]


def _layer(body: nn.Module, layer: nn.Module, rows: Layout, position: Tensor, rotary: Tensor | tuple[Tensor, ...],
           x: Tensor) -> Tensor:
    if supports_packing(body) and fits(x) and not _listened_to(layer):
        cos, sin = rotary
        return dense_layer(layer, x, (cos[0], sin[0]), partial(attend_ordered, rows))
    with attention(body, "tinyr2_packed"), _lean_experts(body):
        return layer(x[None], attention_mask=None, position_ids=position, past_key_values=None, use_cache=False,
                     position_embeddings=rotary, tinyr2_rows=rows)[0]


def _listened_to(layer: nn.Module) -> bool:
    """Whether someone hooked into calls that the layer's own forward would make, and ours does not."""
    return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
               for m in (layer, *layer.children(), *layer.self_attn.children(), *layer.mlp.children()))


def _padded(body: nn.Module, tokens: Tensor, lengths: Sequence[int],
            layers: Collection[int]) -> tuple[Tensor, dict[int, Tensor]]:
    warnings.warn(f"{type(body).__name__}: no exact packed forward is known for this class; it runs padded, and "
                  "without gradient checkpointing", stacklevel=3)
    rows = torch.nn.utils.rnn.pad_sequence(tokens.split(list(lengths)), batch_first=True)
    real = torch.arange(rows.shape[1], device=rows.device)[None] < torch.tensor(lengths, device=rows.device)[:, None]
    with _listening(body, layers) as heard:
        out = body(input_ids=rows, attention_mask=real.long(), use_cache=False)
    return out.last_hidden_state[real], {i: x[real] for i, x in heard.items()}


@contextmanager
def _listening(body: nn.Module, layers: Collection[int]) -> Iterator[dict[int, Tensor]]:
    """What the decoder layers of these numbers put out, (B, width, D), filled as they are called."""
    if layers and not isinstance(getattr(body, "layers", None), nn.ModuleList):
        raise ConfigError(f"{type(body).__name__}: it keeps its decoder layers in no list `layers`, so their states "
                          "cannot be read; take another class, or leave the states of inner layers out of the loss")
    heard: dict[int, Tensor] = {}

    def hear(i: int, _module: nn.Module, _args: tuple, out: Tensor | tuple[Tensor, ...]) -> None:
        heard[i] = out if isinstance(out, Tensor) else out[0]

    handles = [body.layers[i].register_forward_hook(partial(hear, i)) for i in layers]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """In eval mode, as it was sampled from; and back."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
