"""Mixtures of experts: a decoder's feed-forward for DeepSeek-V2 and V3.

In: a stock mixture. Out: an object with packed copies of its weights, which runs an expert only on the tokens that
chose it. What a token chooses and what it gets do not depend on the tokens beside it.
"""

import torch
from torch import Tensor, nn

from tinyr2.models.blocks import FeedForward, Form, floor_of, gated, normalize, pack
from tinyr2.models.products import refill


class Experts:
    """x + shared(h) + sum over the chosen experts e of weight_e · expert_e(h), h = norm(x) (DeepSeek-V3, eq. 12)."""

    def __init__(self, mlp: nn.Module, norm: nn.Module, form: Form):
        experts, shared = inner(mlp.experts), mlp.shared_experts
        self.form, self.floor, self.act, self.exact = form, floor_of(norm), experts.act_fn, form.exact
        self.router = Router(mlp.gate, form)
        self.both, self.down = [None] * len(experts.down_proj), [None] * len(experts.down_proj)
        self.shared = FeedForward(shared, norm, form) if shared.gate_proj.out_features > 0 else None
        self._load_routed(mlp, norm)

    def load(self, mlp: nn.Module, norm: nn.Module) -> None:
        """Copy the weights as they are now."""
        if self.shared is not None:
            self.shared.load(mlp.shared_experts, norm)
        self._load_routed(mlp, norm)

    def _load_routed(self, mlp: nn.Module, norm: nn.Module) -> None:
        scale = norm.weight.detach().float() * norm.weight.numel() ** 0.5
        self.router.load(mlp.gate, scale)
        both, down = (parameter_of(mlp.experts, name) for name in ("gate_up_proj", "down_proj"))
        self.both = [pack(w * scale, None, self.form, old) for w, old in zip(both, self.both, strict=True)]
        self.down = [pack(w, None, self.form, old) for w, old in zip(down, self.down, strict=True)]

    def __call__(self, x: Tensor) -> Tensor:
        """(n, D) → (n, D)"""
        h = normalize(x.float(), self.floor)
        weights, chosen = self.router(h)
        order = chosen.flatten().argsort(stable=True)  # (n k,) pairs of token and choice, expert by expert
        pairs = h.to(x.dtype)[order // chosen.shape[1]]
        counts = chosen.flatten().bincount(minlength=len(self.both)).tolist()
        parts = [self._run(e, part) for e, part in enumerate(pairs.split(counts)) if len(part)]
        found = torch.cat(parts)[order.argsort()].view(*chosen.shape, -1)
        routed = (found * weights[..., None]).sum(1).to(x.dtype)
        return (x if self.shared is None else self.shared(x)) + routed

    def _run(self, expert: int, h: Tensor) -> Tensor:
        return self.down[expert](gated(self.act, self.both[expert](h), exact=self.exact))


class Router:
    """Which experts a token goes to, and with which weights, in float32.

    DeepSeek-V3 (eq. 13-16): sigmoid scores; a bias that balances the load takes part in the choice, not in the weights;
    a group is worth its two best experts. DeepSeek-V2 (eq. 22, 2.2.2): softmax scores; a group is worth its best one.
    """

    def __init__(self, gate: nn.Module, form: Form):
        self.form = Form(torch.float32, form.exact)
        self.score = self.balance = None
        gate = inner(gate)
        balance = getattr(gate, "e_score_correction_bias", None)
        self.count, self.factor = gate.top_k, gate.routed_scaling_factor
        self.normalizes = balance is not None and gate.norm_topk_prob
        grouped = balance is not None or gate.topk_method == "group_limited_greedy"
        self.groups, self.kept = (gate.num_group, gate.topk_group) if grouped else (1, 1)

    def load(self, gate: nn.Module, scale: Tensor) -> None:
        """Copy the weights as they are now. scale (D,): of the norm that the router reads through"""
        self.score = pack(parameter_of(gate, "weight") * scale, None, self.form, self.score)
        balance = getattr(inner(gate), "e_score_correction_bias", None)
        self.balance = refill(self.balance, balance if balance is None else balance.float())

    def __call__(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """h (n, D) float32 → weights (n, k) float32, experts (n, k) int64."""
        logits = self.score(h)
        if self.balance is None:
            wanted = scores = self._limit(logits.softmax(-1), best=1, outside=0.0)
        else:
            scores = _sigmoid(logits)
            wanted = self._limit(scores + self.balance, best=2, outside=float("-inf"))
        chosen = wanted.topk(self.count, dim=-1, sorted=False)[1]
        weights = scores.gather(1, chosen)
        if self.normalizes:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * self.factor, chosen

    def _limit(self, scores: Tensor, best: int, outside: float) -> Tensor:
        """(n, E) → (n, E): `outside` for experts in groups that others beat by the sum of their `best` ones."""
        if self.kept == self.groups:
            return scores
        grouped = scores.unflatten(1, (self.groups, -1))
        worth = grouped.topk(best, dim=-1)[0].sum(-1)
        kept = worth.topk(self.kept, dim=-1, sorted=False)[1]
        out = torch.ones_like(worth, dtype=torch.bool).scatter_(1, kept, False)
        return grouped.masked_fill(out[..., None], outside).flatten(1)


def inner(module: nn.Module) -> nn.Module:
    """The stock module, without the adapters that wrap it."""
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def parameter_of(module: nn.Module, name: str) -> Tensor:
    """A parameter of a stock module in float32, the adapters that wrap it merged; each wrapper adapts one parameter."""
    weight = getattr(inner(module), name).detach().float()
    while module is not inner(module):
        if module.parameter_name == name and not module.merged and not module.disable_adapters:
            for adapter in module.active_adapters:
                weight = weight + module.get_delta_weight(adapter).detach().float()
        module = module.base_layer
    return weight


def _sigmoid(x: Tensor) -> Tensor:
    """(n, E): torch's own, over few numbers, rounds by their place in memory; a softmax goes row by row."""
    return torch.stack([x, torch.zeros_like(x)], -1).softmax(-1)[..., 0]
