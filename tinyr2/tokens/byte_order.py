"""A vocabulary in the order of its bytes: then all tokens that go on where one ends lie side by side.

In: the byte string of each id. Out: the order, and the stretch of it that extends each id. Integers only, no model.
"""

from collections.abc import Sequence

import numpy as np


def byte_order(pieces: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(order, first, last), each (V,) int64: the ids whose bytes strictly extend id v's are order[first[v]:last[v]].

    pieces  the bytes of each id; b"" for ids that stand for no bytes (special tokens): they extend nothing, and
            nothing extends them
    pieces b"a", b"", b"ab", b"b" → order 1 0 2 3, where [2:3] of id 0 holds id 2, and the others' stretches are empty.
    """
    order = sorted(range(len(pieces)), key=pieces.__getitem__)
    first, last = np.zeros(len(pieces), dtype=np.int64), np.zeros(len(pieces), dtype=np.int64)
    equal: list[int] = []  # ids of one piece, whose extensions begin after the last of them
    open_pieces: list[list[int]] = []  # each a prefix of the next; closed where a piece does not go on from it
    for place, token in enumerate(order):
        if not (piece := pieces[token]):
            continue
        if equal and pieces[equal[0]] == piece:
            equal.append(token)
            first[equal] = place + 1
            continue
        while open_pieces and not piece.startswith(pieces[open_pieces[-1][0]]):
            last[open_pieces.pop()] = place
        equal = [token]
        first[token] = place + 1
        open_pieces.append(equal)
    for ids in open_pieces:
        last[ids] = len(order)
    return np.array(order, dtype=np.int64), first, last
