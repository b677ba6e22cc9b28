"""Each fused step against the same formula written out, in float64: values, and gradients through autograd."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tinyr2.models import fused


def random(*shape: int, seed: int = 0, grad: bool = True) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=rng, dtype=torch.float64).requires_grad_(grad)


def assert_same(ours, formula, inputs: list[Tensor]) -> None:
    """Both functions give the same values, and the same gradients for every input that wants one."""
    wanted = [x for x in inputs if x.requires_grad]
    results = []
    for function in (ours, formula):
        out = function(*inputs)
        outs = out if isinstance(out, tuple) else (out,)
        loss = sum((o * random(*o.shape, seed=9, grad=False)).sum() for o in outs)
        results.append([*outs, *torch.autograd.grad(loss, wanted)])
    for mine, true in zip(*results, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-10)


def norm(x: Tensor, weight: Tensor, eps: float = 1e-3) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]


def attended(query: Tensor, key: Tensor, value: Tensor, window: int | None = None) -> Tensor:
    """Token by token."""
    b, length, heads, _ = query.shape
    group = heads // key.shape[2]
    rows = []
    for i in range(b):
        for t in range(length):
            first = 0 if window is None else max(0, t + 1 - window)
            for h in range(heads):
                scores = key[i, first:t + 1, h // group] @ query[i, t, h] * 0.3
                rows.append(torch.softmax(scores, 0) @ value[i, first:t + 1, h // group])
    return torch.stack(rows).view(b, length, heads, -1)


def test_rms_norm_is_its_formula():
    assert_same(lambda x, w: fused.rms_norm(x, w, 1e-3), norm, [random(5, 8), random(8, seed=1)])


def test_linears_after_a_norm_are_the_norm_and_then_the_linears():
    inputs = [random(5, 8), random(8, seed=1), random(3, 8, seed=2), random(3, seed=3), random(4, 8, seed=4)]
    assert_same(lambda x, n, w, b, v: fused.norm_linears(x, n, 1e-3, [(w, b), (v, None)]),
                lambda x, n, w, b, v: (F.linear(norm(x, n), w, b), F.linear(norm(x, n), v)), inputs)


@pytest.mark.parametrize("trained", range(5))
def test_one_trained_tensor_among_frozen_ones_gets_its_gradient(trained):
    shapes = [(5, 8), (8,), (3, 8), (3,), (4, 8)]
    inputs = [random(*shape, seed=i, grad=i == trained) for i, shape in enumerate(shapes)]
    assert_same(lambda x, n, w, b, v: fused.norm_linears(x, n, 1e-3, [(w, b), (v, None)]),
                lambda x, n, w, b, v: (F.linear(norm(x, n), w, b), F.linear(norm(x, n), v)), inputs)


def test_frozen_weights_cost_no_gradient(monkeypatch):
    monkeypatch.setattr(fused, "by_weight", lambda *_: pytest.fail("a frozen weight's gradient was computed"))
    x = random(5, 8)
    frozen = [random(*shape, seed=i, grad=False) for i, shape in enumerate([(8,), (6, 8), (6, 8), (8, 6)])]
    gate, up = fused.norm_linears(x, frozen[0], 1e-3, [(frozen[1], None), (frozen[2], None)])
    fused.swiglu(gate, up, frozen[3]).sum().backward()
    assert x.grad.abs().sum() > 0


# Another cosine and sine for each coordinate: no scaling of the angles may break the gradient.
@pytest.mark.parametrize("normed", [False, True])
def test_rotation_is_its_formula(normed):
    cos, sin = random(5, 6, seed=1, grad=False), random(5, 6, seed=2, grad=False)
    if normed:
        assert_same(lambda x, w: fused.rotate(x, cos, sin, w, 1e-3), lambda x, w: turned(norm(x, w), cos, sin),
                    [random(5, 3, 6), random(6, seed=3)])
    else:
        assert_same(lambda x: fused.rotate(x, cos, sin), lambda x: turned(x, cos, sin), [random(5, 3, 6)])


@pytest.mark.parametrize("block", [1, 20, 2**17])
def test_swiglu_is_its_formula_whatever_the_block(monkeypatch, block):
    monkeypatch.setattr(fused, "BLOCK", block)
    inputs = [random(7, 6), random(7, 6, seed=1), random(4, 6, seed=2), random(4, seed=3)]
    assert_same(fused.swiglu, lambda g, u, w, b: F.linear(F.silu(g) * u, w, b), inputs)


@pytest.mark.parametrize("tokens", [2, 1024])
def test_the_mlp_without_gradients_is_the_one_with_them(monkeypatch, tokens):
    monkeypatch.setattr(fused, "TOKENS", tokens)
    x, weight = random(5, 8, grad=False), random(8, seed=1, grad=False)
    gate, up, down = ((random(*s, seed=i, grad=False), random(s[0], seed=i + 5, grad=False))
                      for i, s in enumerate([(6, 8), (6, 8), (8, 6)]))
    true = x + fused.swiglu(*fused.norm_linears(x, weight, 1e-3, [gate, up]), *down)
    torch.testing.assert_close(fused.add_mlp_(x, weight, 1e-3, gate, up, down), true, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("shared", [1, 2, 4])
def test_short_attention_is_attention_token_by_token(window, shared):
    inputs = [random(2, 5, 4, 6), random(2, 5, shared, 6, seed=1), random(2, 5, shared, 3, seed=2)]
    assert_same(lambda q, k, v: fused.short_attention(q, k, v, 0.3, window),
                lambda q, k, v: attended(q, k, v, window), inputs)


def test_moving_there_and_dropping_the_padding_is_the_identity():
    x, there, kept = random(3, 2), torch.tensor([0, 1, 2, 0]), torch.tensor([0, 1, 2])
    assert_same(lambda x: fused.drop_padding(fused.move(x, there, kept), kept), lambda x: x.clone(), [x])


def test_padding_gets_no_gradient():
    x, kept = random(4, 2), torch.tensor([3, 1])
    assert_same(lambda x: fused.drop_padding(x, kept), lambda x: x[kept], [x])
