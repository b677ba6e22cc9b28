"""Our side of W1, W2 and W4: `tinyr2 distill` on random weights, timed from step end to step end.

    python bench/distill_step.py --new-tokens 64

Lengths are geometric (the end token has probability 1/vocab) cut at --new-tokens. Prints one JSON line.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from sides import peak_mib
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from tinyr2.core.config import build
from tinyr2.models.load import save_model
from tinyr2.recipes.distill import distill
from tinyr2.recipes.distill_config import DistillConfig
from tinyr2.report.console import Console

CHARS = [chr(c) for c in range(32, 127)] + ["\n"]
SHAPE = {"hidden": 128, "layers": 4, "teacher_hidden": 256, "teacher_layers": 4, "vocab": 0, "batch": 64,
         "prompt_tokens": 16, "new_tokens": 64, "steps": 10, "threads": 2, "seed": 0}


class Clock(Console):
    """Notes when each step has been recorded, and the memory until then: the peers write no checkpoint at the end."""

    def __init__(self) -> None:
        super().__init__(plain=True, stream=open("/dev/null", "w"))  # noqa: SIM115 (open as long as the process)
        self.ends: list[float] = []
        self.peak_mib = 0

    def progress(self, step, total, metrics, name="step") -> None:
        self.ends.append(time.perf_counter())
        self.peak_mib = peak_mib()


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in SHAPE.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=default)
    shape = vars(parser.parse_args())
    clock = Clock()
    metrics = steps(shape, clock)
    seconds = [b - a for a, b in zip(clock.ends, clock.ends[1:], strict=False)]  # the first step has no start
    length = statistics.mean(row["completions/mean_length"] for row in metrics)
    step = statistics.median(seconds[1:])
    print(json.dumps({"side": "tinyr2", **shape, "step_s": round(step, 4), "steps_s": [round(s, 4) for s in seconds],
                      "mean_length": length, "tokens_per_s": round(shape["batch"] * length / step),
                      "peak_mib": clock.peak_mib}))


def steps(shape: dict[str, int], console: Console) -> list[dict]:
    """Distill with random models of that shape; the rows of metrics.jsonl."""
    torch.manual_seed(shape["seed"])
    tokenizer = character_tokenizer()
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        for side, prefix in (("student", ""), ("teacher", "teacher_")):
            net = model(shape[prefix + "hidden"], shape[prefix + "layers"], shape["vocab"] or len(tokenizer))
            save_model(net, tokenizer, folder / side)
        rows = [{"prompt": prompt} for prompt in prompts(4096, shape["prompt_tokens"], shape["seed"])]
        (folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        config = build(DistillConfig, {
            "student": {"path": str(folder / "student")}, "teacher": {"path": str(folder / "teacher")},
            "data": {"path": str(folder / "data.jsonl")}, "output_dir": str(folder / "run"), "device": "cpu",
            "rollout": {"prompts_per_step": shape["batch"], "max_completion_length": shape["new_tokens"]},
            "train": {"learning_rate": 1e-4, "max_steps": shape["steps"], "num_threads": shape["threads"],
                      "seed": shape["seed"], "save_steps": 10_000, "log_completions_steps": 0}}, "benchmark")
        distill(config, console)
        return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


def prompts(count: int, tokens: int, seed: int) -> list[str]:
    """Random sums without a meaning, `tokens` characters each."""
    rng = random.Random(seed)
    return ["".join(rng.choice("0123456789+-") for _ in range(tokens)) for _ in range(count)]


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable character; the template adds nothing, so a prompt has as many tokens as characters."""
    vocab = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {c: i + 3 for i, c in enumerate(CHARS)}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    tokenizer.chat_template = ("{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}<eos>"
                               "{% endif %}{% endfor %}")
    return tokenizer


def model(hidden: int, layers: int, vocab: int, context: int = 4096) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(Qwen3Config(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=4,
        head_dim=hidden // 4, intermediate_size=3 * hidden, vocab_size=vocab, max_position_embeddings=context,
        tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2))


if __name__ == "__main__":
    main()
