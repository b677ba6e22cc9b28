"""What the tests of distillation with all kinds of teachers share: a world of them, and runs that stop and go on."""

import json
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from tests.recipes import tiny
from tinyr2.models.load import save_model
from tinyr2.recipes.run import Run
from tinyr2.tokens.build import train_tokenizer

DIGITS = "rewards=[{file: {world}/rewards.py, function: digits}]"
EVALUATED = (DIGITS, "eval_data={path: {world}/data.jsonl, limit: 4}", "eval={max_completion_length: 6}",
             "eval_kl_problems=4", "compare_problems=0")
TEMPLATE = ("{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '<|endoftext|>' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}")


def save(tokenizer, folder: Path, seed: int, hidden: int = 32, vocab: int | None = None) -> None:
    """A teacher of random weights."""
    torch.manual_seed(seed)
    save_model(Qwen3ForCausalLM(Qwen3Config(
        hidden_size=hidden, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
        intermediate_size=32, vocab_size=vocab or len(tokenizer), max_position_embeddings=160,
        tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None)), tokenizer, folder)


def make_world(folder: Path) -> Path:
    """Two teachers with the student's tokenizer, one with another and its own template; problems with hints."""
    tiny.make_world(folder)
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    (folder / "data.jsonl").write_text("".join(json.dumps(r | {"hint": f"see {i}"}) + "\n"
                                               for i, r in enumerate(rows)))
    texts = [m["content"] for r in rows for m in (*r["prompt"], *r["completion"])]
    save(AutoTokenizer.from_pretrained(folder / "student"), folder / "second", seed=5)
    other = train_tokenizer([*texts, "12 + 34 = 46, 1 + 1 = 2"] * 3, vocab_size=290)
    other.chat_template = TEMPLATE
    save(other, folder / "other", seed=6)
    (folder / "written.py").write_text(
        "def short(completions, **kwargs):\n"
        "    return [float(len(turns[0]['content']) < 9) for turns in completions]\n")
    return folder


def run(world: Path, out: Path, *overrides: str, **options: bool) -> tiny.Outcome:
    """A run of three steps."""
    return tiny.go(tiny.settings("distill", world, out, "compare_problems=0", *overrides), **options)


def teachers(*each: str) -> tuple[str, ...]:
    """In place of the one."""
    return "teacher=null", f"teachers=[{', '.join(each)}]"


def also(teacher: str, more: str) -> str:
    """The same teacher with more settings."""
    return f"{teacher[:-1]}, {more}}}"


def left(folder: Path) -> tuple[bytes, bytes]:
    """The finished model and the metrics."""
    return (folder / "final" / "model.safetensors").read_bytes(), (folder / "metrics.jsonl").read_bytes()


def stop_and_go_on(world: Path, out: Path, step: int, *overrides: str) -> None:
    """A run that is told to stop while `step` is written down, and resumed."""
    record = Run.record

    def stop(self, metrics, timing, alarms):
        record(self, metrics, timing, alarms)
        if metrics["step"] == step:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "record", stop)
        assert run(world, out, *overrides).result["ending"] == "stopped"
    assert run(world, out, *overrides, resume=True).result["ending"] == "finished"
