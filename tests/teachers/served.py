"""What the tests of served teachers share: one that is hired from a fake server, and what it should say."""

import json

import pytest

from tests.fake_server import Chaos, truth
from tinyr2.core.config import build
from tinyr2.teachers.remote import RemoteTeacher, ServerConfig

FAST = {"connect_timeout": 0.5, "read_timeout": 5.0, "backoff": 0.002, "max_backoff": 0.05, "max_in_flight": 8}
SEQUENCES = [(tuple(i % 7 + j for j in range(1 + i % 3)), tuple((5 * i + 3 * j) % 40 for j in range(2 + i % 9)))
             for i in range(40)]
ENGINES = ["vllm", "sglang", "openai"]


def config(server, engine="vllm", **more):
    return build(ServerConfig, FAST | {"url": server.url, "engine": engine, "model": "m", "tokenizer": "t"} | more, "c")


def hired(server, tokenizer, engine="vllm", journal=None, **more):
    teacher = RemoteTeacher(config(server, engine, **more), journal)
    teacher.check(tokenizer, 1.0)
    return teacher


def right(sequences=SEQUENCES, weights=0, temperature=1.0):
    return [pytest.approx(tuple(truth(p, r, weights, temperature))) for p, r in sequences]


def logps(said):
    return [s.logp for s in said]


class Always(Chaos):
    """Every request for log-probs meets the same fate, but the probes."""

    def __init__(self, fate):
        super().__init__()
        self.one = fate

    def fate(self, path, body, before):
        ids = json.loads(body or b"{}")
        return "fine" if len(ids.get("prompt") or ids.get("input_ids") or range(25)) == 25 else self.one
