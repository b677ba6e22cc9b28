import random

import pytest

from tinyr2.tokens.exact import exact_ends


def told(*rows):
    """[(ends, lost)] of (text, [(piece, start, stop)])."""
    found = exact_ends([text for text, _ in rows], [[p.encode() for p, _, _ in own] for _, own in rows],
                       [[(a, b) for _, a, b in own] for _, own in rows])
    return [(ends.tolist(), lost) for ends, lost in found]


def test_a_space_before_a_word_is_its_own_where_it_spells_it():
    assert told(("the cat", [("the", 0, 3), (" cat", 4, 7)])) == [([3, 7], ())]
    assert told(("the  cat", [("the", 0, 3), (" cat", 5, 8)])) == [([3, 8], ((3, 4),))]
    assert told(("the cat", [("the", 0, 3), ("cat", 4, 7)])) == [([3, 7], ((3, 4),))]


def test_what_is_not_the_text_s_bytes_is_lost():
    assert told(("aBc", [("a", 0, 1), ("b", 1, 2), ("c", 2, 3)])) == [([1, 2, 3], ((1, 2),))]
    assert told(("aﬁc", [("a", 0, 1), ("f", 1, 2), ("i", 1, 2), ("c", 2, 3)])) == [([1, 4, 4, 5], ((1, 4),))]
    assert told(("aéb", [("a", 0, 1), ("", 1, 2), ("b", 2, 3)])) == [([1, 3, 4], ((1, 3),))]


def test_dropped_characters_are_lost_wherever_they_stand():
    assert told((" ab ", [("a", 1, 2), ("b", 2, 3)])) == [([2, 3], ((0, 1), (3, 4)))]
    assert told(("  ", []), ("a", [("a", 0, 1)]), ("b", [])) == [([], ((0, 2),)), ([1], ()), ([], ((0, 1),))]
    assert told(("  ", [])) == [([], ((0, 2),))]


def test_a_token_without_a_character_goes_with_its_neighbor():
    assert told(("a", [("", 0, 0), ("a", 0, 1)])) == [([0, 1], ())]
    assert told(("ab", [("a", 0, 1), (" ", 1, 1), ("b", 1, 2)])) == [([1, 2, 2], ((1, 2),))]
    assert told(("ab", [("a", 0, 1), ("b", 1, 2), (" ", 2, 2)])) == [([1, 2, 2], ((1, 2),))]


def slow(text, tokens):
    """The same for one text, token by token."""
    groups, group, reach, done = [], [], 0, 0
    for k, token in enumerate(tokens):
        group, reach = [*group, token], max(reach, token[2])
        if reach > done and (k + 1 == len(tokens) or tokens[k + 1][1] >= reach):
            groups.append((group, reach))
            group, done = [], reach
    if group:
        earlier = groups.pop()[0] if groups else []
        groups.append((earlier + group, reach))
    ends, spelled, here = [], [], 0  # spelled: which bytes are
    for group, reach in groups:
        stop = len(text[:reach].encode())
        piece = "".join(p for p, _, _ in group).encode()
        fits = stop - len(piece) >= here and text.encode()[stop - len(piece):stop] == piece
        at = stop - len(piece)
        spelled += range(at, stop) if fits else []
        for p, _, _ in group:
            at += len(p.encode())
            ends.append(at if fits else stop)
        here = stop
    missing, lost = sorted(set(range(len(text.encode()))) - set(spelled)), []
    for b in missing:
        lost = [*lost[:-1], (lost[-1][0], b + 1)] if lost and lost[-1][1] == b else [*lost, (b, b + 1)]
    return ends, tuple(lost)


@pytest.mark.parametrize("seed", range(30))
def test_many_texts_at_once_are_as_each_read_slowly(seed):
    rng, rows = random.Random(seed), []
    for _ in range(30):
        text = "".join(rng.choice("aé漢🙂 ") for _ in range(rng.randrange(1, 9)))
        cuts = sorted(rng.randrange(len(text) + 1) for _ in range(2 * rng.randrange(4)))
        tokens = []
        for a, b in zip(cuts[::2], cuts[1::2], strict=True):
            piece = text[max(0, a - rng.randrange(2)):b]
            tokens.append((piece if rng.random() < 0.8 else rng.choice(["", "a", "🙂 "]), a, b))
            if rng.random() < 0.2:
                tokens.append((rng.choice(["", " "]), max(a, b - 1), b))
        rows.append((text, tokens))
    assert told(*rows) == [slow(text, tokens) for text, tokens in rows]
