"""A server that speaks the protocols of vLLM, SGLang and OpenAI, in this process, with log-probs anybody can compute.

With `Chaos` it misbehaves: each request's fate is a function of (seed, its bytes, how often they came before), so a run
meets the same faults whatever its threads do.
"""

import contextlib
import json
import math
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

from tinyr2.core.rng import generator

VOCAB = 40


def distribution(before: tuple[int, ...], weights: int = 0, temperature: float = 1.0) -> np.ndarray:
    """(VOCAB,) log-probs of the token after `before`."""
    at = len(before) + 3.0 * before[-1] + 7.0 * weights
    logits = 3.0 * np.sin((1.0 + np.arange(VOCAB)) * (0.37 + 0.11 * at)) / temperature
    return logits - math.log(np.exp(logits).sum())


def truth(prompt: tuple[int, ...], response: tuple[int, ...], weights: int = 0, temperature: float = 1.0) -> list:
    """The log-prob of each response token; None for a sequence's first."""
    ids = tuple(prompt) + tuple(response)
    return [None if i == 0 else float(distribution(ids[:i], weights, temperature)[ids[i] % VOCAB])
            for i in range(len(prompt), len(ids))]


@dataclass
class Chaos:
    """Shares of the requests that meet each fault; the rest are answered."""

    seed: int = 0
    shares: dict[str, float] = field(default_factory=dict)
    only: str = ""  # the path that is struck; empty: each

    def fate(self, path: str, body: bytes, before: int) -> str:
        """Which fault strikes this request, or "fine"."""
        if self.only not in path:
            return "fine"
        digest = blake2b(path.encode() + body, digest_size=8).hexdigest()
        point = float(generator(self.seed, "fate", digest, before).random())
        for name, share in self.shares.items():
            if point < share:
                return name
            point -= share
        return "fine"


class FakeServer:
    """Serves on 127.0.0.1 while the block lasts; `seen` has every request's path and body."""

    def __init__(self, tokenizer=None, *, model: str = "m", weights: int = 0, chaos: Chaos | None = None,
                 key: str | None = None, tempers: bool = False, tokenizes: bool = True, context: int = 4096) -> None:
        self.tokenizer, self.model, self.weights, self.key = tokenizer, model, weights, key
        self.chaos, self.tempers, self.tokenizes, self.context = chaos or Chaos(), tempers, tokenizes, context
        self.swap_after: int | None = None  # after so many scored requests the weights change, over a restart
        self.hang = 1.0  # seconds
        self.seen: list[tuple[str, dict]] = []
        self.struck: Counter[str] = Counter()
        self.most_at_once = 0
        self._at_once = 0
        self.connections: set[socket.socket] = set()
        self._before: Counter[tuple[str, bytes]] = Counter()
        self.lock = threading.Lock()
        self._start(0)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def scored(self) -> list[dict]:
        """The bodies of all requests for log-probs that a score needs: neither a probe (25 ids) nor a text of ids."""
        return [body for path, body in self.seen if path in ("/v1/completions", "/generate")
                and len(ids_of(body)) != 25 and "return_text_in_logprobs" not in body
                and ("temperature" in body or "input_ids" in body)]

    def restart(self, weights: int) -> None:
        """Another process on the same port."""
        self.stop()
        self.weights = weights
        self._start(self.port)

    def stop(self) -> None:
        """As a process that is killed: its connections break."""
        self._http.shutdown()
        self._http.server_close()
        with self.lock:
            for connection in self.connections:
                with contextlib.suppress(OSError):  # closed already
                    connection.shutdown(socket.SHUT_RDWR)
            self.connections.clear()

    def __enter__(self) -> "FakeServer":
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def _start(self, port: int) -> None:
        handler = type("Handler", (_Handler,), {"fake": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self._http.daemon_threads = True
        self.port = self._http.server_port
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def fate(self, path: str, body: bytes) -> str:
        with self.lock:
            fate = self.chaos.fate(path, body, self._before[path, body])
            self._before[path, body] += 1
            if self.swap_after is not None and self.weights == 0 and len(self.scored()) > self.swap_after:
                self.weights, fate = 1, "reset"
            self.struck[fate] += 1
            return fate

    def enter(self, step: int) -> None:
        with self.lock:
            self._at_once += step
            self.most_at_once = max(self.most_at_once, self._at_once)

    def answer(self, path: str, body: dict, fate: str) -> tuple[int, dict]:
        """Status and JSON."""
        if path == "/version":
            return 200, {"version": "0.0.fake"}
        if path == "/v1/models":
            return 200, {"data": [{"id": self.model}]}
        if path == "/tokenize" and self.tokenizes and self.tokenizer is not None:
            return 200, {"tokens": self.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]}
        if path == "/v1/chat/completions":
            return 200, self._chat(body)
        if path not in ("/v1/completions", "/generate"):
            return 404, {"detail": "Not Found"}
        if body.get("model", self.model) != self.model:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        if len(ids_of(body)) >= self.context:
            return 400, {"error": {"message": f"the context is {self.context} tokens"}}
        return 200, self._generate(body, fate) if path == "/generate" else self._complete(body, fate)

    def _logp(self, ids: tuple[int, ...], fate: str, temperature: float = 1.0) -> list:
        values = truth((), ids, self.weights, temperature if self.tempers else 1.0)
        if fate in ("nan", "inf"):
            values[-1] = math.nan if fate == "nan" else -math.inf
        return values

    def _tops(self, ids: tuple[int, ...], k: int) -> list:
        rows = []
        for i in range(1, len(ids)):
            logp = distribution(ids[:i], self.weights)
            best = np.argsort(-logp, kind="stable")[:k]
            rows.append([(float(logp[j]), int(j), None) for j in best])
        return [None, *rows]

    def _complete(self, body: dict, fate: str) -> dict:
        ids = ids_of(body)
        said = ids if fate != "ids" else (*ids[:-1], (ids[-1] + 1) % VOCAB)
        logp = self._logp(ids, fate, body.get("temperature", 1.0))
        cut = slice(None, -1 if fate == "count" else None)
        choice = {"text": "", "finish_reason": "length"}
        if body.get("echo"):
            text = self.tokenizer.decode(list(said)) if self.tokenizer is not None else ""
            choice |= {"text": text + "!", "logprobs": {"token_logprobs": [*logp, -0.5][cut][cut]}}
        elif "prompt_logprobs" in body:
            tops = self._tops(ids, body["prompt_logprobs"])
            pairs = [None if row is None else {said[at]: logp[at]} | {j: x for x, j, _ in row if j != said[at]}
                     for at, row in enumerate(tops)]
            rows = [None if row is None else {str(j): {"logprob": _clamped(x)} for j, x in row.items()}
                    for row in pairs]
            choice["prompt_logprobs"] = rows[cut]
        return {"choices": [choice], "usage": {"prompt_tokens": len(ids) - (fate == "ids" and bool(body.get("echo")))}}

    def _generate(self, body: dict, fate: str) -> dict:
        ids, start = ids_of(body), body["logprob_start_len"]
        said = ids if fate != "ids" else (*ids[:-1], (ids[-1] + 1) % VOCAB)
        texts = [self.tokenizer.decode([i]) if body.get("return_text_in_logprobs") else None for i in said]
        cut = slice(start, -1 if fate == "count" else None)
        rows = [[x, i, t] for x, i, t in zip(self._logp(ids, fate), said, texts, strict=True)][cut]
        rows[0][0] = None  # as SGLang leaves it
        meta = {"input_token_logprobs": rows}
        if body.get("top_logprobs_num"):
            meta["input_top_logprobs"] = [None, *self._tops(ids, body["top_logprobs_num"])[cut][1:]]
        return {"text": "", "meta_info": meta}

    def _chat(self, body: dict) -> dict:
        words = f"{body['messages'][-1]['content']} seed {body['seed'] % 1000}"
        cut = len(words) > body["max_tokens"]
        message = {"role": "assistant", "content": words[:body["max_tokens"]]}
        if self.model == "thinker":
            message["reasoning_content"] = "hm"
        return {"choices": [{"message": message, "finish_reason": "length" if cut else "stop"}],
                "usage": {"completion_tokens": 7}}


def ids_of(body: dict) -> tuple[int, ...]:
    return tuple(body.get("prompt") or body.get("input_ids") or ())


def _clamped(x: float) -> float:
    return -9999.0 if x == -math.inf else x


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    fake: FakeServer

    def setup(self) -> None:
        super().setup()
        with self.fake.lock:
            self.fake.connections.add(self.connection)

    def finish(self) -> None:
        with self.fake.lock:
            self.fake.connections.discard(self.connection)
        with contextlib.suppress(OSError):
            super().finish()

    def do_GET(self) -> None:
        self._serve(b"")

    def do_POST(self) -> None:
        self._serve(self.rfile.read(int(self.headers["content-length"])))

    def log_message(self, *_) -> None:
        """Says nothing."""

    def _serve(self, raw: bytes) -> None:
        self.fake.enter(1)
        try:
            end = self._judge(raw)
        finally:
            self.fake.enter(-1)
        try:
            end()
        except OSError:  # the client has given up
            self.close_connection = True

    def _judge(self, raw: bytes) -> Callable[[], None]:
        """What to send."""
        fake = self.fake
        body = json.loads(raw) if raw else {}
        with fake.lock:
            fake.seen.append((self.path, body))
        if fake.key is not None and self.headers.get("authorization") != f"Bearer {fake.key}":
            return partial(self._reply, 401, {"error": {"message": "no such key"}})
        fate = fake.fate(self.path, raw)
        if fate == "reset":
            return self._reset
        if fate.isdigit():
            wait = {"retry-after": "0.01"} if fate == "429" else {}
            return partial(self._reply, int(fate), {"error": {"message": f"chaos {fate}"}}, **wait)
        if fate in ("hang", "delay"):
            time.sleep(fake.hang if fate == "hang" else 0.02)
        status, answer = fake.answer(self.path, body, fate)
        return partial(self._reply, status, answer, cut=fate if fate in ("truncated", "torn") else "")

    def _reply(self, status: int, answer: dict, *, cut: str = "", **headers: str) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        # torn: less comes than was announced; truncated: less is announced
        half = data[:len(data) // 2]
        self.send_header("content-length", str(len(half if cut == "truncated" else data)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(half if cut else data)
        if cut == "torn":
            self._reset()

    def _reset(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
