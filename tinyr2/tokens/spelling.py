"""How a tokenizer's ids read as bytes, and how it writes any bytes as ids.

In: a fast tokenizer of any kind whose tokens can be read one by one. Out: the bytes of each id; the text of ids with
the byte at which each token ends; and the ids of a text, with the byte ranges that they do not spell exactly. Integers
and bytes alone: nothing is guessed, and nothing becomes U+FFFD.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from tinyr2.core.errors import DataError
from tinyr2.tokens.backend import BYTE, byte_pieces, decoded, is_byte_level, private_copy, without_prefix
from tinyr2.tokens.exact import exact_ends

_INVALID = re.compile("([\udc80-\udcff])")  # what Python's surrogateescape makes of a byte that is no UTF-8


@dataclass(frozen=True)
class Encoded:
    """A text of b bytes as n ids.

    Where a lossy normalizer, an unknown character or a dropped space leaves tokens that are not the text's bytes, the
    ids are still what the tokenizer writes, and `lost` names the bytes; all tokens of such a place end with it.
    """

    ids: tuple[int, ...]  # (n,)
    ends: np.ndarray  # (n,) int64, the byte at which each token ends; never falling
    lost: tuple[tuple[int, int], ...]  # byte ranges [start, stop), in order, apart


@dataclass(frozen=True)
class Spelling:
    """One tokenizer, as bytes."""

    vocab: int  # the largest id + 1
    pieces: tuple[bytes, ...]  # by id; b"" for special tokens and for ids without a token
    special: frozenset[int]  # zero-byte tokens; an added token that is not special is text
    _lengths: np.ndarray  # (vocab + 1,) int64 bytes of each id; the last stands for any larger id
    _source: Tokenizer  # the tokenizer's own backend, to decode a first token
    _opening: Tokenizer  # writes the beginning of a text
    _going_on: Tokenizer  # writes what follows other text: without a space that the text lacks
    _byte_level: bool
    _single: Mapping[int, int]  # the id of a byte, for bytes that are no character
    _firsts: dict[int, bytes]  # filled as they are asked for

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "Spelling":
        """Reads the tokenizer's parts, and tries them on its own tokens.

        Byte-level BPE, SentencePiece's kinds with or without byte fallback, WordPiece, Unigram, plain characters.
        DataError: a slow tokenizer; tokens that do not spell what it decodes; text that it cannot write back.
        """
        name = tokenizer.name_or_path or "tokenizer"
        if not tokenizer.is_fast:
            raise DataError(f"{name}: a {type(tokenizer).__name__} has no tokenizer.json, so its bytes cannot be read; "
                            f"convert it with AutoTokenizer.from_pretrained(…, use_fast=True).save_pretrained(…)")
        source = tokenizer.backend_tokenizer
        special = frozenset(i for i, token in source.get_added_tokens_decoder().items() if token.special)
        pieces = byte_pieces(source, special)
        lengths = np.array([*map(len, pieces), 0], dtype=np.int64)
        opening = private_copy(source, source.normalizer, source.pre_tokenizer)
        plain = without_prefix(source)
        single = {piece[0]: i for i, piece in reversed([*enumerate(pieces)]) if len(piece) == 1 and piece[0] >= 0x80}
        spelling = cls(len(pieces), pieces, special, lengths, source, opening,
                       opening if plain is None else private_copy(source, *plain), is_byte_level(tokenizer), single, {})
        spelling._verify(tokenizer, name)
        return spelling

    def spell(self, ids: Sequence[int]) -> tuple[bytes, np.ndarray]:
        """(The text of `ids` in bytes, (n,) int64 the byte at which each token ends).

        As the tokenizer decodes them without special tokens; a space that it leaves out before the first word is no
        text. A character that is cut off reads as its bytes.
        """
        known = np.minimum(np.asarray(ids, dtype=np.int64), self.vocab)
        found = [self.pieces[i] if i < self.vocab else b"" for i in known.tolist()]
        lengths = self._lengths[known]
        first = self.first_piece(ids)
        if first is not None:
            at, piece = first
            found[at], lengths[at] = piece, len(piece)
        return b"".join(found), lengths.cumsum()

    def first_piece(self, ids: Sequence[int]) -> tuple[int, bytes] | None:
        """(Where the text of `ids` begins, how this token reads there); None where it reads as everywhere."""
        if self._byte_level:
            return None
        at = next((k for k, i in enumerate(ids) if i < self.vocab and i not in self.special), None)
        return None if at is None else (at, self._first(ids[at]))

    def _first(self, i: int) -> bytes:
        """How an id reads at the beginning of a text."""
        if i not in self._firsts:
            piece = self.pieces[i]
            if piece and not (len(piece) == 1 and piece >= b"\x80"):  # such a byte decodes to U+FFFD
                piece = decoded(self._source, [self._source.id_to_token(i)]).encode()
            self._firsts[i] = piece
        return self._firsts[i]

    @property
    def prefixes(self) -> bool:
        """Whether the tokenizer puts a space before a text."""
        return self._opening is not self._going_on

    def name(self, i: int) -> str:
        """A token as text: the bytes of a piece, or what a special token is called; "" for an id without a token."""
        if i in self.special:
            return self._source.id_to_token(i)
        return self.pieces[i].decode(errors="replace") if i < self.vocab else ""

    def ids_of_bytes(self) -> dict[bytes, int]:
        """The id of each byte string: where several read alike, the smallest, but a spelled-out byte comes last."""
        found: dict[bytes, int] = {}
        for i, piece in enumerate(self.pieces):
            if piece and (piece not in found or self._spelled_out(found[piece]) and not self._spelled_out(i)):
                found[piece] = i
        return found

    def _spelled_out(self, i: int) -> bool:
        return BYTE.fullmatch(self._source.id_to_token(i) or "") is not None

    def encode(self, text: bytes) -> Encoded:
        """`text` as the tokenizer's ids, without special tokens; names of special tokens in it are plain text.

        Bytes that are no UTF-8 become the tokenizer's tokens of one byte; where it has none, they are lost.
        """
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[bytes], *, opens: Sequence[bool] | None = None) -> list[Encoded]:
        """`encode` for many at once.

        opens: which texts begin a text, and may get a first space of zero bytes; None: all
        """
        opens = [True] * len(texts) if opens is None else opens
        parts = [list(_stretches(text)) for text in texts]
        first = [(parts[k][0], k) for k, o in enumerate(opens) if o and parts[k] and isinstance(parts[k][0], str)]
        opened = dict(zip((k for _, k in first), self._write(self._opening, [s for s, _ in first]), strict=True))
        rest = [(k, j) for k, part in enumerate(parts) for j, s in enumerate(part)
                if isinstance(s, str) and not (j == 0 and k in opened)]
        written = self._write(self._going_on, [parts[k][j] for k, j in rest])
        found = dict(zip(rest, written, strict=True)) | {(k, 0): e for k, e in opened.items()}
        return [found[k, 0] if len(part) == 1 and (k, 0) in found
                else _joined([found[k, j] if (k, j) in found else self._one_byte(s) for j, s in enumerate(part)])
                for k, part in enumerate(parts)]

    def _write(self, backend: Tokenizer, stretches: list[str]) -> list[Encoded]:
        batch = [e.ids for e in backend.encode_batch_fast(stretches, add_special_tokens=False)]
        out = [self._checked(backend, stretch, ids) for stretch, ids in zip(stretches, batch, strict=True)]
        changed = [k for k, encoded in enumerate(out) if encoded is None]
        if changed:
            for k, encoded in zip(changed, self._by_offsets(backend, [stretches[k] for k in changed]), strict=True):
                out[k] = encoded
        return out

    def _checked(self, backend: Tokenizer, stretch: str, ids: list[int]) -> Encoded | None:
        """A stretch that its tokens spell from end to end; None where they do not."""
        found = self._read(backend, stretch, ids)
        if b"".join(found) != stretch.encode():
            return None
        ends = self._lengths[ids].cumsum()
        return Encoded(tuple(ids), ends - (ends[0] - len(found[0]) if ids else 0), ())

    def _by_offsets(self, backend: Tokenizer, stretches: list[str]) -> list[Encoded]:
        batch = backend.encode_batch(stretches, add_special_tokens=False)
        found = [self._read(backend, s, e.ids) for s, e in zip(stretches, batch, strict=True)]
        exact = exact_ends(stretches, found, [e.offsets for e in batch])
        return [Encoded(tuple(e.ids), ends, lost) for e, (ends, lost) in zip(batch, exact, strict=True)]

    def _read(self, backend: Tokenizer, stretch: str, ids: list[int]) -> list[bytes]:
        """The bytes of each token of a stretch that `backend` has written; where it opens, as decoding does."""
        found = [*map(self.pieces.__getitem__, ids)]
        if backend is not self._opening or not found:
            return found
        if not self._byte_level:
            found[0] = self._first(ids[0])
        elif self.prefixes and stretch[:1] != " ":  # byte-level decoding leaves the space of `add_prefix_space`
            found[0] = found[0].removeprefix(b" ")
        return found

    def _one_byte(self, byte: int) -> Encoded:
        i = self._single.get(byte)
        return Encoded((), np.zeros(0, np.int64), ((0, 1),)) if i is None else Encoded((i,), np.ones(1, np.int64), ())

    def _verify(self, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        """Some tokens from all over the vocabulary must read as they are decoded, and be written back."""
        text = [i for i, piece in enumerate(self.pieces) if piece]
        chosen = text[::max(1, len(text) // 256)]
        told = []
        for k in range(0, len(chosen), 8):
            ids = chosen[k:k + 8]
            spelled, _ = self.spell(ids)
            try:
                read = spelled.decode()
            except UnicodeDecodeError:
                continue  # decoding would write U+FFFD
            decoded = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            if decoded != read:
                raise DataError(f"{name}: the bytes of its tokens cannot be recovered: {ids} are {read!r} one by one, "
                                f"but decoded {decoded!r}; take a tokenizer whose tokens are pieces of the text "
                                f"(byte-level BPE, SentencePiece, WordPiece)")
            told.append(spelled)
        whole = b"".join(told)
        lost = sum(stop - start for start, stop in self.encode(whole).lost)
        if 2 * lost > len(whole) or not whole:
            raise DataError(f"{name}: the tokenizer cannot round-trip: of {len(whole)} bytes that its own tokens spell "
                            f"it writes {len(whole) - lost} back; mend the normalizer, pre_tokenizer and decoder in "
                            f"its tokenizer.json")


def _stretches(text: bytes) -> Iterator[str | int]:
    """`text` as characters, and as bytes where they are no UTF-8."""
    for part in _INVALID.split(text.decode("utf-8", "surrogateescape")):
        if _INVALID.fullmatch(part):
            yield ord(part) - 0xDC00
        elif part:
            yield part


def _merged(ranges: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Neighboring ranges as one, empty ones left out."""
    out: list[tuple[int, int]] = []
    for start, stop in ranges:
        if out and out[-1][1] == start:
            out[-1] = (out[-1][0], stop)
        elif stop > start:
            out.append((start, stop))
    return tuple(out)


def _joined(parts: list[Encoded]) -> Encoded:
    """Parts of one text, end to end. A part is as long as the place where its last token or loss ends."""
    ids: list[int] = []
    ends, lost, done = [np.zeros(0, dtype=np.int64)], [], 0
    for part in parts:
        ids += part.ids
        ends.append(part.ends + done)
        lost += [(start + done, stop + done) for start, stop in part.lost]
        done += max(int(part.ends[-1]) if len(part.ends) else 0, part.lost[-1][1] if part.lost else 0)
    return Encoded(tuple(ids), np.concatenate(ends), _merged(lost))
