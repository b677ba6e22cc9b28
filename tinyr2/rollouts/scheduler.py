"""Who decodes when: requests wait, sit in slots, and leave. Integers only.

In: the prompts of all requests, as keys that are equal where prompts are, with their lengths. Out: at each turn either
some requests that enter, or the word that all seated ones take a step.
"""

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """Requests with one prompt that enter together: its cache is computed once."""

    requests: tuple[int, ...]
    tokens: int  # of the prompt


class Scheduler:
    """Seats for at most `max_rows` requests; `seated[slot]` is the request in a slot."""

    def __init__(self, prompts: Sequence[tuple[Hashable, int]], max_rows: int, max_prefill: int = 8192):
        """prompts: key and tokens of each request's    max_prefill: prompt tokens that are computed at once, but for a
        longer prompt, which goes alone"""
        assert max_rows > 0 and max_prefill > 0, f"max_rows {max_rows}, max_prefill {max_prefill}"
        self._prompts, self._max_rows, self._max_prefill = prompts, max_rows, max_prefill
        self._waiting = deque(range(len(prompts)))
        self.seated: list[int] = []

    @property
    def busy(self) -> bool:
        """Whether someone waits or sits."""
        return bool(self._waiting or self.seated)

    def admit(self) -> list[Entry]:
        """Who enters now, into the slots after the last; nobody where a step comes first.

        A door that opens for every single seat would compute prompts one by one, so it waits until a quarter of the
        seats is free, or as many as there are waiting.
        """
        room = self._max_rows - len(self.seated)
        if not self._waiting or room < min(len(self._waiting), max(1, self._max_rows // 4)):
            return []
        entries: list[Entry] = []
        tokens = 0
        while self._waiting and room:
            key, size = self._prompts[self._waiting[0]]
            if entries and tokens + size > self._max_prefill:
                break
            group = []
            while self._waiting and room and self._prompts[self._waiting[0]][0] == key:
                group.append(self._waiting.popleft())
                room -= 1
            entries.append(Entry(tuple(group), size))
            tokens += size
        self.seated += [r for entry in entries for r in entry.requests]
        return entries

    def leave(self, order: Sequence[int]) -> None:
        """Some have left: slot i now has who sat in slot order[i]."""
        self.seated = [self.seated[slot] for slot in order]
