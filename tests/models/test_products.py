"""Products through oneDNN are torch's own, values and gradients; packed ones do not depend on their neighbors."""

import pytest
import torch
import torch.nn.functional as F

from tinyr2.models import products

needs_onednn = pytest.mark.skipif(not products.available(), reason="this build of torch has no oneDNN")


def operands(rows: int, k: int, n: int) -> tuple[torch.Tensor, ...]:
    rng = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=rng) for shape in ((rows, k), (n, k), (n,), (rows, n)))


def gradients(function, x, weight, bias, grad) -> list[torch.Tensor]:
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    out = function(*leaves)
    out.backward(grad)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@needs_onednn
@pytest.mark.parametrize(("rows", "k", "n"), [
    (2000, 64, 96), (2000, 96, 64), (64, 300, 500), (64, 500, 300),  # the weight's gradient either way round
    (7, 5, 3)])  # as torch does it
def test_values_and_gradients_are_those_of_torch(rows, k, n):
    x, weight, bias, grad = operands(rows, k, n)
    exact = gradients(F.linear, *(t.double() for t in (x, weight, bias, grad)))
    for ours, reference in zip(gradients(products.linear, x, weight, bias, grad), exact, strict=True):
        scale = float(reference.abs().max())
        torch.testing.assert_close(ours.double(), reference, rtol=0, atol=2e-6 * scale)


def test_leading_dimensions_are_kept():
    x, weight, bias, _ = operands(1200, 48, 64)
    out = products.linear(x.view(3, 400, 48), weight, bias)
    torch.testing.assert_close(out, F.linear(x, weight, bias).view(3, 400, 64), rtol=0, atol=1e-5)


def test_large_products_go_through_onednn_and_small_ones_do_not():
    def used(rows: int) -> bool:
        x, weight, *_ = operands(rows, 64, 64)
        return products.linear(x.requires_grad_(), weight).grad_fn.name() == "_LinearBackward"

    assert used(products.WORTHWHILE // 64**2) == products.available()
    assert not used(products.WORTHWHILE // 64**2 - 1)


def test_doubles_and_autocast_are_left_to_torch():
    x, weight, *_ = operands(2000, 64, 64)
    assert products.linear(x.double(), weight.double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert products.linear(x, weight).dtype == torch.bfloat16


def test_frozen_operands_get_no_gradient():
    x, weight, bias, grad = operands(2000, 64, 64)
    x.requires_grad_()
    products.linear(x, weight, bias).backward(grad)
    assert x.grad is not None and weight.grad is None and bias.grad is None


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("rows", [1, 40, 700])
def test_a_packed_weight_multiplies_as_a_plain_one(rows, exact):
    x, weight, bias, more = operands(rows, 64, 96)
    packed, bare = products.Packed(weight, bias, exact=exact), products.Packed(weight, exact=exact)
    torch.testing.assert_close(packed(x), F.linear(x, weight, bias), rtol=0, atol=3e-5)
    torch.testing.assert_close(bare(x, add=more.clone()), F.linear(x, weight) + more, rtol=0, atol=3e-5)
    torch.testing.assert_close(packed(x, add=more.clone()), F.linear(x, weight, bias) + more, rtol=0, atol=3e-5)


@needs_onednn
@pytest.mark.parametrize(("k", "n"), [(16, 40), (128, 384), (96, 31)])
def test_a_row_of_an_exact_product_has_the_same_bits_in_any_company(k, n):
    x, weight, bias, _ = operands(130, k, n)
    packed = products.Packed(weight, bias, exact=True)
    together = packed(x)
    for start, rows in ((0, 1), (77, 1), (5, 2), (9, 3), (8, 17), (1, 64)):
        assert torch.equal(packed(x[start:start + rows]), together[start:start + rows])


@needs_onednn
def test_a_second_derivative_is_refused_rather_than_wrong():
    x, weight, *_ = operands(2000, 64, 64)
    out = products.linear(x, weight.requires_grad_()).square().sum()
    first, = torch.autograd.grad(out, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.square().sum().backward()
