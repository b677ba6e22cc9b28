"""The steps of a dense transformer layer over T tokens, with analytic gradients and few saved tensors.

In: activations (T, ...) in float32 or float64 and weights. Out: activations. Each step computes what the stock module
computes, in fewer passes over memory, and keeps for its gradient what it cannot compute again cheaply.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tinyr2.models.products import by_input, by_weight, linear

Grads = tuple[Tensor | None, ...]
Linear = tuple[Tensor, Tensor | None]  # weight (N, K), bias (N,)
BLOCK = 2**17  # elements of each tensor in a block
TOKENS = 1024  # in a block of products


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (T, D) / rms(x) · weight (D,) → (T, D). Zhang & Sennrich 2019, eq. 4."""
    return _Norm.apply(x, weight, eps)


def norm_linears(x: Tensor, norm: Tensor, eps: float,
                 layers: list[Linear]) -> tuple[Tensor, ...]:
    """`rms_norm(x, norm, eps)` through several linear layers (weight (N, D), bias (N,) or None) → one (T, N) each."""
    return _NormLinears.apply(x, norm, eps, *(part for layer in layers for part in layer))


def rotate(x: Tensor, cos: Tensor, sin: Tensor, norm: Tensor | None = None, eps: float = 0.0) -> Tensor:
    """Rotary embedding of heads, which `rms_norm` normalizes first if `norm` (D,) is given.

    x (T, H, D)   cos, sin (T, D)   → (T, H, D). Su et al. 2021, eq. 34, with coordinate i paired with i + D/2.
    """
    return _Rotate.apply(x, cos, sin, norm, eps)


def swiglu(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(silu(gate) · up) (T, F) through a linear layer (D, F) → (T, D). Shazeer 2020, eq. 6."""
    return _Swiglu.apply(gate, up, weight, bias)


def add_mlp_(x: Tensor, norm: Tensor, eps: float, gate: Linear, up: Linear, down: Linear) -> Tensor:
    """Add `swiglu` of `norm_linears` of x (T, D) to x, in place and without gradients."""
    (wg, bg), (wu, bu) = ((weight * norm, bias) for weight, bias in (gate, up))
    for part in x.split(TOKENS):
        unit, _ = _normalize(part, eps)
        product = F.silu(linear(unit, wg, bg), inplace=True).mul_(linear(unit, wu, bu))
        part.add_(linear(product, *down))
    return x


def short_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None = None) -> Tensor:
    """Causal attention over short rows: all scores of a row exist at once.

    query (b, L, H, D)   key (b, L, H_kv, D)   value (b, L, H_kv, D_v)   → (b, L, H, D_v)
    """
    return _ShortAttention.apply(query, key, value, scaling, window)


def move(x: Tensor, there: Tensor, back: Tensor) -> Tensor:
    """x (n, ...) → (m, ...): row j of the result is row there[j] of x; back[i] is where row i has gone.

    A row of x that several rows of the result repeat gets the gradient of row back[i] alone: the others are padding.
    """
    return _Move.apply(x, there, back)


def drop_padding(x: Tensor, kept: Tensor) -> Tensor:
    """x (m, ...) → (n, ...), its rows `kept`; the gradient of the others is 0."""
    return _DropPadding.apply(x, kept)


def _normalize(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x (..., D) → x / rms(x), 1 / rms(x) (..., 1)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    inverse = norm.mul_(norm).div_(x.shape[-1]).add_(eps).rsqrt_()
    return x * inverse, inverse


def _denormalize(grad: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """The gradient by x of `_normalize(x)`, given that by its result; overwrites `grad`."""
    mean = (grad * unit).sum(-1, keepdim=True).div_(-unit.shape[-1])
    return grad.addcmul_(unit, mean).mul_(inverse)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        unit, inverse = _normalize(x, eps)
        ctx.save_for_backward(unit, inverse, weight)
        return unit * weight

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Grads:
        unit, inverse, weight = ctx.saved_tensors
        return (_denormalize(grad * weight, unit, inverse) if ctx.needs_input_grad[0] else None,
                (grad * unit).sum(0) if ctx.needs_input_grad[1] else None, None)


class _NormLinears(torch.autograd.Function):
    """The norm's weight is multiplied into the linear weights: then one tensor, x / rms(x), serves every gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, norm: Tensor, eps: float, *layers: Tensor | None) -> tuple[Tensor, ...]:
        unit, inverse = _normalize(x, eps)
        ctx.save_for_backward(unit, inverse, norm, *layers[::2])
        return tuple(linear(unit, w * norm, b) for w, b in zip(layers[::2], layers[1::2], strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> Grads:
        unit, inverse, norm, *weights = ctx.saved_tensors
        wants_x, wants_norm, _, *wants = ctx.needs_input_grad
        by_x, by_norm, by_layers = None, torch.zeros_like(norm) if wants_norm else None, []
        for i, (grad, w) in enumerate(zip(grads, weights, strict=True)):
            by_w = by_weight(grad, unit) if wants[2 * i] or wants_norm else None
            if wants_norm:
                by_norm += (by_w * w).sum(0)
            by_layers += [by_w.mul_(norm) if wants[2 * i] else None, grad.sum(0) if wants[2 * i + 1] else None]
            if wants_x:
                part = by_input(grad, w * norm)
                by_x = part if by_x is None else by_x.add_(part)
        return (_denormalize(by_x, unit, inverse) if wants_x else None, by_norm, None, *by_layers)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor, norm: Tensor | None, eps: float) -> Tensor:
        ctx.eps = eps
        ctx.save_for_backward(*((cos, sin) if norm is None else (cos, sin, norm, x)))
        if norm is None:
            return _turn(x, cos, *_signed(sin))
        weighted = norm.roll(len(norm) // 2)  # the weight of the coordinate that each one is paired with
        return _turn(_normalize(x, eps)[0], cos * norm, *_signed(sin * weighted))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Grads:
        cos, sin, *normed = ctx.saved_tensors
        upper, lower = sin.chunk(2, -1)
        grad = _turn(grad, cos, lower, -upper)  # the transpose of the rotation
        if not normed:
            return grad, None, None, None, None
        norm, x = normed
        unit, inverse = _normalize(x, ctx.eps)  # again: cheaper than to keep it
        by_norm = (grad * unit).sum((0, 1)) if ctx.needs_input_grad[3] else None
        by_x = _denormalize(grad.mul_(norm), unit, inverse) if ctx.needs_input_grad[0] else None
        return by_x, None, None, by_norm, None


def _signed(sin: Tensor) -> tuple[Tensor, Tensor]:
    upper, lower = sin.chunk(2, -1)
    return -upper, lower


def _turn(x: Tensor, same: Tensor, upper: Tensor, lower: Tensor) -> Tensor:
    """x (T, H, D) · same (T, D), plus each half of x times what the other half adds to it, (T, D/2) each."""
    out = x * same[:, None]
    (first, second), half = x.chunk(2, -1), x.shape[-1] // 2
    out[..., :half].addcmul_(second, upper[:, None])
    out[..., half:].addcmul_(first, lower[:, None])
    return out


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        product = torch.empty_like(gate)
        for p, g, u in _blocks(product, gate, up):
            torch.ops.aten.silu.out(g, out=p).mul_(u)
        return linear(product, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Grads:
        gate, up, weight = ctx.saved_tensors
        _, _, wants_weight, wants_bias = ctx.needs_input_grad
        by_gate = by_input(grad, weight)  # by the product, at first
        by_up, product = torch.empty_like(by_gate), torch.empty_like(by_gate)
        for dg, du, p, g, u in _blocks(by_gate, by_up, product, gate, up):
            active = F.silu(g)
            torch.mul(dg, active, out=du)
            torch.mul(active, u, out=p)
            torch.ops.aten.silu_backward.grad_input(dg.mul_(u), g, grad_input=dg)
        return (by_gate, by_up, by_weight(grad, product) if wants_weight else None,
                grad.sum(0) if wants_bias else None)


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same tokens of each tensor, so few at a time that they stay in the cache between passes."""
    return zip(*(x.split(max(1, BLOCK // x.shape[1])) for x in tensors), strict=True)


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
        b, length, heads, _ = query.shape
        shared = key.shape[2]
        q, k, v = (_by_head(x, shared) for x in (query, key, value))
        hidden = _hidden(length, window, query).repeat(heads // shared, 1)[None]
        shares = torch.baddbmm(hidden, q, k.transpose(1, 2), alpha=scaling)
        torch.softmax(shares, -1, out=shares)
        ctx.scaling, ctx.shape, ctx.shared = scaling, (b, length), shared
        ctx.save_for_backward(q, k, v, shares)
        return _by_token(torch.bmm(shares, v), b, length)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Grads:
        q, k, v, shares = ctx.saved_tensors
        grad = _by_head(grad, ctx.shared)
        by_value = torch.bmm(shares.transpose(1, 2), grad)
        by_scores = torch.bmm(grad, v.transpose(1, 2)).mul_(shares)
        by_scores.addcmul_(shares, by_scores.sum(-1, keepdim=True), value=-1)
        by_query = torch.bmm(by_scores, k).mul_(ctx.scaling)
        by_key = torch.bmm(by_scores.transpose(1, 2), q).mul_(ctx.scaling)
        return (*(_by_token(x, *ctx.shape) for x in (by_query, by_key, by_value)), None, None)


def _by_head(x: Tensor, shared: int) -> Tensor:
    """(b, L, H, D) → (b · shared, H / shared · L, D): heads that read the same keys lie one under the other."""
    b, length, heads, width = x.shape
    grouped = x.view(b, length, shared, heads // shared, width).permute(0, 2, 3, 1, 4)
    return grouped.reshape(b * shared, heads // shared * length, width)


def _by_token(x: Tensor, b: int, length: int) -> Tensor:
    """The inverse of `_by_head`."""
    heads = x.shape[0] * x.shape[1] // (b * length)
    return x.view(b, heads, length, -1).transpose(1, 2).contiguous()


def _hidden(length: int, window: int | None, like: Tensor) -> Tensor:
    """(L, L): -inf where a token may not look, else 0."""
    ones = torch.ones(length, length, dtype=torch.bool, device=like.device)
    seen = ones.tril() if window is None else ones.tril().triu(1 - window)
    return torch.zeros(length, length, dtype=like.dtype, device=like.device).masked_fill_(~seen, -math.inf)


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, there: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x.index_select(0, there)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Grads:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class _DropPadding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, kept: Tensor) -> Tensor:
        ctx.rows = len(x)
        ctx.save_for_backward(kept)
        return x.index_select(0, kept)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Grads:
        return grad.new_zeros(ctx.rows, *grad.shape[1:]).index_copy_(0, ctx.saved_tensors[0], grad), None
