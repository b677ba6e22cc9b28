"""Multi-head latent attention with absorbed projections: a decoder's attention for DeepSeek-V2 and V3.

In: a stock attention module. Out: an object with packed copies of its weights, which remembers of each token one latent
vector and one turned key for all heads, and never expands them into keys and values of heads while it writes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyr2.models.blocks import Form, Now, Prompts, floor_of, join, look, normalize, pack, rotate, weight_of
from tinyr2.models.packed import attend
from tinyr2.models.slots import Store


class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, 2024, eq. 37-47) over cached latents.

    The latent c of a token gives head h the key K_h c and the value V_h c. So a query q_h meets c as K_h^T q_h, and the
    attended mean of values is V_h times that of the latents: a step needs no key or value of its own for any head
    (ibid., section 2.1.2). Over a prompt, where each key meets many queries, they are expanded as in the stock module.
    """

    def __init__(self, attention: nn.Module, norm: nn.Module, form: Form):
        self.form, self.heads = form, attention.num_heads
        self.straight, self.turned = attention.qk_nope_head_dim, attention.qk_rope_head_dim  # dims of a query
        self.latent, self.value = attention.kv_lora_rank, attention.v_head_dim
        self.floor, self.latent_floor = floor_of(norm), floor_of(attention.kv_a_layernorm)
        self.query_floor = None if attention.q_lora_rank is None else floor_of(attention.q_a_layernorm)
        self.entry = self.query = self.expansion = self.out = self.absorb = self.emit = None
        self.load(attention, norm)

    def load(self, attention: nn.Module, norm: nn.Module) -> None:
        """Copy the weights as they are now."""
        self._copy_entry(attention, norm)
        self._copy_expansion(attention)
        self.out = pack(*weight_of(attention.o_proj), self.form, self.out)

    def _copy_entry(self, attention: nn.Module, norm: nn.Module) -> None:
        """What reads x: the queries, or the short vectors that they come from, beside latent and key."""
        # neighbors are turned together; classes whose rope pairs halves get their two halves interleaved
        pairs = torch.arange(self.turned)
        if not getattr(attention.config, "rope_interleave", True):
            pairs = pairs.view(2, -1).t().flatten()
        query = torch.arange(self.heads * attention.qk_head_dim).view(self.heads, -1)
        query = torch.cat([query[:, :self.straight].flatten(), query[:, self.straight:][:, pairs].flatten()])
        if attention.q_lora_rank is None:
            first, scale = query, attention.scaling
        else:
            first, scale = torch.arange(attention.q_lora_rank), 1.0
            weight, bias = join([attention.q_b_proj], attention.q_a_layernorm, query.to(norm.weight.device))
            bias = bias if bias is None else bias * attention.scaling
            self.query = pack(weight * attention.scaling, bias, self.form, self.query)
        self.sizes = [len(first), self.latent, self.turned]
        rows = torch.cat([first, len(first) + torch.arange(self.latent), len(first) + self.latent + pairs])
        entry = attention.q_proj if attention.q_lora_rank is None else attention.q_a_proj
        weight, bias = join([entry, attention.kv_a_proj_with_mqa], norm, rows.to(norm.weight.device))
        weight[:len(first)] *= scale
        if bias is not None:
            bias[:len(first)] *= scale
        self.entry = pack(weight, bias, self.form, self.entry)

    def _copy_expansion(self, attention: nn.Module) -> None:
        """What makes keys and values of latents: for prompts as it is, for steps by head."""
        weight, bias = join([attention.kv_b_proj], attention.kv_a_layernorm)
        assert bias is None, "no known class adds a bias to the expanded latents"
        keys, values = weight.view(self.heads, -1, self.latent).split([self.straight, self.value], 1)
        wide = torch.cat([keys.flatten(0, 1), values.flatten(0, 1)])
        self.expansion = pack(wide, None, self.form, self.expansion)
        if self.absorb is None:
            self.absorb, self.emit = _ByHead(self.form), _ByHead(self.form)
        self.absorb.load(keys.transpose(1, 2))
        self.emit.load(values)

    def stores(self, like: Tensor) -> list[Store]:
        """Latent and turned key of each token, end to end (slots, columns, latent + turned)."""
        return [Store((self.latent + self.turned,), 1, like)]

    def _project(self, x: Tensor, turn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (n, D) → of each head's query the part that stays (n, H, straight) and the one that is turned
        (n, H, turned), scaled for the softmax; what the cache keeps (n, latent + turned)."""
        first, latent, key = self.entry(normalize(x, self.floor)).split(self.sizes, -1)
        query = first if self.query is None else self.query(normalize(first, self.query_floor))
        straight, turned = query.split([self.heads * self.straight, self.heads * self.turned], -1)
        turned = torch.cat([turned, key], -1).float().view(len(x), self.heads + 1, self.turned)
        turned = rotate(turned, turn[:, None]).to(x.dtype)
        kept = torch.cat([normalize(latent, self.latent_floor), turned[:, -1]], -1)
        return straight.unflatten(-1, (self.heads, self.straight)), turned[:, :-1], kept

    def prefill(self, x: Tensor, prompts: Prompts, stores: list[Store]) -> Tensor:
        """x (T, D) → x + attention (T, D); fills the cache."""
        straight, turned, kept = self._project(x, prompts.turn)
        prompts.fill.into(stores[0], kept)
        wide = self.expansion(kept[:, :self.latent])
        keys, values = wide.split([self.heads * self.straight, self.heads * self.value], -1)
        shared = kept[:, None, self.latent:].expand(-1, self.heads, -1)
        query, key = torch.cat([straight, turned], -1), torch.cat([keys.view_as(straight), shared], -1)
        value = values.unflatten(-1, (self.heads, self.value))
        # torch's fused attention wants keys and values of one size, and would else hold all scores at once
        size = max(query.shape[-1], self.value)
        same = (t if t.shape[-1] == size else F.pad(t, (0, size - t.shape[-1])) for t in (query, key, value))
        seen = (t.transpose(0, 1)[None] for t in same)
        out = attend(*seen, prompts.rows, scaling=1.0)[0, ..., :self.value]
        return self.out(out.reshape(len(x), -1), add=x)

    def step(self, x: Tensor, now: Now, stores: list[Store]) -> Tensor:
        """x (R, D) → x + attention (R, D), after the new token's latent and key have been stored."""
        straight, turned, kept = self._project(x, now.turn)
        stores[0].write(now.step.slot, now.step.column, kept)
        query = torch.cat([self.absorb(straight), turned], -1)
        data = stores[0].data
        if self.form.exact:
            found = query.new_empty(len(x), self.heads, self.latent)
            for group in now.step.groups:
                found[group.rows] = self._look(query[group.rows], data[group.rows, :group.width], group.mask(1))
        else:
            group, = now.step.groups
            found = self._look(query, data[:len(x), :group.width], group.mask(1))
        return self.out(self.emit(found).reshape(len(x), -1), add=x)

    def _look(self, query: Tensor, kept: Tensor, mask: Tensor | None) -> Tensor:
        """query (R, H, latent + turned), kept (R, L, latent + turned) → the attended latents (R, H, latent)."""
        return look(query, kept.transpose(1, 2), kept[..., :self.latent], mask)


class _ByHead:
    """A weight (N, K) for each of H heads."""

    def __init__(self, form: Form):
        self.form = form
        self.packs = self.weight = None

    def load(self, weight: Tensor) -> None:
        """weight (H, N, K)"""
        if self.form.exact:  # a batched product's numbers depend on how many rows there are, where there are few
            old = self.packs or [None] * len(weight)
            self.packs = [pack(w, None, self.form, one) for w, one in zip(weight, old, strict=True)]
        weight = weight.transpose(1, 2).to(self.form.dtype)
        self.weight = weight.contiguous() if self.weight is None else self.weight.copy_(weight)

    def __call__(self, x: Tensor) -> Tensor:
        """(R, H, K) → (R, H, N)"""
        if self.packs is not None:
            return torch.stack([pack(x[:, head].contiguous()) for head, pack in enumerate(self.packs)], 1)
        return torch.bmm(x.transpose(0, 1), self.weight).transpose(0, 1)
