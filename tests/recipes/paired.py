"""What the tests of preference recipes share: a small world of pairs, and runs in it."""

import hashlib
import io
import json
import random
import signal
from pathlib import Path

import pytest

from tests.recipes.tiny import torch_as_it_was
from tests.train.tiny import qwen3
from tinyr2.core.config import apply, build
from tinyr2.models.load import save_model
from tinyr2.recipes.dpo import DpoConfig, dpo
from tinyr2.recipes.preference import PreferenceConfig
from tinyr2.recipes.rm import RewardModelConfig, rm
from tinyr2.recipes.run import Run
from tinyr2.report.console import Console
from tinyr2.report.jsonl import read_jsonl
from tinyr2.tokens.build import train_tokenizer

RECIPES = {"dpo": (DpoConfig, dpo), "rm": (RewardModelConfig, rm)}


def make_world(folder: Path) -> Path:
    """Answers of which the one with a 7 is preferred, and a model with random weights whose pad is its eos."""
    rng = random.Random(0)
    for name, count in (("train", 120), ("held_out", 60)):
        rows = [{"prompt": f"{rng.randrange(10)}+{rng.randrange(10)}", "chosen": _answer(rng, True),
                 "rejected": _answer(rng, False), "margin": rng.randrange(3)} for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    tokenizer = train_tokenizer(["0123456789+-="], vocab_size=23, alphabet="corpus")
    tokenizer.pad_token = tokenizer.eos_token
    model = qwen3()
    assert len(tokenizer) <= model.config.vocab_size
    save_model(model, tokenizer, folder / "model")
    return folder


def _answer(rng: random.Random, good: bool) -> str:
    letters = [rng.choice("01234568") for _ in range(rng.randrange(2, 6))]
    if good:
        letters[rng.randrange(len(letters))] = "7"
    return "".join(letters)


def settings(kind: str, world: Path, out: Path, *overrides: str) -> PreferenceConfig:
    """Three steps; `overrides` as on the command line, with {world} for the world's folder."""
    raw = {"model": {"path": str(world / "model")}, "data": {"path": str(world / "train.jsonl")},
           "eval_data": {"path": str(world / "held_out.jsonl")}, "pairs_per_step": 8, "device": "cpu",
           "output_dir": str(out), "train": {"learning_rate": 3e-3, "max_steps": 3, "num_threads": 1}}
    return build(RECIPES[kind][0], apply(raw, [text.replace("{world}", str(world)) for text in overrides]), kind)


def go(config: PreferenceConfig, stop_after: int | None = None, **options: bool) -> dict:
    """Run it in this process, with a SIGTERM while step `stop_after` is recorded; what --json prints."""
    record = Run.record

    def stop(self, metrics, timing, alarms):
        record(self, metrics, timing, alarms)
        if metrics["step"] == stop_after:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch, torch_as_it_was():
        patch.setattr(Run, "record", stop)
        return RECIPES[config.algorithm][1](config, Console(plain=True, stream=io.StringIO()), **options)


def rows_of(config: PreferenceConfig) -> list[dict]:
    """metrics.jsonl"""
    return read_jsonl(Path(config.output_dir) / "metrics.jsonl")


def outcome(config: PreferenceConfig) -> tuple[str, bytes]:
    """(SHA-256 of the final weights, the metrics file)."""
    folder = Path(config.output_dir)
    return (hashlib.sha256((folder / "final" / "model.safetensors").read_bytes()).hexdigest(),
            (folder / "metrics.jsonl").read_bytes())
