"""What a decoder is asked, and what it answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tinyr2.core.types import Finish


@dataclass(frozen=True)
class Request:
    """One answer to write.

    Request(prompt_ids=(5, 9), seed=4711, max_new=256)
    """

    prompt_ids: tuple[int, ...]
    seed: int  # of this row's random numbers
    max_new: int  # tokens, at least 1

    def __post_init__(self):
        assert self.prompt_ids and self.max_new > 0, f"{len(self.prompt_ids)} prompt tokens, {self.max_new} to write"


@dataclass(frozen=True)
class Answer:
    """n tokens, with the stop token if one was drawn.

    Answer(response_ids=(7, 1), logp=(-0.1, -0.7), finish="stop")
    """

    response_ids: tuple[int, ...]
    logp: tuple[float, ...]  # (n,) nats at the sampling temperature, over the whole vocabulary
    finish: Finish


@dataclass(frozen=True, kw_only=True)
class Ending:
    """When an answer is over, before its limit: after one of the ids, or when `finished` says so of its tokens."""

    ids: frozenset[int] = frozenset()
    finished: Callable[[Sequence[int]], bool] | None = None

    def reached(self, ids: Sequence[int]) -> bool:
        """Whether the last of `ids` ends the answer."""
        return ids[-1] in self.ids or (self.finished is not None and self.finished(ids))
