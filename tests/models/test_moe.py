"""Mixtures of experts: the copy chooses and weighs as the stock router does, token by token."""

import pytest
import torch

from tests.models.test_mla import make
from tinyr2.models.blocks import Form
from tinyr2.models.moe import Experts

MODELS = ["v3 experts", "v3 experts, one group, raw weights", "v2 experts", "v2 experts in groups"]
STATES = 3 * torch.randn(50, 32, generator=torch.Generator().manual_seed(5))


def layer(name: str, **changes) -> torch.nn.Module:
    return make(name, **changes).model.layers[1]


def copy_of(stock: torch.nn.Module, exact: bool = False) -> Experts:
    return Experts(stock.mlp, stock.post_attention_layernorm, Form(exact=exact))


def routes(experts: Experts, x: torch.Tensor) -> torch.Tensor:
    """(n, E): the weight with which each token goes to each expert, 0 where it does not."""
    unit = x / (x.norm(dim=-1, keepdim=True) ** 2 + 32e-6) ** 0.5
    weights, chosen = experts.router(unit)
    return torch.zeros(len(x), len(experts.both)).scatter_(1, chosen, weights)


@torch.no_grad()
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("name", MODELS)
def test_the_mixture_adds_what_the_stock_one_does(name, shared, exact):
    stock = layer(name, n_shared_experts=shared)
    expected = STATES + stock.mlp(stock.post_attention_layernorm(STATES)[None])[0]
    torch.testing.assert_close(copy_of(stock, exact)(STATES), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_tokens_go_where_the_stock_router_sends_them(name):
    stock = layer(name)
    _, weights, chosen = stock.mlp.gate(stock.post_attention_layernorm(STATES))
    expected = torch.zeros(50, 8).scatter_(1, chosen, weights)
    found = routes(copy_of(stock), STATES)
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", ["v3 experts", "v2 experts in groups"])
def test_a_limit_on_groups_keeps_a_token_within_two_of_the_four(name):
    limited = routes(copy_of(layer(name)), STATES) > 0
    free = routes(copy_of(layer(name, topk_group=4)), STATES) > 0
    assert int(limited.view(50, 4, 2).any(-1).sum(-1).max()) == 2
    assert int(free.view(50, 4, 2).any(-1).sum(-1).max()) == 3
    assert limited.sum(-1).tolist() == free.sum(-1).tolist() == [3] * 50


@torch.no_grad()
def test_the_bias_of_a_router_moves_the_choice_and_not_the_weights():
    stock = layer("v3 experts, one group, raw weights")
    before = routes(copy_of(stock), STATES)
    stock.mlp.gate.e_score_correction_bias[3] += 10.0
    after = routes(copy_of(stock), STATES)
    assert not (before[:, 3] > 0).all()
    assert (after[:, 3] > 0).all()
    kept = (before > 0) & (after > 0)
    assert torch.equal(before[kept], after[kept])
    assert float(after.max()) <= 2.5  # a sigmoid times the default factor


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_what_an_exact_token_gets_is_the_same_to_the_bit_whatever_is_beside_it(name):
    experts = copy_of(layer(name), exact=True)
    together = experts(STATES)
    for rows in (*([i] for i in range(50)), [7, 3], list(range(49, 0, -3)), [11] * 30):
        assert torch.equal(experts(STATES[rows]), together[rows])
        assert torch.equal(routes(experts, STATES[rows]), routes(experts, STATES)[rows])


@torch.no_grad()
def test_an_expert_runs_on_the_tokens_that_chose_it_and_no_others():
    experts = copy_of(layer("v2 experts"))
    chose = routes(experts, STATES[:2]) > 0
    seen = {}

    def watched(expert, product):
        def run(h):
            seen[expert] = len(h)
            return product(h)
        return run

    experts.both = [watched(e, product) for e, product in enumerate(experts.both)]
    experts(STATES[:2])
    assert seen == {e: n for e, n in enumerate(chose.sum(0).tolist()) if n}
    assert sum(seen.values()) == 6
