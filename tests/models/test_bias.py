"""The mass that a token boundary rules out, against a loop over the vocabulary."""

import math

import pytest
import torch

from tests.models.test_head_cost import Spy
from tinyr2.models.bias import extension_mass
from tinyr2.models.head import Head
from tinyr2.tokens.byte_order import byte_order

PIECES = [b"a", b"abc", b"", b"ab", b"b", b"ba", b"abd", b"ab", b"c", b"bab", b"\xff"]
V = len(PIECES)


def _order():
    return tuple(torch.from_numpy(x) for x in byte_order(PIECES))


def _case(n=V, d=4):
    rng = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, generator=rng, dtype=torch.float64) for shape in ((n, d), (V, d), (V,)))
    return hidden, weight, bias, torch.arange(n) % V


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("temperature", [0.6, 1.0])
@pytest.mark.parametrize("chunk", [1, 3 * V + 2, 2**22])
def test_it_is_the_probability_of_every_longer_token_that_begins_alike(softcap, temperature, chunk):
    hidden, weight, bias, token = _case()
    got = extension_mass(hidden, Head(weight, bias, 1.3, softcap), token, *_order(), temperature=temperature,
                         chunk_elements=chunk)
    for i, v in enumerate(token.tolist()):
        logits = 1.3 * (weight @ hidden[i] + bias)
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        prob = (logits / temperature).softmax(-1)
        expected = sum(prob[w].item() for w, piece in enumerate(PIECES)
                       if PIECES[v] and piece.startswith(PIECES[v]) and piece != PIECES[v])
        assert got[i].item() == pytest.approx(expected, abs=1e-12)


def test_a_token_that_nothing_extends_and_a_special_one_rule_out_nothing():
    hidden, weight, bias, _ = _case(n=3)
    assert extension_mass(hidden, Head(weight, bias), torch.tensor([1, 2, 10]), *_order()).tolist() == [0.0, 0.0, 0.0]


def test_small_masses_keep_their_digits_in_float32():
    weight = torch.zeros(V, 1)
    weight[[1, 6]] = -20.0
    (mass,) = extension_mass(torch.ones(1, 1), Head(weight), torch.tensor([3]), *_order()).tolist()
    assert mass == pytest.approx(2 * math.exp(-20) / (V - 2 + 2 * math.exp(-20)), rel=1e-6)


def test_rows_of_padding_take_part_in_the_softmax_and_extend_nothing():
    hidden, weight, bias, token = _case()
    padded = torch.cat([weight, torch.zeros(3, 4, dtype=torch.float64)])
    prob = (hidden @ padded.T).softmax(-1)
    got = extension_mass(hidden, Head(padded), token, *_order())
    assert got[4].item() == pytest.approx((prob[4, 5] + prob[4, 9]).item(), abs=1e-12)


def test_no_block_of_logits_is_larger_than_a_chunk():
    hidden, weight, _, token = _case(n=100, d=3)
    with Spy(V, widths=(3,)) as spy:
        extension_mass(hidden, Head(weight), token, *_order(), chunk_elements=10 * V)
    assert 0 < spy.largest <= 10 * V


def test_no_tokens_have_no_mass():
    hidden, weight, _, token = _case(n=0)
    assert extension_mass(hidden, Head(weight), token, *_order()).shape == (0,)
