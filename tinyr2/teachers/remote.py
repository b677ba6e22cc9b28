"""A teacher behind a server: vLLM, SGLang, or any endpoint that echoes a prompt with its log-probs.

In: prompt and response ids of the server's tokenizer. Out: what the server says of each response token, in order. An
answer is returned and written down only after a probe, asked later than the answer came, has shown the same weights.
"""

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tinyr2.core.answers import key_of
from tinyr2.core.correspondent import Correspondent
from tinyr2.core.errors import ConfigError, RunError, UserError
from tinyr2.core.net import TRANSIENT, Fault, Request
from tinyr2.core.net_check import check_model, find_version
from tinyr2.teachers.remote_check import (
    Probe,
    ask_probe,
    check_tokenizer,
    distance,
    probe_question,
)
from tinyr2.teachers.remote_protocol import Question, Said, ServerConfig, body_of, read

__all__ = ["RemoteTeacher", "Said", "ServerConfig"]

_BATCH = 64  # answers that are confirmed by one probe and written with one fsync


class RemoteTeacher(Correspondent):
    """A served model that scores; `check` comes before the first `score`."""

    def __init__(self, config: ServerConfig, journal: Path | None) -> None:
        super().__init__(config, journal)
        self.config = config
        self._client.reconnecting = self._reconnecting
        self._probing = threading.Lock()
        self._question: Question | None = None
        self._temperature = 1.0
        self._weights: Probe | None = None  # the probe's log-probs under the weights that this journal is about
        self._confirmed = float("-inf")  # the clock at which a probe last showed them

    def check(self, tokenizer: PreTrainedTokenizerBase, temperature: float) -> None:
        """Make sure of the server: it answers, has the model and the tokenizer, and gives log-probs at `temperature`.

        ConfigError: it is another server than configured, or cannot temper the log-probs of a prompt; vLLM and SGLang
        never do. RunError: the journal is about other weights than those served now.
        """
        engine = self.config.engine
        if temperature != 1.0 and engine != "openai":
            raise ConfigError(f"temperature {temperature}: {engine} gives the log-probs of a prompt at temperature 1 "
                              "only, so student and teacher would be compared at two temperatures; set temperature to "
                              "1, or take a local teacher")
        self.version = find_version(self._client)
        check_model(self._client)
        check_tokenizer(self._client, self.config, tokenizer)
        self._question, self._temperature = probe_question(tokenizer), temperature
        try:
            found = ask_probe(self._client, self.config, self._question, temperature)
            plain = found if temperature == 1.0 else ask_probe(self._client, self.config, self._question, 1.0)
        except Fault as fault:
            raise ConfigError(f"{fault.text}; the server has to give the log-probs of a prompt's tokens: mend engine, "
                              "model or the server") from fault
        if temperature != 1.0 and distance(found, plain) <= self.config.weights_tolerance:
            raise ConfigError(f"temperature {temperature}: {self.config.url} gives the log-probs of a prompt at "
                              "temperature 1, whatever it is told; set temperature to 1")
        self._recognize(found)

    def score(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Said]:
        """What the server says of each response, given its prompt; (prompt_ids, response_ids) of its tokenizer.

        Concurrent, in order. A response of no tokens is not asked about, and one that was asked about before is not
        asked again. One that could not be scored has `error`. RunError: a cap is reached, the weights are others
        than at `check`, or the server answers nothing at all; answers that came before are in the journal.
        """
        assert self._weights is not None, "check() comes before score()"
        questions = [Question(prompt=tuple(p), response=tuple(r)) for p, r in sequences]
        keys = [self._key(q) if q.response else None for q in questions]
        asked = {k: q for k, q in zip(keys, questions, strict=True) if k is not None and k not in self._answers}
        found: dict[str, Said] = {}
        try:
            if asked:
                with self._client.clocked():
                    self._ask_all(asked, found)
        finally:
            new = sum(said.error is None for said in found.values())
            total = sum(k is not None for k in keys)
            # a failed question that stood twice has failed twice
            failed = sum(k in asked and (k not in found or found[k].error is not None) for k in keys)
            self._client.ledger.add(asked=total, answered=new, failed=failed, from_journal=total - new - failed)
        return [Said(()) if k is None else found[k] if k in found else _unpacked(self._answers[k]) for k in keys]

    def _ask_all(self, asked: dict[str, Question], found: dict[str, Said]) -> None:
        self._confirm()
        held: dict[str, Said] = {}
        faults = []

        def ask(key: str) -> Said | Fault:
            try:
                return self._ask(key, asked[key])
            except Fault as fault:
                return fault

        try:
            for key, said in self._client.each(list(asked), ask):
                if isinstance(said, Fault):
                    faults.append(said)
                    found[key] = Said((None,) * len(asked[key].response), error=said.text)
                    continue
                held[key] = said
                if len(held) == _BATCH:
                    self._keep(held, asked, found)
        except UserError:
            self._keep(held, asked, found)
            raise
        self._keep(held, asked, found)
        if len(faults) == len(asked) and all(f.kind in TRANSIENT for f in faults):
            raise RunError(f"{faults[-1].text}; the server answered none of {len(asked)} requests: mend it and resume")

    def _ask(self, key: str, question: Question) -> Said:
        config = self.config
        path, body = body_of(config, question, self._temperature)
        request = Request(path=path, body=body, key=key, tokens=len(question.ids))
        return self._client.ask(request, lambda answer: read(config, answer, question))

    def _keep(self, held: dict[str, Said], asked: dict[str, Question], found: dict[str, Said]) -> None:
        """Move answers into the journal and to `found`, once the weights they came from are confirmed."""
        if not held:
            return
        self._confirm()
        self._answers.add({k: {"logp": s.logp, "topk": s.topk} for k, s in held.items()},
                          {k: len(asked[k].ids) for k in held})
        ledger = self._client.ledger
        ledger.add(unsaid=sum(s.logp.count(None) - s.not_finite for s in held.values()),
                   not_finite=sum(s.not_finite for s in held.values()))
        found.update(held)
        held.clear()

    def _confirm(self) -> None:
        """Probe; RunError where the weights are others, or nobody can tell."""
        began = time.monotonic()
        try:
            now = ask_probe(self._client, self.config, self._question, self._temperature)
        except Fault as fault:
            raise RunError(f"{fault.text}; so nobody can tell whether its weights are still the same; mend the server "
                           "and resume") from fault
        moved = distance(now, self._weights)
        if moved > self.config.weights_tolerance:
            raise RunError(self._other_weights("no longer those it began with", moved))
        self._confirmed = began

    def _reconnecting(self, since: float) -> None:
        """After a reset the server may be another: one thread asks, those that lost their connection too wait."""
        with self._probing:
            if self._confirmed < since:
                self._confirm()

    def _recognize(self, found: Probe) -> None:
        """Take the probe's log-probs as those of the journal's weights, if it has none; else they have to match."""
        about = {"engine": self.config.engine, "model": self.config.model, "temperature": self._temperature,
                 "question": list(self._question.ids), "weights": list(found)}
        if self._answers.about is None:
            self._answers.describe(about)
        kept = self._answers.about
        if any(kept.get(name) != about[name] for name in about if name != "weights"):
            raise RunError(f"{self._answers.path}: the journal is about {kept.get('model')!r} ({kept.get('engine')}, "
                           f"temperature {kept.get('temperature')}), the config is not; remove the journal, or mend "
                           "the config")
        self._weights = tuple(kept["weights"])
        moved = distance(found, self._weights)
        if moved > self.config.weights_tolerance:
            raise RunError(self._other_weights(f"not those of the journal {self._answers.path}", moved))
        self._confirmed = time.monotonic()

    def _other_weights(self, what: str, moved: float) -> str:
        return (f"{self.config.url}: the server's weights are {what}: the log-probs of a fixed probe moved by "
                f"{moved:.3f} nats on average (weights_tolerance {self.config.weights_tolerance:g}); serve the same "
                "weights again and resume, or start a new run")

    def _key(self, question: Question) -> str:
        return key_of(self.config.engine, self.config.model, self._weights, self._temperature, self.config.top_k,
                      question.prompt, question.response)


def _unpacked(answer: Any) -> Said:
    topk = answer["topk"]
    shown = None if topk is None else tuple(
        None if row is None else tuple((i, x) for i, x in row) for row in topk)
    return Said(tuple(answer["logp"]), shown)
