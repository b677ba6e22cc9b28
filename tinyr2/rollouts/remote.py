"""Answers written by a model behind a server: any endpoint for chats, which gives text and nothing else.

In: problems. Out: rollouts of author "teacher", problem by problem, with text or an error;
token ids come later, from the tokenizer of whoever is to learn them.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tinyr2.core.answers import key_of
from tinyr2.core.correspondent import Correspondent
from tinyr2.core.errors import DataError, RunError, UserError
from tinyr2.core.net import TRANSIENT, Fault, Request
from tinyr2.core.net_check import check_model, find_version
from tinyr2.core.net_config import NetConfig
from tinyr2.core.rng import derive
from tinyr2.core.types import Message, Problem, Rollout
from tinyr2.rollouts.sampling import SamplingConfig
from tinyr2.tokens.chat import render_example

_BATCH = 16  # answers that are written with one fsync; each may have cost minutes


class ChatConfig(NetConfig):
    """A server with /v1/chat/completions. `budget_tokens` counts what it says it has read and written."""

    # what a server that keeps thoughts apart has cut away around them; None: thoughts are left out
    think_tags: tuple[str, str] | None = ("<think>\n", "\n</think>\n\n")


@dataclass(frozen=True)
class _Written:
    text: str
    finish: str
    tokens: int


class RemoteWriter(Correspondent):
    """A served model that writes."""

    def __init__(self, config: ChatConfig, journal: Path | None) -> None:
        super().__init__(config, journal)
        self.config = config

    def check(self) -> None:
        """ConfigError where nobody answers, or the server lists its models and the configured one is not there."""
        self.version = find_version(self._client)
        check_model(self._client)

    def write(self, problems: Sequence[Problem], *, n: int, sampling: SamplingConfig, seed: int) -> list[Rollout]:
        """n answers to each problem, problem-major, without token ids.

        An answer's seed follows from (seed, problem id, how often that problem came before, sample); one that is in
        the journal is not asked for again. RunError: a cap is reached, or the server answers nothing at all; answers
        that came before are in the journal.
        """
        bodies, places = [], []
        seen: Counter[str] = Counter()
        for group, problem in enumerate(problems):
            before = seen[problem.id]
            seen[problem.id] += 1
            for i in range(n):
                bodies.append(self._body(problem, sampling, derive(seed, "teacher", problem.id, before, i) % 2**31))
                places.append((problem, group, i))
        keys = [key_of("chat", body) for body in bodies]
        new = {key: body for key, body in zip(keys, bodies, strict=True) if key not in self._answers}
        found: dict[str, _Written | Fault] = {}
        try:
            if new:
                with self._client.clocked():
                    self._ask_all(new, found)
        finally:
            answered = sum(isinstance(x, _Written) for x in found.values())
            failed = sum(k in new and not isinstance(found.get(k), _Written) for k in keys)
            self._client.ledger.add(asked=len(keys), answered=answered, failed=failed,
                                    from_journal=len(keys) - answered - failed)
        answers = [found[k] if k in found else _Written(**self._answers[k]) for k in keys]
        return [_rollout(place, answer, sampling) for place, answer in zip(places, answers, strict=True)]

    def _body(self, problem: Problem, sampling: SamplingConfig, seed: int) -> dict[str, Any]:
        body = {"model": self.config.model, "messages": [vars(m) for m in problem.messages], "seed": seed,
                "max_tokens": sampling.max_completion_length, "temperature": sampling.temperature,
                "top_p": sampling.top_p}
        # not every server knows these, so they are named only where they do something
        if sampling.top_k:
            body["top_k"] = sampling.top_k
        if sampling.min_p:
            body["min_p"] = sampling.min_p
        if sampling.stop_strings:
            body["stop"] = list(sampling.stop_strings)
        return body

    def _ask_all(self, new: Mapping[str, dict[str, Any]], found: dict[str, _Written | Fault]) -> None:
        held: dict[str, _Written] = {}
        try:
            for key, answer in self._client.each(list(new), lambda key: self._ask(key, new[key])):
                if isinstance(answer, Fault):
                    found[key] = answer
                    continue
                held[key] = answer
                if len(held) == _BATCH:
                    self._keep(held, found)
        except UserError:
            self._keep(held, found)
            raise
        self._keep(held, found)
        faults = [x for x in found.values() if isinstance(x, Fault) and x.kind in TRANSIENT]
        if len(faults) == len(new):
            raise RunError(f"{faults[-1].text}; the server answered none of {len(new)} requests: mend it and resume")

    def _ask(self, key: str, body: dict[str, Any]) -> _Written | Fault:
        try:
            written = self._client.ask(Request(path="/v1/chat/completions", body=body, key=key), self._read)
        except Fault as fault:
            return fault
        self._client.ledger.add(tokens=written.tokens)
        return written

    def _keep(self, held: dict[str, _Written], found: dict[str, _Written | Fault]) -> None:
        self._answers.add({k: vars(w) for k, w in held.items()}, {k: w.tokens for k, w in held.items()})
        found.update(held)
        held.clear()

    def _read(self, answer: Any) -> _Written:
        try:
            choice = answer["choices"][0]
            message, finish = choice["message"], choice["finish_reason"]
            content, thoughts = message.get("content"), message.get("reasoning_content") or message.get("reasoning")
            usage = answer.get("usage") or {}
            tokens = int(usage.get("prompt_tokens") or 0) + int(usage.get("completion_tokens") or 0)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise Fault("wrong", f"the answer is no chat completion: {type(error).__name__}: {error}") from error
        if finish not in ("stop", "length"):
            raise Fault("refused", f"the server ended the answer by {finish!r}")
        text = self._joined(content, thoughts)
        if text is None:
            raise Fault("wrong", "the answer has no text")
        # vLLM names the stop string that it has cut off
        ending = choice.get("stop_reason")
        return _Written(text + ending if isinstance(ending, str) else text, finish, tokens)

    def _joined(self, content: str | None, thoughts: str | None) -> str | None:
        if not thoughts or self.config.think_tags is None:
            return content
        opening, closing = self.config.think_tags
        return opening + thoughts + ("" if content is None else closing + content)


def write(config: ChatConfig, problems: Sequence[Problem], *, n: int, sampling: SamplingConfig, seed: int,
          journal: Path | None) -> list[Rollout]:
    """n answers to each problem from a server that is checked first; see `RemoteWriter`."""
    writer = RemoteWriter(config, journal)
    try:
        writer.check()
        return writer.write(problems, n=n, sampling=sampling, seed=seed)
    finally:
        writer.close()


def tokenized(rollouts: Sequence[Rollout], tokenizer: PreTrainedTokenizerBase) -> list[Rollout]:
    """The rollouts with prompt and response ids of `tokenizer`; an answer that was cut has no end token.

    What its chat template cannot write gets an error; those that have one already stay as they are.
    """
    return [r if r.error is not None else _with_ids(r, tokenizer) for r in rollouts]


def _with_ids(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> Rollout:
    turn = (Message("assistant", rollout.text),)
    try:
        prompt_ids, response_ids = render_example(tokenizer, rollout.problem.messages, turn)
    except DataError as error:
        return replace(rollout, error=str(error))
    if rollout.finish == "length":
        response_ids = response_ids[:-1]
    return replace(rollout, prompt_ids=prompt_ids, response_ids=response_ids)


def _rollout(place: tuple[Problem, int, int], answer: _Written | Fault, sampling: SamplingConfig) -> Rollout:
    problem, group, i = place
    common = {"problem": problem, "group": group, "sample": i, "author": "teacher", "prompt_ids": (),
              "response_ids": (), "temperature": sampling.temperature}
    if isinstance(answer, Fault):
        return Rollout(**common, finish="stop", error=answer.text)
    return Rollout(**common, finish=answer.finish, text=answer.text)
