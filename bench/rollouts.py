"""Our side of W5 and W5r: the engine answers the peer's requests with the peer's model, each to exactly its length.

    python bench/rollouts.py --lengths equal     64 requests of 32 + 128 tokens
    python bench/rollouts.py --lengths ragged    256 requests of 32 + geometric lengths

Prints one JSON line.
"""

import argparse
import json
import time

import torch
from sides import load_peer, peak_mib

from tinyr2.rollouts.engine import decode_all
from tinyr2.rollouts.request import Request
from tinyr2.rollouts.sampling import SamplingConfig


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lengths", choices=["equal", "ragged"], default="equal")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--max-rows", type=int, default=256)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    peer = load_peer("peer_rollouts")
    model = peer.stock_model().to(getattr(torch, a.dtype))
    work = list(zip(peer.prompts(a.lengths), peer.lengths(a.lengths), strict=True))
    requests = [Request(prompt_ids=tuple(p), seed=i, max_new=n) for i, (p, n) in enumerate(work)]
    sampling = SamplingConfig(temperature=1.0, max_completion_length=max(n for _, n in work))
    decode_all(model, requests[:4], sampling, stop=(), max_rows=a.max_rows)
    start = time.perf_counter()
    answers = decode_all(model, requests, sampling, stop=(), max_rows=a.max_rows)
    seconds = time.perf_counter() - start
    tokens = sum(len(answer.response_ids) for answer in answers)
    assert tokens == sum(n for _, n in work), f"{tokens} tokens written"
    print(json.dumps({"side": "tinyr2", **vars(a), "seconds": round(seconds, 3), "tokens": tokens,
                      "tokens_per_s": round(tokens / seconds), "peak_mib": peak_mib()}))


if __name__ == "__main__":
    main()
