"""`tinyr2 quickstart`: a teacher, a student 18 times smaller, and on-policy distillation, from nothing in minutes.

In: a seed and how many minutes. Out: one table of four rows, and the run folders behind it. Each row is what
`tinyr2 sft` or `tinyr2 distill` does with the config in its folder, in a child process of its own.
"""

import json
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from tinyr2.core.config import Config, build
from tinyr2.core.errors import RunError
from tinyr2.core.files import write_atomic
from tinyr2.core.rng import derive
from tinyr2.core.types import Problem
from tinyr2.data.problems import DataConfig, load_problems
from tinyr2.data.tasks import SignedSums, signed_sums
from tinyr2.eval.suite import EvalConfig, EvalResult, evaluate
from tinyr2.models.load import ModelConfig, count_parameters, load_model, load_tokenizer, save_model
from tinyr2.recipes import setup
from tinyr2.recipes.child import run_in_child
from tinyr2.recipes.distill import distill
from tinyr2.recipes.distill_config import DistillConfig
from tinyr2.recipes.sft import SftConfig, sft
from tinyr2.report.console import Console
from tinyr2.report.html import write_report
from tinyr2.report.jsonl import read_jsonl
from tinyr2.report.table import result_table
from tinyr2.rewards.grade import RewardConfig, load_reward
from tinyr2.tokens.build import train_tokenizer

LEVEL = SignedSums(terms=3, digits=2)
MARKER = "quickstart.json"
HELD_OUT, VALIDATION = 1024, 256
SOLUTIONS = 768  # worked solutions that the student's side owns
BASE_MINUTES = 3.0  # the steps below are for this many


@dataclass(frozen=True)
class Shape:
    """A Qwen3 model's size."""

    hidden: int
    layers: int
    heads: int
    ffn: int


TEACHER = Shape(hidden=144, layers=2, heads=4, ffn=432)
STUDENT = Shape(hidden=32, layers=2, heads=4, ffn=96)


@dataclass(frozen=True)
class Plan:
    """How many steps each stage takes; three minutes on two cores."""

    teacher: int = 430
    cold: int = 600
    opd: int = 540

    def scaled(self, minutes: float) -> "Plan":
        """The same plan for another budget."""
        factor = minutes / BASE_MINUTES
        return Plan(*(max(2, round(n * factor)) for n in (self.teacher, self.cold, self.opd)))


def quickstart(console: Console, *, out: Path, seed: int = 0, minutes: float = BASE_MINUTES,
               level: SignedSums = LEVEL, overwrite: bool = False) -> dict:
    """Run all stages and print the table; returns what `--json` prints."""
    start = time.perf_counter()
    _claim(out, overwrite)
    plan = Plan().scaled(minutes)
    console.note(f"problems, tokenizer and two models with random weights go to {out}")
    prepare(out, seed, level)
    rows: dict[str, dict] = {}
    rows["teacher"] = _row(console, out, "teacher", teacher_config(out, seed, plan))
    rows["student_cold"] = _row(console, out, "student_cold", cold_config(out, seed, plan))
    rows["student_opd"] = _row(console, out, "student_opd", opd_config(out, seed, plan, level))
    steps = _equal_steps(out, rows["student_opd"]["seconds"])
    rows["student_sft"] = _row(console, out, "student_sft", sft_config(out, seed, steps, level))
    verdicts = {name: row.pop("correct") for name, row in rows.items()}
    write_atomic(out / "verdicts.json", json.dumps(verdicts) + "\n")
    result = {"rows": rows, "seconds": round(time.perf_counter() - start, 1), "seed": seed}
    write_atomic(out / MARKER, json.dumps(result, indent=2) + "\n")
    write_atomic(out / "student_opd" / "result.json", json.dumps(result, indent=2) + "\n")
    report = write_report(out / "student_opd")
    console.table(result_table({name: _shown(row) for name, row in rows.items()},
                               title=f"sums of up to {level.terms} terms of {level.digits} digits, "
                                     f"{HELD_OUT} held-out problems, seed {seed}"))
    console.note(f"{result['seconds']:.0f} s · report {report}")
    return result


def _claim(out: Path, overwrite: bool) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not overwrite:
            raise RunError(f"{out}: already holds something; --overwrite replaces an earlier quickstart, or give "
                           "another --out")
        if not (out / MARKER).is_file():
            raise RunError(f"{out}: not a quickstart folder (no {MARKER}), so --overwrite will not delete it; give "
                           "another --out")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / MARKER, "{}\n")


def prepare(out: Path, seed: int, level: SignedSums) -> None:
    """Problem files, tokenizer, and two models with random weights."""
    train = signed_sums(level, "train", 30_000 + VALIDATION, seed)
    solved, validation = train[:-VALIDATION], train[-VALIDATION:]
    (out / "data").mkdir()
    _write(out / "data/teacher_solutions.jsonl", solved, solution=True)
    _write(out / "data/problems.jsonl", solved, solution=False)
    _write(out / "data/student_solutions.jsonl", solved[:SOLUTIONS], solution=True)
    _write(out / "data/validation.jsonl", validation, solution=False)
    _write(out / "data/held_out.jsonl", signed_sums(level, "held_out", HELD_OUT, seed), solution=False)
    texts = [m.content for p in solved[:2000] for m in (*p.messages, *p.completion)]
    tokenizer = train_tokenizer(texts, vocab_size=32, alphabet="corpus")
    for name, shape in (("teacher", TEACHER), ("student", STUDENT)):
        torch.manual_seed(derive(seed, "init", name))
        save_model(Qwen3ForCausalLM(_qwen3(shape, tokenizer)), tokenizer, out / "init" / name)


def _qwen3(shape: Shape, tokenizer) -> Qwen3Config:
    return Qwen3Config(
        hidden_size=shape.hidden, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads, head_dim=shape.hidden // shape.heads, intermediate_size=shape.ffn,
        vocab_size=len(tokenizer), max_position_embeddings=256, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None)


def _write(path: Path, problems: Sequence[Problem], *, solution: bool) -> None:
    lines = []
    for p in problems:
        row = {"prompt": [{"role": m.role, "content": m.content} for m in p.messages], "answer": p.answer}
        if solution:
            row["completion"] = [{"role": m.role, "content": m.content} for m in p.completion]
        lines.append(json.dumps(row))
    write_atomic(path, "\n".join(lines) + "\n")


def _settings(seed: int, **more) -> dict:
    # one thread: a second gains little on products this small, and loses much on a busy machine (docs/log.md)
    return {"optim": "muon", "seed": seed, "save_steps": 10_000, "warmup_steps": 20, "num_threads": 1} | more


def teacher_config(out: Path, seed: int, plan: Plan) -> SftConfig:
    """The teacher learns from every solution there is."""
    return build(SftConfig, {
        "model": {"path": str(out / "init/teacher")}, "data": {"path": str(out / "data/teacher_solutions.jsonl")},
        "examples_per_step": 64, "output_dir": str(out / "teacher"),
        "train": _settings(seed, learning_rate=5e-3, max_steps=plan.teacher)}, "teacher")


def cold_config(out: Path, seed: int, plan: Plan) -> SftConfig:
    """The student learns from the few solutions of its own."""
    return build(SftConfig, {
        "model": {"path": str(out / "init/student")}, "data": {"path": str(out / "data/student_solutions.jsonl")},
        "examples_per_step": 64, "output_dir": str(out / "student_cold"),
        "train": _settings(seed, learning_rate=8e-3, max_steps=plan.cold)}, "student_cold")


def opd_config(out: Path, seed: int, plan: Plan, level: SignedSums) -> DistillConfig:
    """The cold student answers problems without solutions, and the teacher judges each token."""
    return build(DistillConfig, {
        "student": {"path": str(out / "student_cold/final")}, "teacher": {"path": str(out / "teacher/final")},
        "data": {"path": str(out / "data/problems.jsonl")}, "output_dir": str(out / "student_opd"),
        "rollout": {"prompts_per_step": 64, "max_completion_length": level.longest_solution + 1},
        # from a cold start this weak the forward KL learns faster than the reverse one: docs/log.md
        "loss": {"level": "token", "divergence": {"kind": "forward_kl"}},
        "rewards": [{"name": "exact_answer"}],  # a curve to look at; a token-level loss does not read it
        "train": _settings(seed, learning_rate=1.2e-2, max_steps=plan.opd, log_completions_steps=50)}, "student_opd")


def sft_config(out: Path, seed: int, steps: int, level: SignedSums) -> SftConfig:
    """The control: the cold student goes on with its own solutions; its best checkpoint counts."""
    return build(SftConfig, {
        "model": {"path": str(out / "student_cold/final")}, "data": {"path": str(out / "data/student_solutions.jsonl")},
        "eval_data": {"path": str(out / "data/validation.jsonl")}, "rewards": [{"name": "exact_answer"}],
        "examples_per_step": 64, "output_dir": str(out / "student_sft"),
        "eval": {"max_completion_length": level.longest_solution + 1},
        "train": _settings(seed, learning_rate=8e-3, max_steps=steps, eval_steps=max(1, steps // 8),
                           load_best_model_at_end=True)}, "student_sft")


def _equal_steps(out: Path, seconds: float) -> int:
    """SFT steps that fit in `seconds`, at the rate that the cold start (same model, data and batch) was measured at."""
    rate = statistics.median(row["step_s"] for row in read_jsonl(out / "student_cold/timing.jsonl"))
    return max(8, round(seconds / rate))


def _row(console: Console, out: Path, name: str, config: Config) -> dict:
    """Train and evaluate one model in a child process; its row of the table."""
    console.note(f"{name}:")
    ended = run_in_child(_stage, config, str(out), name, json_mode=console.json_mode)
    if ended.interrupted:
        raise KeyboardInterrupt
    fault = ended.fault or (ended.value if isinstance(ended.value, str) else None)
    if fault:
        raise RunError(f"quickstart: the stage {name} {fault}; start again with --overwrite")
    return ended.value


def _stage(config: Config, out: str, name: str, console: Console) -> dict | str:
    before, start = _rss_mib(), time.perf_counter()
    outcome = (distill if isinstance(config, DistillConfig) else sft)(config, console)
    if outcome["ending"] != "finished":
        return f"was {outcome['ending']} at step {outcome['step']}"
    trained = sum(row.get("step_s", 0.0) for row in read_jsonl(Path(outcome["run"]) / "timing.jsonl"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 2**20)
    result, total, inner = measure(Path(outcome["model"]), Path(out) / "data/held_out.jsonl")
    found = result.pass_at[1]
    console.note(f"{name}: pass@1 {found.value:.3f}, trained {trained:.0f} s of {time.perf_counter() - start:.0f} s")
    return {"params": total, "params_without_embeddings": inner, "pass_at_1": found.value, "low": found.low,
            "high": found.high, "n": found.n, "tokens_per_s": round(outcome["num_tokens"] / trained),
            "peak_mib": round(peak - before), "seconds": round(trained, 1), "steps": outcome["step"],
            "correct": list(result.correct)}


def measure(model_path: Path, data: Path) -> tuple[EvalResult, int, int]:
    """Greedy pass@1 of a model folder on a problem file, and its parameters, with and without embeddings."""
    config = ModelConfig(path=str(model_path))
    model, tokenizer = load_model(config, torch.device("cpu")), load_tokenizer(config)
    problems = load_problems(DataConfig(path=str(data)))
    greedy = EvalConfig(max_completion_length=model.config.max_position_embeddings // 2)
    result = evaluate(setup.policy_of(model, tokenizer, model.config.vocab_size), problems,
                      [load_reward(RewardConfig(name="exact_answer"))], greedy)
    return result, *count_parameters(model)


def _rss_mib() -> float:
    if sys.platform == "linux":
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _shown(row: dict) -> dict:
    return {k: v for k, v in row.items() if k not in ("steps", "params_without_embeddings")}
