"""How a teacher reads what a student wrote: its own prompt, its own tokens, its own knowledge.

In: rollouts of a step. Out: for each the paper that the teacher gets in its place, or None where it gets none. The
student's text is the same on every paper; only what stands before it, and how it is cut into tokens, may differ.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from tinyr2.core.types import Message, Rollout
from tinyr2.tokens.align import Spans
from tinyr2.tokens.chat import render_prompt
from tinyr2.tokens.translate import Translator

# The messages that the teacher reads in place of the problem's, given the rollout and its group; None: no paper.
Privilege = Callable[[Rollout, Sequence[Rollout]], tuple[Message, ...] | None]


@dataclass(frozen=True, kw_only=True)
class Paper:
    """What a teacher reads in place of one rollout, in its own token ids."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    spans: Spans | None = None  # how its tokens lie against the student's; None: they are the same ones
    bytes: int = 0  # of the student's text, where there are spans
    lost: int = 0  # of these, what the teacher's tokenizer cannot spell
    unpaired: int = 0  # the student's special tokens that the teacher has no counterpart for
    opened: int = 0  # of these, the first ones: they open a thought that the teacher's prompt has opened already


@dataclass(frozen=True, kw_only=True)
class View:
    """How one teacher reads rollouts.

    translator: to another vocabulary; None: the student's ids mean the same to the teacher
    tokenizer   the teacher's, if it reads a prompt of its own (another template, or a privilege); None: the student's
    context     tokens that it can read; a longer paper is none, and never cut
    """

    translator: Translator | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    privilege: Privilege | None = None
    context: int | None = None

    @property
    def plain(self) -> bool:
        """Whether the teacher reads the very tokens that the student has."""
        return self.translator is None and self.tokenizer is None and self.privilege is None

    def papers(self, rollouts: Sequence[Rollout]) -> list[Paper | None]:
        """One paper for each rollout of a step; a group's members may be shown to each other's teachers."""
        messages = self._messages(rollouts)
        told = [i for i, m in enumerate(messages) if m is not None]
        out: list[Paper | None] = [None] * len(rollouts)
        if self.translator is not None:
            found = self.translator.translate_all([(messages[i], rollouts[i]) for i in told])
            for i, t in zip(told, found, strict=True):
                out[i] = Paper(prompt_ids=t.prompt_ids, response_ids=t.response_ids, spans=t.spans, bytes=t.bytes,
                               lost=sum(b - a for a, b in t.lost), unpaired=t.unpaired, opened=t.opened)
        else:
            for i in told:
                prompt = (rollouts[i].prompt_ids if self.tokenizer is None
                          else render_prompt(self.tokenizer, messages[i]))
                out[i] = Paper(prompt_ids=prompt, response_ids=rollouts[i].response_ids)
        return [None if p is None or not self._fits(p) else p for p in out]

    def _messages(self, rollouts: Sequence[Rollout]) -> list[tuple[Message, ...] | None]:
        if self.privilege is None:
            return [r.problem.messages for r in rollouts]
        groups: dict[int, list[Rollout]] = {}
        for r in rollouts:
            groups.setdefault(r.group, []).append(r)
        return [self.privilege(r, groups[r.group]) for r in rollouts]

    def _fits(self, paper: Paper) -> bool:
        return self.context is None or len(paper.prompt_ids) + len(paper.response_ids) <= self.context


def as_rollout(rollout: Rollout, paper: Paper) -> Rollout:
    """The paper as a rollout that can be packed: what was learned of the student's tokens, or all of the teacher's."""
    if paper.spans is None:
        return replace(rollout, prompt_ids=paper.prompt_ids)
    return Rollout(problem=rollout.problem, group=rollout.group, sample=rollout.sample, author=rollout.author,
                   prompt_ids=paper.prompt_ids, response_ids=paper.response_ids, temperature=rollout.temperature,
                   finish=rollout.finish)
