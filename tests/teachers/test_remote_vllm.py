"""A real vLLM on this machine's processor, in the interpreter that VLLM_PYTHON names; skipped where it names none."""

import contextlib
import io
import os
import socket
import subprocess
import time
from pathlib import Path

import httpx2
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tinyr2.core.config import build as configured
from tinyr2.core.errors import ConfigError
from tinyr2.core.types import Message, Problem
from tinyr2.models.head import head_of, logits_of
from tinyr2.models.packed import hidden_states
from tinyr2.recipes.build import BuildConfig, build
from tinyr2.report.console import Console
from tinyr2.rollouts.remote import ChatConfig, tokenized, write
from tinyr2.rollouts.sampling import SamplingConfig
from tinyr2.teachers.remote import RemoteTeacher, ServerConfig
from tinyr2.tokens.build import train_tokenizer

PYTHON = os.environ.get("VLLM_PYTHON", "")
CONTEXT = 256
pytestmark = [pytest.mark.vllm, pytest.mark.skipif(not Path(PYTHON).is_file(), reason="VLLM_PYTHON names no vLLM")]
TEXTS = ["The cat sat on 12 mats.", "def add(a, b):\n    return a + b", "naïve café", "你好世界 🙂", "x" * 90]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose distributions are far from flat."""
    home = tmp_path_factory.mktemp("vllm")
    (home / "texts.txt").write_text("\n".join(TEXTS))
    config = configured(BuildConfig, {
        "output_dir": str(home / "model"), "preset": "qwen3-1m", "tokenizer": {"texts": str(home / "texts.txt"),
                                                                               "vocab_size": 300},
        "model": {"head_dim": 64, "num_hidden_layers": 2, "initializer_range": 0.2}}, "model")
    build(config, Console(plain=True, stream=io.StringIO()))
    return home / "model"


@pytest.fixture(scope="module")
def url(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(PYTHON).parent / "vllm"), "serve", str(folder), "--host", "127.0.0.1", "--port", str(port),
               "--max-model-len", str(CONTEXT), "--dtype", "float32", "--served-model-name", "tiny"]
    env = os.environ | {"VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    with open(folder.parent / "vllm.log", "wb") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        try:
            _wait(process, f"http://127.0.0.1:{port}", folder.parent / "vllm.log")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(60)


def _wait(process, url, log):
    until = time.monotonic() + 300
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(httpx2.TransportError):
            if httpx2.get(f"{url}/health", trust_env=False).status_code == 200:
                return
        time.sleep(0.5)
    pytest.fail(f"vLLM did not start:\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def sequences(tokenizer):
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    return [(tuple(x[:3]), tuple(x[3:])) for x in ids] + [((5,), (tokenizer.eos_token_id, 7, 8))]


def local(folder, prompt, response):
    """(n, V) our own head's log-probs at the response tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([*prompt, *response])
    with torch.no_grad():
        hidden = hidden_states(model, ids, torch.arange(len(ids)), [len(ids)])
        return logits_of(hidden, head_of(model)).log_softmax(-1)[len(prompt) - 1:-1]


def hired(url, tokenizer, journal=None, **more):
    config = {"url": url, "model": "tiny", "tokenizer": "t", "max_retries": 1, "backoff": 0.1}
    teacher = RemoteTeacher(configured(ServerConfig, config | more, "c"), journal)
    teacher.check(tokenizer, 1.0)
    return teacher


@pytest.mark.parametrize("engine", ["vllm", "openai"])
def test_a_real_server_gives_the_log_probs_of_our_own_head(folder, url, tokenizer, engine, tmp_path):
    teacher = hired(url, tokenizer, tmp_path / "j", engine=engine)
    asked = sequences(tokenizer)
    said = teacher.score(asked)
    for (prompt, response), one in zip(asked, said, strict=True):
        exact = local(folder, prompt, response)[torch.arange(len(response)), list(response)]
        assert exact.std() > 0.5  # these are no flat distributions
        assert torch.tensor(one.logp) == pytest.approx(exact, abs=1e-4)
    assert teacher.version is not None or engine == "openai"
    assert teacher.accounting.answered == len(asked) and teacher.accounting.balanced
    teacher.close()
    again = hired(url, tokenizer, tmp_path / "j", engine=engine)
    assert again.score(asked) == said and again.accounting.requests == 0


def test_its_likeliest_tokens_are_our_own_heads(folder, url, tokenizer):
    [(prompt, response), *_] = sequences(tokenizer)
    [said] = hired(url, tokenizer, top_k=5).score([(prompt, response)])
    best = local(folder, prompt, response).topk(5)
    assert [[i for i, _ in row] for row in said.topk] == best.indices.tolist()
    assert torch.tensor([[x for _, x in row] for row in said.topk]) == pytest.approx(best.values, abs=1e-4)


def test_a_sequence_that_is_too_long_is_refused_alone(url, tokenizer):
    short, long = hired(url, tokenizer).score([((5,), (6, 7)), ((5,), (6,) * CONTEXT)])
    assert short.error is None and "400" in long.error and str(CONTEXT) in long.error


def test_what_is_served_otherwise_than_configured_is_found(url, tokenizer):
    with pytest.raises(ConfigError, match="has no model 'huge'; it serves tiny"):
        hired(url, tokenizer, model="huge")
    other = train_tokenizer(["quite another text, and longer than the first: 0123456789"], vocab_size=290)
    for engine in ("vllm", "openai"):
        with pytest.raises(ConfigError, match="the server has another tokenizer than"):
            hired(url, other, engine=engine)
    with pytest.raises(ConfigError, match="400.*top_k|400.*logprobs"):
        hired(url, tokenizer, top_k=50)
    config = configured(ServerConfig, {"url": url, "model": "tiny", "tokenizer": "t", "engine": "openai"}, "c")
    with pytest.raises(ConfigError, match="at temperature 1, whatever it is told"):
        RemoteTeacher(config, None).check(tokenizer, 0.7)


def test_it_writes_answers(url, tokenizer, tmp_path):
    problems = [Problem(id=str(i), task="t", messages=(Message("user", f"say {i}"),)) for i in range(3)]
    config = configured(ChatConfig, {"url": url, "model": "tiny"}, "c")
    sampling = SamplingConfig(max_completion_length=12)
    first = write(config, problems, n=2, sampling=sampling, seed=0, journal=tmp_path / "j")
    assert len(first) == 6 and all(r.error is None for r in first)
    assert write(config, problems, n=2, sampling=sampling, seed=0, journal=tmp_path / "j") == first
    assert all(len(r.response_ids) > 0 for r in tokenized(first, tokenizer))
