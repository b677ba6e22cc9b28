"""Our side of W6: decode steps of the peer's MLA model, batch 8 after 2,000 tokens, and what they say beside the stock
forward with its cache.

    python bench/mla_step.py

Prints one JSON line; logits_gap is the largest absolute difference of a logit, over all steps and rows.
"""

import argparse
import json
import statistics
import time

import torch
from sides import load_peer, peak_mib
from torch import Tensor, nn

from tinyr2.models.decode import Decoder


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--context", type=int, default=2000)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    model = stock_model()
    prompts = torch.randint(5, 16000, (8, a.context))
    tokens = torch.randint(5, 16000, (a.steps, 8))
    with torch.inference_mode():
        seconds, ours = decode(model, prompts, tokens)
        peak = peak_mib()
        gap = max(float((x - y).abs().max()) for x, y in zip(ours, stock(model, prompts, tokens), strict=True))
    print(json.dumps({"side": "tinyr2", **vars(a), "step_s": round(statistics.median(seconds[2:]), 5),
                      "steps_s": [round(s, 5) for s in seconds], "logits_gap": gap, "peak_mib": peak}))


def stock_model() -> nn.Module:
    """The peer's model, with the peer's seed."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    return DeepseekV3ForCausalLM(DeepseekV3Config(**load_peer("peer_rollouts").MLA)).eval()


def decode(model: nn.Module, prompts: Tensor, tokens: Tensor) -> tuple[list[float], list[Tensor]]:
    """Seconds and logits (8, V) of each step; a step is the model and its head, as in the peer's forward."""
    decoder = Decoder(model)
    cache = decoder.new_cache()
    decoder.prefill(cache, prompts.tolist(), [1] * len(prompts))
    seconds, logits = [], []
    for row in tokens:
        start = time.perf_counter()
        found = decoder.logits(decoder.step(cache, row))
        seconds.append(time.perf_counter() - start)
        logits.append(found.clone())  # a decoder may write the next step's into the same memory
    return seconds, logits


def stock(model: nn.Module, prompts: Tensor, tokens: Tensor) -> list[Tensor]:
    """The same steps through transformers' forward with its cache."""
    past = model(prompts, use_cache=True, logits_to_keep=1).past_key_values
    return [model(row[:, None], past_key_values=past, use_cache=True).logits[:, -1] for row in tokens]


if __name__ == "__main__":
    main()
