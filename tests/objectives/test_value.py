"""The critic's side: sums, advantages and losses against loops in float64, by hand, and in what must not matter."""

import math

import pytest
import torch

from tests.objectives import loops
from tinyr2.objectives.value import adaptive_lambda, discounted_sum, explained_variance, gae, value_loss

LENGTHS = [3, 1, 0, 8, 5, 2]
LAST = [math.nan, 0.4, 7.0, -1.3, math.nan, 0.2]


def _random(n=19, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _loop_gae(reward, value, lengths, gamma, lams, last):
    rows = zip(loops.split(reward.tolist(), lengths), loops.split(value.tolist(), lengths), lams, last, strict=True)
    return [a for r, v, lam, x in rows for a in loops.gae(r, v, gamma, lam, None if x is None or math.isnan(x) else x)]


@pytest.mark.parametrize("discount", [0.0, 0.5, 0.97, 1.0])
def test_discounted_sums_are_those_of_the_loops(discount):
    x = _random()
    expected = [y for row in loops.split(x.tolist(), LENGTHS) for y in loops.discounted_sum(row, discount)]
    assert discounted_sum(x, LENGTHS, discount).tolist() == pytest.approx(expected, rel=1e-10)
    each = torch.full((len(LENGTHS),), discount, dtype=torch.float64)
    assert torch.equal(discounted_sum(x, LENGTHS, each), discounted_sum(x, LENGTHS, discount))


def test_each_row_has_a_discount_of_its_own():
    x, discounts = _random(), [0.9, 1.0, 0.3, 0.0, 0.5, 0.99]
    expected = [y for row, d in zip(loops.split(x.tolist(), LENGTHS), discounts, strict=True)
                for y in loops.discounted_sum(row, d)]
    got = discounted_sum(x, LENGTHS, torch.tensor(discounts, dtype=torch.float64))
    assert got.tolist() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 8, 9, 63, 64, 65])
def test_a_sum_reaches_the_last_token_of_a_row_of_any_length(length):
    assert discounted_sum(torch.ones(length), [length], 1.0).tolist() == list(range(length, 0, -1))


def test_sums_by_hand():
    assert discounted_sum(torch.tensor([1.0, 2.0, 4.0, 8.0]), [3, 1], 0.5).tolist() == [3.0, 4.0, 4.0, 8.0]
    assert discounted_sum(torch.zeros(0), [0, 0], 0.5).tolist() == []
    assert discounted_sum(torch.zeros(0), [], 0.5).tolist() == []


def test_the_input_of_a_sum_is_left_as_it_was():
    x = torch.ones(4)
    discounted_sum(x, [4], 1.0)
    assert x.tolist() == [1.0] * 4


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
@pytest.mark.parametrize("last", [None, LAST])
def test_advantages_are_those_of_the_loops(gamma, lam, last):
    reward, value = _random(seed=1), _random(seed=2)
    bootstrap = None if last is None else torch.tensor(last, dtype=torch.float64)
    got = gae(reward, value, LENGTHS, gamma=gamma, lam=lam, last_value=bootstrap)
    expected = _loop_gae(reward, value, LENGTHS, gamma, [lam] * 6, last or [None] * 6)
    assert got.tolist() == pytest.approx(expected, rel=1e-10, abs=1e-13)


def test_each_row_has_a_lambda_of_its_own():
    reward, value = _random(seed=1), _random(seed=2)
    lams = [0.1, 0.2, 0.0, 0.9, 1.0, 0.5]
    got = gae(reward, value, LENGTHS, gamma=0.99, lam=torch.tensor(lams, dtype=torch.float64))
    expected = _loop_gae(reward, value, LENGTHS, 0.99, lams, [None] * 6)
    assert got.tolist() == pytest.approx(expected, rel=1e-10, abs=1e-13)


def test_advantages_by_hand_of_an_answer_that_ended_and_of_one_that_was_cut_off():
    reward, value = torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.25])
    assert gae(reward, value, [2], gamma=1.0, lam=0.5).tolist() == [-0.25 + 0.5 * 0.75, 0.75]
    cut = gae(reward, value, [2], gamma=1.0, lam=0.5, last_value=torch.tensor([2.0]))
    assert cut.tolist() == [-0.25 + 0.5 * 2.75, 2.75]
    ended = gae(reward, value, [2], gamma=1.0, lam=0.5, last_value=torch.tensor([math.nan]))
    assert ended.tolist() == gae(reward, value, [2], gamma=1.0, lam=0.5).tolist()


@pytest.mark.parametrize("last", [None, torch.tensor(LAST, dtype=torch.float64)])
def test_lambda_and_gamma_one_give_the_return_minus_the_value(last):
    reward, value = _random(seed=3), _random(seed=4)
    tail = [0.0 if last is None or math.isnan(x) else x for x in LAST]
    returns = [sum(row[t:]) + x for row, x in zip(loops.split(reward.tolist(), LENGTHS), tail, strict=True)
               for t in range(len(row))]
    got = gae(reward, value, LENGTHS, gamma=1.0, lam=1.0, last_value=last) + value
    assert got.tolist() == pytest.approx(returns, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
@pytest.mark.parametrize("junk", [1e6, math.inf, math.nan])
def test_values_where_no_token_of_the_answer_is_change_nothing(lam, junk):
    reward, value = _random(seed=1), _random(seed=2)
    alone = gae(reward[4:12], value[4:12], [8], gamma=1.0, lam=lam)
    others = torch.full((4,), junk, dtype=torch.float64)
    beside = gae(torch.cat([others, reward[4:12], others]), torch.cat([others, value[4:12], others]),
                 [4, 8, 4], gamma=1.0, lam=lam)
    assert torch.equal(beside[4:12], alone)


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_an_answer_with_observations_taken_out_is_that_answer(lam):
    """The reward of the last turn reaches the first: nothing restarts, and no value is read, at an observation."""
    learned = [True, True, False, False, True, True, False, True]
    reward, value = _random(8, seed=5), _random(8, seed=6)
    keep = torch.tensor(learned)
    got = gae(reward[keep], value[keep], [5], gamma=1.0, lam=lam)
    # a loop over all places, which steps over those that the policy did not write
    expected, carried, following = [], 0.0, 0.0
    for r, v, own in reversed(list(zip(reward.tolist(), value.tolist(), learned, strict=True))):
        if own:
            carried = r + following - v + lam * carried
            following = v
            expected.insert(0, carried)
    assert got.tolist() == pytest.approx(expected, rel=1e-12)


def test_advantages_are_held_constant():
    reward, value = torch.zeros(2, requires_grad=True), torch.ones(2, requires_grad=True)
    assert not gae(reward, value, [2], gamma=1.0, lam=0.9).requires_grad


def test_the_adaptive_lambda_of_short_and_long_answers():
    assert adaptive_lambda([20, 100, 400, 10_000], alpha=0.05).tolist() == pytest.approx([0.0, 0.8, 0.95, 0.998])
    assert adaptive_lambda([19, 5, 1, 0], alpha=0.05).tolist() == [0.0] * 4
    assert adaptive_lambda([5, 100, 400], alpha=0.05, floor=0.9).tolist() == pytest.approx([0.9, 0.9, 0.95])
    assert adaptive_lambda([1, 7], alpha=math.inf).tolist() == [1.0, 1.0]


def test_the_adaptive_lambda_is_that_of_the_loops():
    lengths = [1, 3, 20, 21, 77, 400]
    expected = [loops.adaptive_lambda(n, 0.05, 0.3) for n in lengths]
    got = adaptive_lambda(lengths, alpha=0.05, floor=0.3, dtype=torch.float64)
    assert got.tolist() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("clip", [None, 0.2, 0.5])
def test_the_value_loss_and_its_gradient_are_those_of_the_loops(clip):
    value, old, returns = _random(seed=7).requires_grad_(), _random(seed=8) / 2, _random(seed=9)
    weight = _random(seed=10).abs()
    got = value_loss(value, old, returns, weight, clip=clip)
    expected = loops.value_loss(value, old.tolist(), returns.tolist(), weight.tolist(), clip)
    assert got.item() == pytest.approx(expected.item(), rel=1e-10)
    slopes = [torch.autograd.grad(y, value)[0] for y in (got, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("value", "loss", "slope"), [
    (1.1, 0.405, -0.9),    # within the clip of 0.2 around 1: the plain square
    (1.5, 0.32, 0.0),      # moved far toward the target 2: the clipped square is larger, and flat
    (0.5, 1.125, -1.5),    # moved far away from it: the plain square is larger
    (3.0, 0.5, 1.0)])      # overshot by more than the clipped value lacks
def test_the_clipped_value_loss_by_hand(value, loss, slope):
    v = torch.tensor([value], requires_grad=True)
    got = value_loss(v, torch.tensor([1.0]), torch.tensor([2.0]), torch.ones(1), clip=0.2)
    got.backward()
    assert got.item() == pytest.approx(loss, rel=1e-6)
    assert v.grad.item() == pytest.approx(slope, rel=1e-6)


def test_parts_of_a_step_add_up_to_the_whole_value_loss():
    value, old, returns, weight = (_random(seed=s) for s in range(4))
    parts = [value_loss(value[s], old[s], returns[s], weight[s], clip=0.2) for s in (slice(0, 7), slice(7, 19))]
    whole = value_loss(value, old, returns, weight, clip=0.2)
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-12)


def test_explained_variance_is_that_of_the_loops():
    value, returns = _random(seed=1), _random(seed=2)
    expected = loops.explained_variance(value.tolist(), returns.tolist())
    assert explained_variance(value, returns) == pytest.approx(expected, rel=1e-10)
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance(torch.full_like(returns, 3.0), returns) == pytest.approx(0.0, abs=1e-12)
    assert explained_variance(-returns, returns) == pytest.approx(-3.0, rel=1e-12)


@pytest.mark.parametrize("returns", [[], [1.0], [0.1] * 16])
def test_returns_that_do_not_vary_have_no_explained_variance(returns):
    assert explained_variance(torch.randn(len(returns)), torch.tensor(returns)) is None


def test_float32_stays_float32_and_follows_float64():
    reward, value, lams = _random(seed=1), _random(seed=2), torch.tensor([0.3, 0.9, 1.0, 0.95, 0.5, 0.0])
    exact = gae(reward, value, LENGTHS, gamma=0.99, lam=lams.double())
    got = gae(reward.float(), value.float(), LENGTHS, gamma=0.99, lam=lams.double())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-6)
