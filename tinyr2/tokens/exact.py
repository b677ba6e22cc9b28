"""Which bytes of a text its tokens spell exactly, where a tokenizer has changed or dropped some of it.

In: texts, the bytes of each token that a tokenizer made of them, and the characters that it says the token comes from.
Out: the byte at which each token ends, and the byte ranges that the tokens do not spell. Each claim of the tokenizer is
compared with the text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

Ranges = tuple[tuple[int, int], ...]


def exact_ends(texts: Sequence[str], pieces: Sequence[Sequence[bytes]],
               offsets: Sequence[Sequence[tuple[int, int]]]) -> list[tuple[np.ndarray, Ranges]]:
    """[((n,) int64 the byte at which each token ends, the lost byte ranges [start, stop))] for each text.

    pieces, offsets: of a text's n tokens, their bytes and the characters [start, stop) that they come from. Tokens that
    share characters are judged together, with what was dropped before them: a space that a word's token spells is its
    own. Where they are not the text's bytes, all of them end where their place does, and its bytes are lost.
    """
    counts = np.array([len(own) for own in pieces], dtype=np.int64)
    raw = np.frombuffer("".join(texts).encode(), dtype=np.uint8)
    byte_at = np.append(((raw & 0xC0) != 0x80).nonzero()[0], len(raw))  # characters to bytes
    text_at = np.cumsum([0, *map(len, texts)])  # texts to characters
    flat = np.fromiter(chain.from_iterable(chain.from_iterable(offsets)), np.int64, 2 * int(counts.sum()))
    places = _places(flat.reshape(-1, 2) + np.repeat(text_at[:-1], counts)[:, None], counts, text_at[:-1])
    joined = list(chain.from_iterable(pieces))
    spelled = np.cumsum(np.fromiter(map(len, joined), np.int64, len(joined)))
    ends, stops = byte_at[places.reach], spelled[places.last] if len(spelled) else spelled
    bounds = byte_at[text_at]
    done = np.where(places.first, bounds[places.text], np.append(0, ends[:-1])[:len(ends)])
    begins = ends - np.diff(stops, prepend=0)
    exact = begins >= done
    # Byte k of the pieces should be byte k + shift of the text.
    place = np.repeat(np.arange(len(ends)), np.diff(stops, prepend=0))
    at = np.arange(len(place)) + (ends - stops)[place]
    wrong = np.frombuffer(b"".join(joined), dtype=np.uint8) != raw[np.maximum(at, 0)] if len(place) else place
    exact &= np.bincount(place, wrong, minlength=len(ends)) == 0
    begins = np.where(exact, begins, ends)
    of = np.repeat(np.arange(len(ends)), np.diff(places.last, prepend=-1))
    token_ends = np.where(exact[of], ends[of] - stops[of] + spelled, ends[of])
    lost = _lost(places, done, begins, ends, bounds)
    cuts = np.cumsum([0, *counts])
    return [(token_ends[cuts[k]:cuts[k + 1]] - bounds[k], lost[k]) for k in range(len(texts))]


@dataclass(frozen=True)
class _Places:
    """c runs of tokens whose characters are theirs alone; all (c,)."""

    last: np.ndarray  # the last token of each
    reach: np.ndarray  # the character after the last one
    text: np.ndarray  # which text it is in
    first: np.ndarray  # bool: the first place of its text


def _places(offsets: np.ndarray, counts: np.ndarray, text_at: np.ndarray) -> _Places:
    reach = np.maximum.accumulate(offsets[:, 1])
    text = np.repeat(np.arange(len(counts)), counts)
    final = np.append(text[1:] != text[:-1], True)[:len(text)]
    after = np.append(offsets[1:, 0], 0)[:len(text)]
    tokens = (final | (after >= reach)).nonzero()[0]
    # A token without a character goes with those after it, or at the end of a text with those before it.
    new = np.append(True, (np.diff(reach[tokens]) > 0) | (np.diff(text[tokens]) > 0))[:len(tokens)]
    run_ends = tokens[np.append(new[1:], True)[:len(tokens)]]
    last = np.where(final[run_ends], run_ends, tokens[new])
    last = last[final[last] | (reach[last] > text_at[text[last]])]
    own = text[last]
    return _Places(last, reach[last], own, np.append(True, own[1:] != own[:-1])[:len(own)])


def _lost(places: _Places, done: np.ndarray, begins: np.ndarray, ends: np.ndarray,
          bounds: np.ndarray) -> list[Ranges]:
    """What is between the places of each text, before the first, and after the last; neighboring ranges as one."""
    tails = bounds[:-1].copy()
    tails[places.text] = ends  # the last place of a text stays
    text = np.concatenate([places.text, np.arange(len(tails))])
    start, stop = np.concatenate([done, tails]), np.concatenate([begins, bounds[1:]])
    order = np.lexsort((start, text))
    order = order[start[order] < stop[order]]
    text, start, stop = text[order], start[order], stop[order]
    goes_on = (start[1:] == stop[:-1]) & (text[1:] == text[:-1])
    opens, closes = np.append(True, ~goes_on)[:len(text)], np.append(~goes_on, True)[:len(text)]
    own = text[opens]
    ranges = list(zip((start[opens] - bounds[own]).tolist(), (stop[closes] - bounds[own]).tolist(), strict=True))
    cuts = np.searchsorted(own, np.arange(len(tails) + 1)).tolist()
    return [tuple(ranges[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
