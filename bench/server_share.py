"""W9: the share of a scoring phase in which at least one request is running at a vLLM teacher on this machine.

    VLLM_PYTHON=…/bin/python python bench/server_share.py
    python bench/server_share.py --url http://127.0.0.1:8000 --model NAME --tokenizer FOLDER

Each call scores a step's rollouts, new ones each time, with a journal. A request runs from the moment it is sent until
its last byte is here; parsing, the journal and threads are not counted. Without --url a model of 5M parameters is built
and served with `vllm_cpu.sh`. Prints one JSON line; `share` is the median of the calls.
"""

import argparse
import io
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx2
import numpy as np
from sides import peak_mib, peers_folder
from transformers import AutoTokenizer

from tinyr2.core.config import build as configured
from tinyr2.recipes.build import BuildConfig, build
from tinyr2.report.console import Console
from tinyr2.teachers.remote import RemoteTeacher, ServerConfig


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
    parser.add_argument("--url")
    parser.add_argument("--model", help="the name that the server at --url gives it")
    parser.add_argument("--tokenizer", help="its folder or hub id")
    parser.add_argument("--calls", type=int, default=5)
    parser.add_argument("--rollouts", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=32, help="tokens")
    parser.add_argument("--response", type=int, default=256, help="tokens")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        if a.url is None:
            folder = make_model(Path(home))
            with served(folder, Path(home) / "vllm.log") as url:
                result = measure(a, url, str(folder), str(folder), Path(home))
        else:
            result = measure(a, a.url, a.model, a.tokenizer, Path(home))
    print(json.dumps({"side": "tinyr2", "id": "W9", **vars(a), **result, "peak_mib": peak_mib()}))


def measure(a: argparse.Namespace, url: str, model: str, tokenizer: str, home: Path) -> dict:
    """Score `calls` times; medians over the calls."""
    config = configured(ServerConfig, {"url": url, "model": model, "tokenizer": tokenizer}, "server")
    teacher = RemoteTeacher(config, home / "journal.jsonl")
    teacher.check(AutoTokenizer.from_pretrained(tokenizer), 1.0)
    rng = np.random.default_rng(0)
    shares, seconds = [], []
    before = teacher.accounting
    for _ in range(a.calls):
        ids = rng.integers(10, 260, (a.rollouts, a.prompt + a.response)).tolist()
        said = teacher.score([(row[:a.prompt], row[a.prompt:]) for row in ids])
        assert all(s.error is None for s in said)
        now = teacher.accounting
        seconds.append(now.seconds - before.seconds)
        shares.append((now.busy_seconds - before.busy_seconds) / seconds[-1])
        before = now
    assert before.balanced and before.answered == a.calls * a.rollouts
    teacher.close()
    return {"share": round(statistics.median(shares), 4), "shares": [round(x, 4) for x in shares],
            "seconds": round(statistics.median(seconds), 3), "version": teacher.version,
            "tokens_per_s": round(a.rollouts * (a.prompt + a.response) / statistics.median(seconds))}


def make_model(home: Path) -> Path:
    """A random model of 5M parameters whose tokenizer knows every byte."""
    (home / "texts.txt").write_text("a text to learn a tokenizer from")
    config = configured(BuildConfig, {
        "output_dir": str(home / "model"), "preset": "qwen3-5m", "model": {"max_position_embeddings": 2048},
        "tokenizer": {"texts": str(home / "texts.txt"), "vocab_size": 300}}, "model")
    build(config, Console(plain=True, stream=io.StringIO()))
    return home / "model"


@contextmanager
def served(folder: Path, log: Path) -> Iterator[str]:
    """The address of a vLLM that serves `folder` while the block lasts."""
    python = Path(os.environ.get("VLLM_PYTHON", ""))
    if not python.is_file():
        sys.exit(f"VLLM_PYTHON is {str(python)!r}: name the interpreter that has vLLM, or give --url")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(peers_folder() / "vllm_cpu.sh"), "serve", str(python.parent.parent), str(folder), str(port)]
    with log.open("wb") as out:
        process = subprocess.Popen(["bash", *command], stdout=out, stderr=out)
        try:
            wait_for(process, f"http://127.0.0.1:{port}", log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(60)


def wait_for(process: subprocess.Popen, url: str, log: Path) -> None:
    """Return when the server is healthy; the program ends where it does not become so in 5 minutes."""
    until = time.monotonic() + 300
    while time.monotonic() < until and process.poll() is None:
        with suppress(httpx2.TransportError):
            if httpx2.get(f"{url}/health", trust_env=False).status_code == 200:
                return
        time.sleep(0.5)
    sys.exit(f"vLLM did not start:\n{log.read_text()[-3000:]}")


if __name__ == "__main__":
    main()
