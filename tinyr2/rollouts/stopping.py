"""Stop strings: texts that end an answer wherever its tokens happen to cut them.

In: a tokenizer, the strings, and the token ids of an answer as they come. Out: whether the answer is finished.
"""

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

_NO_CHARACTER = "\ufffd"  # what decoders write for bytes that are no whole character
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # a byte-fallback token


class StopStrings:
    """Which of some strings an answer contains, told token by token.

    Texts are compared as UTF-8 bytes, so a character may span tokens. A special token counts with its name, as
    `<|im_end|>`. Any number of answers may share one object: it keeps the bytes of tokens seen, nothing of an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]):
        assert all(strings), "an empty stop string is in every text"
        self._tokenizer = tokenizer
        self._strings = tuple(s.encode() for s in strings)
        self._longest = max(map(len, self._strings), default=0)  # bytes
        self._bytes_of: dict[int, bytes] = {}
        self._byte_of_char = {char: byte for byte, char in bytes_to_unicode().items()}

    def finished(self, ids: Sequence[int]) -> bool:
        """Whether the newest token completes a stop string. `ids`: the answer so far, without its prompt, not empty.

        To be asked after each new token: an occurrence that ended before the newest token is not looked for. The
        answer keeps its tokens up to and including the one that completed the string, and with it whatever text that
        token carries beyond. A string that begins in the prompt does not count. Reads as many tokens as the longest
        string has bytes, at most, and decodes only tokens that it has not met.
        """
        if not self._strings:
            return False
        newest = self._bytes(ids[-1])
        if not newest:
            return False
        tail, missing = [newest], self._longest - 1
        for at in range(len(ids) - 2, -1, -1):
            if missing <= 0:
                break
            tail.append(self._bytes(ids[at]))
            missing -= len(tail[-1])
        text = b"".join(reversed(tail))
        return any(string in text for string in self._strings)

    def _bytes(self, token: int) -> bytes:
        found = self._bytes_of.get(token)
        if found is None:
            found = self._bytes_of[token] = self._bytes_within_text(token)
        return found

    def _bytes_within_text(self, token: int) -> bytes:
        """What a token adds to a text: its second copy does, the first may lose a space as the text's beginning."""
        once, twice = self._decode([token]), self._decode([token, token])
        if _NO_CHARACTER not in twice:
            return twice[len(once):].encode()
        name = self._tokenizer.convert_ids_to_tokens(token)
        if byte := _BYTE.fullmatch(name):
            return bytes([int(byte[1], 16)])
        if self._byte_of_char.keys() >= set(name):
            return bytes(self._byte_of_char[char] for char in name)
        return name.encode()

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
