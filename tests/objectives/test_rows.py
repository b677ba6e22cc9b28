"""Packed rows against their nested lists."""

import torch

from tinyr2.objectives import rows

CPU = torch.device("cpu")


def test_padding_puts_each_row_at_the_left_and_zeros_after_it():
    padded, places = rows.pad(torch.tensor([1.0, 2.0, 3.0, 4.0]), [1, 0, 3])
    assert padded.tolist() == [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [2.0, 3.0, 4.0]]
    assert places.tolist() == [[True, False, False], [False] * 3, [True] * 3]
    assert padded[places].tolist() == [1.0, 2.0, 3.0, 4.0]


def test_repeating_gives_each_token_the_value_of_its_row():
    assert rows.repeat(torch.tensor([5.0, 6.0, 7.0]), [2, 0, 1]).tolist() == [5.0, 5.0, 7.0]


def test_totals_are_those_of_each_row():
    assert rows.total(torch.tensor([1.0, 2.0, 4.0]), [1, 0, 2]).tolist() == [1.0, 0.0, 6.0]


def test_a_total_does_not_depend_on_the_rows_beside_it():
    x = torch.randn(200, generator=torch.Generator().manual_seed(0))
    alone = rows.total(x[:50], [50])
    assert torch.equal(rows.total(x, [50, 150])[:1], alone)


def test_remaining_counts_the_tokens_that_follow():
    assert rows.remaining([3, 0, 1, 2], CPU).tolist() == [2, 1, 0, 0, 1, 0]


def test_no_rows_and_empty_rows_hold_nothing():
    empty = torch.zeros(0)
    for lengths in ([], [0], [0, 0]):
        assert rows.pad(empty, lengths)[0].shape == (len(lengths), 0)
        assert rows.total(empty, lengths).tolist() == [0.0] * len(lengths)
        assert rows.remaining(lengths, CPU).tolist() == []
