"""What the kill tests share: a fixed small world, a run in a child process, and a hand that kills it."""

import hashlib
import json
import multiprocessing
import random
import time
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from tinyr2.core.config import build
from tinyr2.data.tasks import SignedSums, signed_sums
from tinyr2.models.load import save_model
from tinyr2.recipes.distill import distill
from tinyr2.recipes.distill_config import DistillConfig
from tinyr2.recipes.reinforce import ReinforceConfig, reinforce
from tinyr2.recipes.sft import SftConfig, sft
from tinyr2.report.console import Console
from tinyr2.tokens.build import train_tokenizer

STEPS = 16
KINDS = ("sft", "token", "sequence", "reinforce")
Settings = SftConfig | DistillConfig | ReinforceConfig


def make_world(folder: Path) -> None:
    """Problems with solutions, a student and a teacher with random weights."""
    problems = signed_sums(SignedSums(terms=2, digits=1), "train", 40, 0)
    rows = [{"prompt": [{"role": "user", "content": p.messages[0].content}], "answer": p.answer,
             "completion": [{"role": "assistant", "content": p.completion[0].content}]} for p in problems]
    (folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    tokenizer = train_tokenizer([m.content for p in problems for m in (*p.messages, *p.completion)], vocab_size=30,
                                alphabet="corpus")
    for name, hidden in (("student", 16), ("teacher", 32)):
        torch.manual_seed(hidden)
        save_model(Qwen3ForCausalLM(Qwen3Config(
            hidden_size=hidden, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
            intermediate_size=32, vocab_size=len(tokenizer), max_position_embeddings=64, tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None)),
            tokenizer, folder / name)


# everything that a run of its kind remembers: a critic with an optimizer, mini-batches, rounds of refill, pass rates
REINFORCED = {
    "algorithm": "ppo", "rewards": [{"name": "soft_overlong", "options": {"soft_punish_cache": 8}}],
    "eval_rewards": [{"name": "exact_answer"}], "sampling": {"equal_groups": "refill", "max_rounds": 2, "adapt": {}},
    "updates": {"num_iterations": 1, "num_mini_batches": 2},
    "value": {"num_iterations": 1, "num_mini_batches": 2, "pretrain_steps": 4, "pretrain_until": 1.0}}


def config_of(kind: str, world: Path, out: Path, **train) -> Settings:
    """A short deterministic run of one kind."""
    settings = {"optim": "muon", "learning_rate": 3e-3, "max_steps": STEPS, "save_steps": 3, "deterministic": True,
                "log_completions_steps": 5, "num_threads": 1} | train
    data = {"path": str(world / "data.jsonl")}
    common = {"data": data, "eval_data": data | {"limit": 6}, "rewards": [{"name": "exact_answer"}],
              "eval": {"max_completion_length": 8}, "train": settings | {"eval_steps": 7}, "output_dir": str(out)}
    if kind == "sft":
        return build(SftConfig, common | {"model": {"path": str(world / "student")}, "examples_per_step": 6}, kind)
    rollout = {"prompts_per_step": 4, "max_completion_length": 12, "num_generations": 1}
    if kind == "reinforce":
        return build(ReinforceConfig, common | REINFORCED | {
            "model": {"path": str(world / "student")}, "rollout": rollout | {"num_generations": 3}}, kind)
    loss: dict = {"level": kind}
    if kind == "sequence":
        rollout |= {"num_generations": 2}
    return build(DistillConfig, common | {
        "student": {"path": str(world / "student")}, "teacher": {"path": str(world / "teacher")},
        "rollout": rollout, "loss": loss, "eval_kl_problems": 4}, kind)


def run(config: Settings, resume: bool) -> None:
    """One attempt, in this process."""
    with open("/dev/null", "w") as nowhere:
        recipe = {SftConfig: sft, DistillConfig: distill, ReinforceConfig: reinforce}[type(config)]
        recipe(config, Console(plain=True, stream=nowhere), resume=resume)


def _server() -> multiprocessing.context.BaseContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def warm() -> None:
    """Wait for the server to have torch loaded, so that the first run is no slower than the others."""
    child = _server().Process(target=time.sleep, args=(0,))
    child.start()
    child.join()


def attempt(config: Settings, kill_after: float | None) -> bool:
    """One attempt in a child forked from a server that has torch loaded; True if it came to its end."""
    resume = (Path(config.output_dir) / "config.resolved.yaml").is_file()
    child = _server().Process(target=run, args=(config, resume))
    child.start()
    child.join(kill_after)
    if child.is_alive():
        child.kill()
        child.join()
    assert child.exitcode in (0, -9), f"the run failed with exit code {child.exitcode}"
    return child.exitcode == 0


def outcome(out: Path) -> tuple[str, bytes]:
    """(SHA-256 of the final weights, a critic's among them, the metrics file)."""
    weights = b"".join(p.read_bytes() for p in sorted(out.glob("final*/model.safetensors")))
    return hashlib.sha256(weights).hexdigest(), (out / "metrics.jsonl").read_bytes()


def kill_and_compare(kind: str, world: Path, folder: Path, kills: int, seed: int) -> dict:
    """Run once undisturbed and once with `kills` SIGKILLs at random times; both outcomes and where the kills fell."""
    config = config_of(kind, world, folder / "undisturbed")
    start = time.perf_counter()
    assert attempt(config, None)
    length = time.perf_counter() - start
    config = config_of(kind, world, folder / "killed")
    rng, fell, finished = random.Random(seed), [], False
    while len(fell) < kills:
        finished = attempt(config, rng.uniform(0.1, 0.9) * length)
        rows = folder / "killed" / "metrics.jsonl"
        if finished:  # the rest was too short to be hit; begin anew, and the next kills fall into that run
            assert outcome(folder / "killed") == outcome(folder / "undisturbed")
            (folder / "killed").rename(folder / f"killed-{len(fell)}-{rng.random()}")
        else:
            fell.append(rows.read_bytes().count(b"\n") if rows.exists() else 0)
    while not finished:
        finished = attempt(config, None)
    return {"kind": kind, "kills": kills, "steps_at_kill": fell, "undisturbed": outcome(folder / "undisturbed"),
            "killed": outcome(folder / "killed")}
