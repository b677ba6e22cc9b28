"""The order of a vocabulary's bytes, against a search through all pairs."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyr2.tokens.byte_order import byte_order


def test_the_example_by_hand():
    order, first, last = byte_order([b"a", b"", b"ab", b"b"])
    assert order.tolist() == [1, 0, 2, 3]
    assert (first[0], last[0]) == (2, 3)
    assert all(first[v] == last[v] for v in (1, 2, 3))
    assert order.dtype == first.dtype == last.dtype == np.int64


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.text("ab\xff", max_size=5).map(lambda s: s.encode("latin-1")), max_size=40))
def test_the_stretch_of_each_id_holds_all_its_strict_extensions_and_nothing_else(pieces):
    order, first, last = byte_order(pieces)
    assert sorted(order.tolist()) == list(range(len(pieces)))
    for v, piece in enumerate(pieces):
        expected = {w for w, other in enumerate(pieces) if piece and other.startswith(piece) and other != piece}
        stretch = order[first[v]:last[v]].tolist()
        assert set(stretch) == expected and len(stretch) == len(expected)


def test_equal_pieces_have_the_same_extensions_and_do_not_extend_each_other():
    order, first, last = byte_order([b"ab", b"a", b"abc", b"ab"])
    for v in (0, 3):
        assert order[first[v]:last[v]].tolist() == [2]
    assert set(order[first[1]:last[1]].tolist()) == {0, 2, 3}
