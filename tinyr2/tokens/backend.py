"""A tokenizer's parts: what each id stands for, and a private copy that writes plain text.

In: the backend of a fast tokenizer. Out: the bytes of its ids; copies that share its vocabulary, know no special token
by name and put nothing around a text.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import Model
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer
from transformers import PreTrainedTokenizerBase

BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # a byte that SentencePiece has no character for
_UNREACHABLE = "\U0010ffff"  # no character, before the name of a special token that no text may become
_ANCHOR = "a"  # a token that every decoder writes as it is


def is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokens are written in the byte-level alphabet of `byte_of_char`."""
    decoder = tokenizer.backend_tokenizer.decoder if tokenizer.is_fast else None
    return decoder is not None and "ByteLevel(" in repr(decoder)


def byte_of_char() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for: Radford et al. 2019's printable alphabet."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [b for b in range(256) if b not in set(plain)]
    return {chr(b): b for b in plain} | {chr(256 + k): b for k, b in enumerate(moved)}


def byte_pieces(source: Tokenizer, special: frozenset[int]) -> tuple[bytes, ...]:
    """The bytes of each id inside a text."""
    vocabulary = source.get_vocab(with_added_tokens=True)
    pieces = [b""] * (max(vocabulary.values(), default=-1) + 1)
    added = source.get_added_tokens_decoder()
    byte_level = source.decoder is not None and "ByteLevel(" in repr(source.decoder)
    fallback = source.decoder is not None and "ByteFallback(" in repr(source.decoder)
    # Latin-1 is the map from code points to bytes; what stands below 256 and is no byte's letter must not pass it.
    table = {ord(c): b for c, b in byte_of_char().items()}
    table = {c: 0xFFFF for c in range(256) if c not in table} | table
    for token, i in vocabulary.items():
        if i in special:
            continue
        if byte_level:
            pieces[i] = token.encode() if i in added else _letters(token, table)
        elif fallback and (found := BYTE.fullmatch(token)):
            pieces[i] = bytes([int(found[1], 16)])
        else:
            pieces[i] = decoded(source, [_ANCHOR, token])[len(_ANCHOR):].encode()
    return tuple(pieces)


def _letters(token: str, table: Mapping[int, int]) -> bytes:
    try:
        return token.translate(table).encode("latin-1")
    except UnicodeEncodeError:
        return token.encode()  # a token that is not written in the byte alphabet is plain text


def decoded(source: Tokenizer, tokens: list[str]) -> str:
    """What the tokenizer's decoder makes of `tokens`."""
    return " ".join(tokens) if source.decoder is None else source.decoder.decode(tokens)


def private_copy(source: Tokenizer, normalizer: Normalizer | None, pre_tokenizer: PreTokenizer | None) -> Tokenizer:
    """The same vocabulary and ids, deaf to the names of special tokens, and with nothing around a text."""
    added = sorted(source.get_added_tokens_decoder().items())
    names = {token.content for _, token in added if token.special}
    model = source.model
    # BPE merges letter by letter and never comes upon a name; the others look whole words up.
    merges = type(model).__name__ == "BPE" and not model.ignore_merges
    renamed = None if merges else _renamed(model, names)
    private = Tokenizer(renamed or model)
    if normalizer is not None:
        private.normalizer = normalizer
    if pre_tokenizer is not None:
        private.pre_tokenizer = pre_tokenizer
    for i, token in added:
        if renamed and token.special:
            token = AddedToken(_UNREACHABLE + token.content, special=True, normalized=False)
        private.add_tokens([token])
        assert private.token_to_id(token.content) == i, f"added token {token.content!r}: id {i} cannot be kept"
    private.encode_special_tokens = True
    return private


def _renamed(model: Model, names: set[str]) -> Model | None:
    """`model` whose special tokens have names that no text contains; None where it has none."""
    if all(model.token_to_id(name) is None for name in names):
        return None
    state = json.loads(model.__getstate__())
    vocabulary = state["vocab"]

    def new(token: str) -> str:
        return _UNREACHABLE + token if token in names else token

    state["vocab"] = ([[new(token), score] for token, score in vocabulary] if isinstance(vocabulary, list)
                      else {new(token): i for token, i in vocabulary.items()})
    if state.get("unk_token") is not None:
        state["unk_token"] = new(state["unk_token"])
    return _built(model=state).model


def without_prefix(source: Tokenizer) -> tuple[Normalizer | None, PreTokenizer | None] | None:
    """Normalizer and pre-tokenizer that put no space before a text; None where the tokenizer's own put none."""
    normalizer = None if source.normalizer is None else json.loads(source.normalizer.__getstate__())
    cutter = None if source.pre_tokenizer is None else json.loads(source.pre_tokenizer.__getstate__())
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    kept = [step for step in steps if step["type"] != "Prepend"]
    # After a first cut, the space belongs to every word, not to the text.
    head = {} if cutter is None else cutter.get("pretokenizers", [cutter])[0]
    spaced = head.get("add_prefix_space") is True or head.get("prepend_scheme", "never") != "never"
    if len(kept) == len(steps) and not spaced:
        return None
    head |= {key: value for key, value in (("add_prefix_space", False), ("prepend_scheme", "never")) if key in head}
    built = _built(normalizer={"type": "Sequence", "normalizers": kept}, pre_tokenizer=cutter)
    return built.normalizer, built.pre_tokenizer


def _built(**parts: Any) -> Tokenizer:
    """A backend of these parts, each in the form of tokenizer.json."""
    rest = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
            "pre_tokenizer": None, "post_processor": None, "decoder": None,
            "model": {"type": "BPE", "vocab": {}, "merges": []}}
    return Tokenizer.from_str(json.dumps(rest | parts))
