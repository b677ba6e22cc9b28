"""Tokens with a role in a chat, and what stands for them in another tokenizer: by role, not by string.

In: the tokenizers of a student and a teacher. Out: the teacher's ids for each of the student's role tokens, and whether
a prompt has already opened a thought.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from tinyr2.core.errors import ConfigError
from tinyr2.tokens.chat import end_of_turn, stop_ids
from tinyr2.tokens.spelling import Spelling

Thought = Literal["think_open", "think_close"]

# How models that think open and close a thought; the first that a tokenizer has as one token is its own.
_THOUGHTS = (("<think>", "</think>"), ("<thinking>", "</thinking>"), ("<thought>", "</thought>"),
             ("<reasoning>", "</reasoning>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"),
             ("<|think|>", "<|/think|>"), ("<|begin_of_thought|>", "<|end_of_thought|>"),
             ("<|START_THINKING|>", "<|END_THINKING|>"), ("◁think▷", "◁/think▷"))
_KNOWN: dict[Thought, tuple[str, ...]] = {"think_open": tuple(a for a, _ in _THOUGHTS),
                                          "think_close": tuple(b for _, b in _THOUGHTS)}

TAIL = 32  # the tokens among which the opening of a thought is looked for


@dataclass(frozen=True)
class Roles:
    """How a teacher says what the student's role tokens say."""

    said: Mapping[int, tuple[int, ...]]  # the teacher's ids for a student's think token
    phrases: Mapping[bytes, tuple[int, ...]]  # likewise for a text that the user has named
    ends: tuple[int, ...]  # the student's ids that end an answer, its template's own first
    end: int | None  # the teacher's
    opens: Mapping[str, tuple[int, ...]]  # the teacher's ids for each way to open a thought

    @classmethod
    def of(cls, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase,
           spellings: tuple[Spelling, Spelling], named: Mapping[str, tuple[str, str]]) -> "Roles":
        """spellings: the student's and the teacher's    named: role to (the student's text, the teacher's)

        ConfigError: `named` has a role that is none.
        """
        for role in named:
            if role not in _KNOWN:
                raise ConfigError(f"roles: {role!r} is no role that can be named; take {' or '.join(_KNOWN)}")
        ours, theirs = (_Vocabulary(t, s) for t, s in zip((student, teacher), spellings, strict=True))
        said, phrases, opens = {}, {}, {}
        for role, known in _KNOWN.items():
            user = named.get(role)
            for text in known if user is None else (user[0], *known):
                wanted = user[1] if user is not None and text == user[0] else theirs.own(text, known)
                ids = theirs.ids(wanted)
                if role == "think_open":
                    opens[text] = ids
                token = ours.single(text)
                if token is not None and not _reads_alike(ours, theirs, token, ids):
                    said.setdefault(token, ids)
                elif token is None and user is not None and text == user[0]:
                    phrases[text.encode()] = ids
        mine, end = (end_of_turn(t) if t.chat_template else None for t in (student, teacher))
        ends = dict.fromkeys(i for i in (mine, *stop_ids(student, None)) if i is not None)
        return cls(said, phrases, tuple(ends), teacher.eos_token_id if end is None else end, opens)

    def opened(self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int]) -> tuple[str, str] | None:
        """(What opens a thought at the end of the prompt, the white space after it); None where nothing does."""
        tail = tokenizer.decode(list(prompt_ids[-TAIL:]), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        found = re.search(f"({'|'.join(map(re.escape, self.opens))})(\\s*)$", tail)
        return None if found is None else (found[1], found[2])


class _Vocabulary:
    def __init__(self, tokenizer: PreTrainedTokenizerBase, spelling: Spelling):
        self.spelling = spelling
        self._added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}

    def single(self, text: str) -> int | None:
        """The one token that the tokenizer writes for `text`."""
        if text in self._added:
            return self._added[text]
        (encoded,) = self.spelling.encode_all([text.encode()], opens=[False])
        return encoded.ids[0] if len(encoded.ids) == 1 and not encoded.lost else None

    def own(self, text: str, known: Sequence[str]) -> str:
        """`text` if it is one token here, else the first of the known ones that is; `text` where none is."""
        return next((t for t in (text, *known) if self.single(t) is not None), text)

    def ids(self, text: str) -> tuple[int, ...]:
        token = self.single(text)
        if token is not None:
            return (token,)
        (encoded,) = self.spelling.encode_all([text.encode()], opens=[False])
        return () if encoded.lost else encoded.ids


def _reads_alike(ours: _Vocabulary, theirs: _Vocabulary, token: int, ids: tuple[int, ...]) -> bool:
    """Whether a token is text on both sides, and the same one: then it needs no role."""
    if token in ours.spelling.special or theirs.spelling.special.intersection(ids):
        return False
    return ours.spelling.pieces[token] == b"".join(theirs.spelling.pieces[i] for i in ids)
