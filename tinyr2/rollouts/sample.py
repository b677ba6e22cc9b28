"""Problems to rollouts: a policy writes n answers to each.

In: problems. Out: rollouts, problem by problem, with tokens, text and the log-prob of every sampled token.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from tinyr2.core.errors import DataError, RunError
from tinyr2.core.rng import derive
from tinyr2.core.types import Author, Problem, Rollout
from tinyr2.models.decode import Decoder, supports_decoding
from tinyr2.models.stamp import Stamp
from tinyr2.rollouts.engine import decode_all
from tinyr2.rollouts.request import Ending, Request
from tinyr2.rollouts.sampling import SamplingConfig
from tinyr2.rollouts.stopping import StopStrings
from tinyr2.tokens.chat import decode, render_prompt


class Resident:
    """A decode copy that stays from version to version: refreshed in place, it keeps the steps that were captured."""

    def __init__(self) -> None:
        self._decoder: Decoder | None = None

    def at(self, version: int, make: Callable[[], Decoder]) -> Decoder:
        """The copy, of the weights as they are now if it was another version's; made at the first call."""
        if self._decoder is None:
            self._decoder = make()
        elif self._decoder.version != version:
            self._decoder.refresh(version)
        return self._decoder


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A model that writes, with what it needs to read and to stop; of one version of its weights."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    stop: tuple[int, ...]  # ids that end an answer
    vocab: int  # ids that may be drawn: the first so many of the head's
    context: int | None  # the most tokens a sequence may have
    version: int = 0  # optimizer steps behind the weights
    dtype: torch.dtype | None = None  # to decode in; None: the model's, or autocast's
    exact: bool = False  # an answer does not depend, bit for bit, on what is decoded beside it
    resident: Resident | None = None  # where policies of later versions find this one's decode copy; None: nowhere

    @property
    def writer(self) -> nn.Module | Decoder:
        """What decodes: a copy of the weights as they are at the first call, or the model where no copy is known.

        RunError where the copy has become a later version's, or the model's weights have changed since.
        """
        found = self._writer
        if not isinstance(found, Decoder):
            self._stamp.require(found, self.version)
        if isinstance(found, Decoder) and found.version != self.version:
            raise RunError(f"the decode copy of the weights is that of version {found.version} by now, not of version "
                           f"{self.version}; write with the newest policy")
        return found

    @cached_property
    def _writer(self) -> nn.Module | Decoder:
        if not supports_decoding(self.model):
            return self.model
        return self._copy() if self.resident is None else self.resident.at(self.version, self._copy)

    @cached_property
    def _stamp(self) -> Stamp:
        return Stamp(self.model)

    def _copy(self) -> Decoder:
        return Decoder(self.model, vocab=self.vocab, dtype=self.dtype, exact=self.exact, version=self.version)


def sample(policy: Policy, problems: Sequence[Problem], *, n: int, sampling: SamplingConfig, seed: int, step: int = 0,
           author: Author = "student", max_rows: int = 256) -> list[Rollout]:
    """n answers to each problem, problem-major. RunError where the policy's weights have changed since it first wrote.

    An answer's random numbers follow from (seed, author, step, problem id, how often that problem came before in
    `problems`, sample), and from nothing else.
    """
    prompts = [render_prompt(policy.tokenizer, p.messages) for p in problems]
    requests = []
    seen: Counter[str] = Counter()
    for problem, prompt in zip(problems, prompts, strict=True):
        room = _room(policy, problem, prompt, sampling.max_completion_length)
        before = seen[problem.id]
        requests += [Request(prompt, derive(seed, author, step, problem.id, before, i), room) for i in range(n)]
        seen[problem.id] += 1
    strings = StopStrings(policy.tokenizer, sampling.stop_strings).finished if sampling.stop_strings else None
    answers = decode_all(policy.writer, requests, sampling, stop=Ending(ids=frozenset(policy.stop), finished=strings),
                         vocab=policy.vocab, max_rows=max_rows)
    own = author == "student"
    return [Rollout(
        problem=problems[i // n], group=i // n, sample=i % n, author=author, prompt_ids=request.prompt_ids,
        response_ids=answer.response_ids, actor_logp=answer.logp if own else None, temperature=sampling.temperature,
        finish=answer.finish, policy_version=policy.version if own else None,
        text=decode(policy.tokenizer, answer.response_ids),
    ) for i, (request, answer) in enumerate(zip(requests, answers, strict=True))]


def _room(policy: Policy, problem: Problem, prompt: tuple[int, ...], limit: int) -> int:
    room = limit if policy.context is None else min(limit, policy.context - len(prompt))
    if room < 1:
        raise DataError(f"problem {problem.id}: its prompt has {len(prompt)} tokens, the model's context "
                        f"{policy.context}; drop it, shorten it, or take a model with a longer context")
    return room
