"""Matrix products: the same numbers as torch's own, sooner.

In: activations (..., K) and a weight (N, K). Out: (..., N). On a CPU in float32, torch multiplies with MKL, which on
some processors leaves half of the vector units idle; oneDNN's kernels, which torch carries too, do not. Small products
stay where they are: a call into oneDNN costs some 15 µs before it multiplies.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Multiplications (rows x K x N) from which on oneDNN is the faster one: 20 µs on either side, on two cores.
WORTHWHILE = 2**21
# Elements of a weight from which on its packed layout is the faster one however few the rows: it is read, not computed.
LARGE = 2**18


def available() -> bool:
    """Whether this build of torch carries oneDNN's products."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K) @ weight (N, K)^T + bias (N,) → (..., N), with gradients; what torch.nn.functional.linear gives."""
    if not _gains(x, weight):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)


def by_input(grad: Tensor, weight: Tensor) -> Tensor:
    """grad (T, N) @ weight (N, K) → (T, K): the gradient of `linear` by its input."""
    return _product(grad, weight.t()) if _gains(grad, weight) else grad @ weight


def by_weight(grad: Tensor, x: Tensor) -> Tensor:
    """grad (T, N)^T @ x (T, K) → (N, K): the gradient of `linear` by its weight."""
    if not _gains(x, grad.t()):
        return grad.t() @ x
    # the wider operand as the weight; a convolution with one-element filters can be faster still, but is seventy times
    # slower for some numbers of tokens
    return _product(x.t(), grad.t()).t() if grad.shape[1] > x.shape[1] else _product(grad.t(), x.t())


def _gains(x: Tensor, weight: Tensor) -> bool:
    # without autocast: its products are in bfloat16, and torch sends those to oneDNN itself
    return (x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
            and x.numel() * weight.shape[0] >= WORTHWHILE and available())


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    """A product whose gradients are products of the same kind."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        flat, states = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        wants = ctx.needs_input_grad
        return (by_input(flat, weight).view(x.shape) if wants[0] else None,
                by_weight(flat, states) if wants[1] else None,
                flat.sum(0) if wants[2] else None)


def refill(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    """A copy of `new`, at `old`'s address where there is an old one: captured steps read their weights by address."""
    if new is None:
        return None
    new = new.detach()
    return new.clone() if old is None else old.copy_(new)


class Packed:
    """A weight (N, K) laid out once for many products with few rows; it is not to change meanwhile.

    Row i of a product is the same number, bit for bit, whatever the other rows are, if `exact`: then small products
    too go through the packed layout.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, exact: bool = False):
        self.shape = weight.shape
        self._packs = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16) and available()
        small = self._packs and not exact and weight.numel() < LARGE
        self._few = WORTHWHILE // weight.numel() if small else 0  # up to so many rows torch is faster
        self.bias = self._packed = self._plain = None
        self.load(weight, bias)

    def load(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Other numbers of the same shape, dtype and device; where nothing is packed, they take the old ones' place."""
        weight = weight.detach()
        if not self._packs:
            self._plain, self.bias = refill(self._plain, weight.t()), refill(self.bias, bias)
            return
        self.bias = None if bias is None else bias.detach()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 64)
        self._plain = weight.t().contiguous() if self._few else None

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """x (R, K) → (R, N), plus the bias, plus `add` (R, N); in x's dtype."""
        if self._packed is None or len(x) <= self._few:
            out = x @ self._plain if self.bias is None else torch.addmm(self.bias, x, self._plain)
            return out if add is None else out.add_(add)
        if add is None:
            return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(x, add, self._packed, self.bias, "add")

    def wide(self, x: Tensor) -> Tensor:
        """x (R, K) → (R, N) float32, plus the bias: on CUDA as it was summed, not rounded to x's dtype first."""
        if x.device.type != "cuda" or x.dtype == torch.float32:
            return self(x).float()
        out = torch.mm(x, self._plain, out_dtype=torch.float32)  # CUDA's own argument
        return out if self.bias is None else out.add_(self.bias)
