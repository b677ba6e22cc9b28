"""What three kinds of servers are asked for the log-probs of given tokens, and how their answers are read.

In: prompt and response ids. Out: path and body of a request; from its answer's JSON the log-prob of each response
token. An answer that is not about exactly these tokens is a Fault of kind "wrong": nothing is shifted or padded.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, model_validator

from tinyr2.core.net import Fault
from tinyr2.core.net_config import NetConfig

Engine = Literal["vllm", "sglang", "openai"]
TopK = tuple[tuple[tuple[int, float], ...] | None, ...]
# vLLM spells -inf as -9999 (clamp_prompt_logprobs): JSON has no infinity
_VLLM_MINUS_INF = -9999.0


class ServerConfig(NetConfig):
    """A server that gives the log-probs of tokens that it did not write."""

    engine: Engine = "vllm"  # openai: any endpoint with echo and logprobs
    tokenizer: str  # the folder or hub id of the served model's tokenizer
    top_k: int = Field(0, ge=0)  # its likeliest tokens, per response token
    weights_tolerance: float = Field(0.05, ge=0.0)  # nats that the probe may move by on average; batching moves it

    @model_validator(mode="after")
    def _ids_are_known(self) -> "ServerConfig":
        if self.top_k and self.engine == "openai":
            raise ValueError("an openai endpoint names its likeliest tokens by their text, which is no id; set top_k "
                             "to 0, or engine to vllm or sglang")
        return self


@dataclass(frozen=True)
class Said:
    """What a server says of one response of n tokens."""

    logp: tuple[float | None, ...]  # (n,) nats; None where it did not say
    topk: TopK | None = None  # (n,) its likeliest tokens and their log-probs, best first; None: not asked for
    error: str | None = None  # why nothing is known
    not_finite: int = 0  # of the missing ones, those it gave as NaN or -inf


@dataclass(frozen=True, kw_only=True)
class Question:
    """Token ids of the server's own tokenizer."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        """Prompt and response."""
        return self.prompt + self.response


def body_of(config: ServerConfig, question: Question, temperature: float) -> tuple[str, Any]:
    """Path and JSON body of the request.

    vLLM and SGLang give the log-probs of a prompt at temperature 1, whatever they are told.
    """
    ids = list(question.ids)
    if config.engine == "vllm":
        return "/v1/completions", {"model": config.model, "prompt": ids, "max_tokens": 1, "temperature": 1.0,
                                   "prompt_logprobs": config.top_k}
    if config.engine == "sglang":
        return "/generate", {"input_ids": ids, "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
                             "return_logprob": True, "logprob_start_len": _start(question),
                             "top_logprobs_num": config.top_k}
    return "/v1/completions", {"model": config.model, "prompt": ids, "max_tokens": 1, "temperature": temperature,
                               "echo": True, "logprobs": 1}


def read(config: ServerConfig, answer: Any, question: Question) -> Said:
    """What the answer says of the response. Fault "wrong" where it has another form, other tokens, or not all."""
    reader = {"vllm": _vllm, "sglang": _sglang, "openai": _openai}[config.engine]
    try:
        logp, topk = reader(answer, question, config.top_k)
        values = [_number(x) for x in logp]
        shown = None if config.top_k == 0 else tuple(None if row is None else _best(row, config.top_k) for row in topk)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise Fault("wrong", f"the answer is not in the form that {config.engine} gives: {type(error).__name__}: "
                             f"{error}; is engine right?") from error
    return Said(tuple(x if x is not None and math.isfinite(x) else None for x in values), shown,
                not_finite=sum(x is not None and not math.isfinite(x) for x in values))


def _start(question: Question) -> int:
    """SGLang says nothing of the first token it reports, so the prompt's last one is reported too."""
    return max(len(question.prompt) - 1, 0)


def _vllm(answer: Any, question: Question, top_k: int) -> tuple[list, list]:
    rows = answer["choices"][0]["prompt_logprobs"]
    if rows is None:
        raise Fault("wrong", "the answer has no prompt_logprobs")
    _same_count(len(rows), len(question.ids))
    logp, topk = [], []
    for at, token in list(enumerate(question.ids))[len(question.prompt):]:
        row = rows[at]
        if row is None:
            logp.append(None)
            topk.append(None)
            continue
        if str(token) not in row:
            raise Fault("wrong", f"token {at} is {token}, the answer speaks of {', '.join(list(row)[:5])}")
        logp.append(_unclamped(row[str(token)]["logprob"]))
        topk.append([(int(i), _unclamped(entry["logprob"])) for i, entry in row.items()])
    return logp, topk


def _unclamped(logp: Any) -> Any:
    return -math.inf if logp == _VLLM_MINUS_INF else logp


def _sglang(answer: Any, question: Question, top_k: int) -> tuple[list, list]:
    meta = answer["meta_info"]
    start, skip = _start(question), len(question.prompt) - _start(question)
    rows = meta["input_token_logprobs"]
    _same_count(len(rows), len(question.ids) - start)
    _same_ids([row[1] for row in rows], question.ids[start:])
    if top_k == 0:
        return [row[0] for row in rows[skip:]], []
    tops = meta["input_top_logprobs"]
    _same_count(len(tops), len(rows))
    topk = [None if row is None else [(entry[1], entry[0]) for entry in row] for row in tops[skip:]]
    return [row[0] for row in rows[skip:]], topk


def _openai(answer: Any, question: Question, top_k: int) -> tuple[list, list]:
    logp = answer["choices"][0]["logprobs"]["token_logprobs"]
    n = len(question.ids)
    said = (answer.get("usage") or {}).get("prompt_tokens", n)
    if said != n:
        raise Fault("wrong", f"{n} tokens were sent, the server counts {said}")
    _same_count(len(logp), n, n + 1)  # and the one that it wrote itself, if it wrote one
    return logp[len(question.prompt):n], []


def _number(logp: Any) -> float | None:
    """A log-prob as it came; None where there is none. Above 0 by more than rounding it is none: NaN."""
    if logp is None:
        return None
    if isinstance(logp, bool) or not isinstance(logp, (int, float)):
        raise ValueError(f"{logp!r} is no log-prob")
    return min(float(logp), 0.0) if logp < 1e-3 else math.nan


def _best(row: list[tuple[int, Any]], top_k: int) -> tuple[tuple[int, float], ...]:
    """The k likeliest with a finite log-prob, best first; ties by id."""
    known = [(int(i), x) for i, logp in row if (x := _number(logp)) is not None and math.isfinite(x)]
    return tuple(sorted(known, key=lambda entry: (-entry[1], entry[0]))[:top_k])


def _same_count(found: int, *wanted: int) -> None:
    if found not in wanted:
        raise Fault("wrong", f"the answer speaks of {found} tokens, {wanted[0]} were asked about")


def _same_ids(found: Sequence[int], wanted: Sequence[int]) -> None:
    for at, (a, b) in enumerate(zip(found, wanted, strict=True)):
        if a != b:
            raise Fault("wrong", f"token {at} of those asked about is {b}, the answer speaks of {a}")
