"""The parts of a decoder's layers for dense models: grouped-query attention and the gated feed-forward.

In: a layer of a stock module. Out: an object with packed copies of its weights: norms and scales folded into them,
projections that read the same input joined. `load` fills it, and fills it again when the weights have moved on.
`models.decode` runs them; `models.mla` and `models.moe` have the others.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tinyr2.core.errors import ConfigError
from tinyr2.models.packed import Layout, attend
from tinyr2.models.products import Packed, refill
from tinyr2.models.slots import Fill, Step, Store

SHARED_OUT = 2**15  # elements from which on torch runs an elementwise function on several threads


@dataclass(frozen=True)
class Form:
    """How weights are copied."""

    dtype: torch.dtype = torch.float32
    exact: bool = False  # each row's numbers are the same, bit for bit, whatever rows it travels with


@dataclass(frozen=True)
class Prompts:
    """T prompt tokens, packed, on their way into a cache."""

    rows: Layout
    fill: Fill
    turn: Tensor  # (T, d/2) complex64


@dataclass(frozen=True)
class Now:
    """One step of R rows."""

    step: Step
    turn: Tensor  # (R, d/2) complex64


def weight_of(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight (N, K) float32 and bias (N,) of a linear layer, its adapters merged.

    ConfigError for adapters that do more than add to the weight.
    """
    base = linear.get_base_layer() if hasattr(linear, "get_base_layer") else linear
    weight = base.weight.detach().float()
    if base is not linear and not linear.merged and not linear.disable_adapters:
        for name in linear.active_adapters:
            if name in linear.lora_variant or linear.lora_bias.get(name):
                raise ConfigError(f"adapter {name}: a variant of LoRA, or LoRA with a bias, cannot be merged into a "
                                  "decode copy; merge it with peft first, or train plain LoRA")
            weight = weight + linear.get_delta_weight(name).detach().float()
    return weight, None if base.bias is None else base.bias.detach().float()


def join(linears: list[nn.Module], norm: nn.Module, rows: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The linears that read norm(x), as one weight for `normalize`(x) and one bias; `rows` reorders their outputs."""
    weights, biases = zip(*map(weight_of, linears), strict=True)
    weight = torch.cat(weights) * (norm.weight.detach().float() * norm.weight.numel() ** 0.5)
    bias = None if all(b is None for b in biases) else torch.cat([
        w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)])
    return (weight, bias) if rows is None else (weight[rows], bias if bias is None else bias[rows])


def pack(weight: Tensor, bias: Tensor | None, form: Form, old: Packed | None = None) -> Packed:
    """A copy for products in the form's dtype; `old`, with these numbers, where there is an old one."""
    weight, bias = weight.to(form.dtype), bias if bias is None else bias.to(form.dtype)
    if old is None:
        return Packed(weight, bias, exact=form.exact)
    old.load(weight, bias)
    return old


def floor_of(norm: nn.Module) -> Tensor:
    """What keeps `normalize` from dividing by 0: sqrt(D * eps), a scalar tensor."""
    eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    return torch.tensor((norm.weight.numel() * eps) ** 0.5, device=norm.weight.device)


def normalize(x: Tensor, floor: Tensor) -> Tensor:
    """x / sqrt(|x|^2 + D eps): RMSNorm (Zhang and Sennrich 2019, eq. 4) but for the factor sqrt(D), which `join` has
    put into the weights. (..., D) in x's dtype, computed in float32."""
    if x.dtype != torch.float32:
        return normalize(x.float(), floor).to(x.dtype)
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(floor)


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Rotary embedding of neighbors (x_0, x_1), (x_2, x_3) ... as complex numbers: (..., d) float32, (..., d/2)."""
    return (x.view(torch.complex64) * turn).view(torch.float32)


class GroupedAttention:
    """Grouped-query attention with rotary positions; with or without norms on the heads of queries and keys.

    Rotary embeddings pair dimension i with i + d/2; the copy lays the two side by side, so that a pair is one complex
    number. Each key/value head has its queries beside it, so that no head has to be moved before it attends.
    """

    def __init__(self, attention: nn.Module, norm: nn.Module, form: Form):
        self.form, self.d = form, attention.head_dim
        self.kv = attention.k_proj.out_features // self.d
        self.group = attention.q_proj.out_features // attention.k_proj.out_features
        self.floor = floor_of(norm)
        self.head_floor = floor_of(attention.q_norm) if hasattr(attention, "q_norm") else None
        self.window = getattr(attention, "sliding_window", None)
        if attention.config.model_type == "mistral":
            self.window = attention.config.sliding_window
        self._rows = self._order(norm.weight.device)
        self._scale = torch.tensor([[attention.scaling]] * self.group + [[1.0]], device=norm.weight.device)
        self.qkv = self.out = self.head_scale = None
        self.load(attention, norm)

    def load(self, attention: nn.Module, norm: nn.Module) -> None:
        """Copy the weights as they are now. The softmax's scale goes to the queries, by their norm or their weight."""
        weight, bias = join([attention.q_proj, attention.k_proj, attention.v_proj], norm, self._rows)
        scale = self._scale  # (group + 1, 1): none on the key
        if self.head_floor is not None:
            norms = torch.cat([attention.q_norm.weight.expand(self.group, -1), attention.k_norm.weight[None]])
            scale = scale * norms.detach().float()[:, self._pairs()]
            self.head_scale = refill(self.head_scale, scale * self.d ** 0.5)
        else:
            flat = torch.cat([scale.expand(self.kv, self.group + 1, self.d).reshape(-1),
                              scale.new_ones(self.kv * self.d)])
            weight, bias = weight * flat[:, None], bias if bias is None else bias * flat
        self.qkv = pack(weight, bias, self.form, self.qkv)
        self.out = pack(*weight_of(attention.o_proj), self.form, self.out)

    def _pairs(self) -> Tensor:
        half = torch.arange(self.d // 2)
        return torch.stack([half, half + self.d // 2], 1).flatten()

    def _order(self, device: torch.device) -> Tensor:
        """Rows of [q, k, v]: for each key head its queries and itself, in pairs; then the values as they are."""
        heads = torch.arange((self.group + 2) * self.kv)
        queries = heads[:self.kv * self.group].view(self.kv, self.group)
        keys, values = heads[self.kv * self.group:].view(2, self.kv)
        turned = (torch.cat([queries, keys[:, None]], 1).flatten()[:, None] * self.d + self._pairs()).flatten()
        kept = (values[:, None] * self.d + torch.arange(self.d)).flatten()
        return torch.cat([turned, kept]).to(device)

    def stores(self, like: Tensor) -> list[Store]:
        """Keys (slots, kv, d, columns), as the product with queries reads them; values (slots, kv, columns, d)."""
        return [Store((self.kv, self.d), 3, like), Store((self.kv, self.d), 2, like)]

    def _project(self, x: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
        """x (n, D) → queries and key of each head (n, kv, group + 1, d) float32, turned; values (n, kv, d)."""
        found = self.qkv(normalize(x, self.floor))
        wide = self.kv * (self.group + 1) * self.d
        heads = found[:, :wide].view(len(x), self.kv, self.group + 1, self.d)
        if heads.dtype != torch.float32:
            heads = heads.float()
        if self.head_floor is not None:
            heads = normalize(heads, self.head_floor).mul_(self.head_scale)
        return rotate(heads, turn[:, None, None]), found[:, wide:].view(len(x), self.kv, self.d)

    def prefill(self, x: Tensor, prompts: Prompts, stores: list[Store]) -> Tensor:
        """x (T, D) → x + attention (T, D); fills the cache."""
        heads, values = self._project(x, prompts.turn)
        heads = heads.to(x.dtype)
        prompts.fill.into(stores[0], heads[:, :, -1])
        prompts.fill.into(stores[1], values)
        query = heads[:, :, :-1].reshape(len(x), -1, self.d)
        seen = (t.transpose(0, 1)[None] for t in (query, heads[:, :, -1], values))
        out = attend(*seen, prompts.rows, scaling=1.0, window=self.window)
        return self.out(out.reshape(len(x), -1), add=x)

    def step(self, x: Tensor, now: Now, stores: list[Store]) -> Tensor:
        """x (R, D) → x + attention (R, D), after the new token's key and value have been stored."""
        heads, values = self._project(x, now.turn)
        heads = heads.to(x.dtype)
        stores[0].write(now.step.slot, now.step.column, heads[:, :, -1])
        stores[1].write(now.step.slot, now.step.column, values)
        query = heads.view(-1, self.group + 1, self.d)[:, :-1]
        if not self.form.exact:
            group, = now.step.groups
            keys, seen = (store.seen(len(x), group.width) for store in stores)
            out = look(query, keys, seen, group.mask(self.kv, self.window))
            return self.out(out.view(len(x), -1), add=x)
        out = x.new_empty(len(x), self.kv, self.group, self.d)
        for group in now.step.groups:
            keys, seen = (s.data[group.rows].flatten(0, 1) for s in stores)
            own = query.view(len(x), self.kv, self.group, self.d)[group.rows].flatten(0, 1)
            found = look(own, keys[..., :group.width], seen[:, :group.width], group.mask(self.kv, self.window))
            out[group.rows] = found.view(len(group.rows), self.kv, self.group, self.d)
        return self.out(out.view(len(x), -1), add=x)


def look(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(query keys + mask) values: (n, g, d), (n, d, L), (n, L, d_v), (n, 1, L) → (n, g, d_v).

    Two batched products: for a query or two a row, torch's fused attention takes twice the time.
    """
    scores = torch.bmm(query, keys) if mask is None else torch.baddbmm(mask.to(query.dtype), query, keys)
    if scores.dtype == torch.float32:
        return torch.bmm(torch.softmax(scores, -1, out=scores), values)
    return torch.bmm(torch.softmax(scores, -1, dtype=torch.float32).to(values.dtype), values)


class FeedForward:
    """x + down(act(gate(h)) * up(h)), h = norm(x)."""

    def __init__(self, mlp: nn.Module, norm: nn.Module, form: Form):
        self.form, self.floor, self.act, self.exact = form, floor_of(norm), mlp.act_fn, form.exact
        self.both = self.down = None
        self.load(mlp, norm)

    def load(self, mlp: nn.Module, norm: nn.Module) -> None:
        """Copy the weights as they are now."""
        self.both = pack(*join([mlp.gate_proj, mlp.up_proj], norm), self.form, self.both)
        self.down = pack(*weight_of(mlp.down_proj), self.form, self.down)

    def __call__(self, x: Tensor) -> Tensor:
        """(n, D) → (n, D)"""
        inner = gated(self.act, self.both(normalize(x, self.floor)), exact=self.exact)
        return self.down(inner, add=x)


def gated(act: Callable[[Tensor], Tensor], both: Tensor, *, exact: bool) -> Tensor:
    """act(gate) * up, the two side by side: (n, 2 I) → (n, I)"""
    half = both.shape[1] // 2
    # exact: torch shares out larger tensors among threads mid-row, where its functions round a little differently
    parts = both.split(max(1, SHARED_OUT // half)) if exact else (both,)
    found = [act(part[:, :half]).mul_(part[:, half:]) for part in parts]
    return found[0] if len(found) == 1 else torch.cat(found)
