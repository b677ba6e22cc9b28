"""Our side of the distillation benchmark: `tinyr2 distill` on random weights, timed from step end to step end.

    python bench/distill_step.py --new-tokens 64

Lengths are geometric (the end token has probability 1/vocab) cut at --new-tokens. Prints one JSON line.
"""

import argparse
import json
import random
import resource
import statistics
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from tinyr2.core.config import build
from tinyr2.models.load import save_model
from tinyr2.recipes.distill import DistillConfig, distill
from tinyr2.report.console import Console

CHARS = [chr(c) for c in range(32, 127)] + ["\n"]


class Clock(Console):
    """Notes when each step has been recorded."""

    def __init__(self) -> None:
        super().__init__(plain=True, stream=open("/dev/null", "w"))  # noqa: SIM115 (open as long as the process)
        self.ends: list[float] = []

    def progress(self, step, total, metrics, name="step") -> None:
        self.ends.append(time.perf_counter())


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in {"hidden": 128, "layers": 4, "teacher_hidden": 256, "teacher_layers": 4, "vocab": 0,
                          "batch": 64, "prompt_tokens": 16, "new_tokens": 64, "steps": 10, "threads": 2,
                          "seed": 0}.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=default)
    a = parser.parse_args()
    torch.manual_seed(a.seed)
    rng = random.Random(a.seed)
    tokenizer = character_tokenizer()
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        for side, hidden, layers in (("student", a.hidden, a.layers), ("teacher", a.teacher_hidden, a.teacher_layers)):
            save_model(model(hidden, layers, a.vocab or len(tokenizer)), tokenizer, folder / side)
        rows = [{"prompt": "".join(rng.choice("0123456789+-") for _ in range(a.prompt_tokens))} for _ in range(4096)]
        (folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        config = build(DistillConfig, {
            "student": {"path": str(folder / "student")}, "teacher": {"path": str(folder / "teacher")},
            "data": {"path": str(folder / "data.jsonl")}, "output_dir": str(folder / "run"), "device": "cpu",
            "rollout": {"prompts_per_step": a.batch, "max_completion_length": a.new_tokens},
            "train": {"learning_rate": 1e-4, "max_steps": a.steps, "num_threads": a.threads, "seed": a.seed,
                      "save_steps": 10_000, "log_completions_steps": 0}}, "benchmark")
        clock = Clock()
        distill(config, clock)
        metrics = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    seconds = [b - a for a, b in zip(clock.ends, clock.ends[1:], strict=False)]  # the first step has no start
    length = statistics.mean(row["completions/mean_length"] for row in metrics)
    step = statistics.median(seconds[1:])
    print(json.dumps({"side": "tinyr2", **vars(a), "step_s": round(step, 4), "steps_s": [round(s, 4) for s in seconds],
                      "mean_length": length, "tokens_per_s": round(a.batch * length / step),
                      "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)}))


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable character; the template adds nothing, so a prompt has as many tokens as characters."""
    vocab = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {c: i + 3 for i, c in enumerate(CHARS)}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    tokenizer.chat_template = ("{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}<eos>"
                               "{% endif %}{% endfor %}")
    return tokenizer


def model(hidden: int, layers: int, vocab: int) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(Qwen3Config(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=4,
        head_dim=hidden // 4, intermediate_size=3 * hidden, vocab_size=vocab, max_position_embeddings=4096,
        tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2))


if __name__ == "__main__":
    main()
