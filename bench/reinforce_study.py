"""What reinforcement teaches a tiny model: every preset at equal generated tokens, three seeds, beside distillation.

    python bench/reinforce_study.py --out runs/reinforce --seeds 0 1 2

Task `sums`: three-term sums of three digits, answered column by column, by a student that has read a careless author:
in nine of ten worked solutions no carry is ever written down. Task `countdown`: three numbers, a target, and worked
solutions that try one expression after another. Every policy preset starts from its seed's cold start, writes 512
answers a step and is judged at the last evaluation within the budget of generated tokens, those of dropped groups
included. A teacher that has read careful solutions distills the same cold start with a tenth of the tokens; DPO
and a reward model learn from pairs that the cold start wrote. Out: pass@1 (one answer a problem, temperature 1) with
intervals, tokens, seconds. Runs that are done are kept, and one that was stopped goes on.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from tinyr2.core.config import build
from tinyr2.core.files import write_atomic
from tinyr2.core.rng import derive
from tinyr2.core.types import Problem
from tinyr2.data.countdown import Countdown, countdown
from tinyr2.data.problems import DataConfig, load_problems
from tinyr2.data.tasks import SignedSums, signed_sums
from tinyr2.eval.intervals import wilson
from tinyr2.models.load import ModelConfig, load_model, load_tokenizer, save_model
from tinyr2.recipes import distill, dpo, reinforce, reject, rm, setup, sft
from tinyr2.recipes.child import run_in_child
from tinyr2.recipes.machine import describe_machine
from tinyr2.report.console import Console
from tinyr2.report.jsonl import read_jsonl
from tinyr2.rollouts.sample import sample
from tinyr2.rollouts.sampling import SamplingConfig
from tinyr2.tokens.build import train_tokenizer

RESULTS = Path(__file__).resolve().parent / "results" / "reinforce.json"
VERBS = {"sft": (sft.SftConfig, sft.sft), "distill": (distill.DistillConfig, distill.distill),
         "reinforce": (reinforce.ReinforceConfig, reinforce.reinforce), "reject": (reject.RejectConfig, reject.reject),
         "dpo": (dpo.DpoConfig, dpo.dpo), "rm": (rm.RewardModelConfig, rm.rm)}
HELD_OUT, ANSWERS = 1024, 512  # problems to measure by; answers a step
BUDGET = {"sums": 600_000, "countdown": 500_000}  # generated tokens of a policy-gradient run
RATE = 1e-3
CARELESS = 0.9  # share of worked solutions without carries
# what a preset has beside its defaults: several updates on the same answers take smaller steps, 512 answers a step are
# too few for 16 mini-batches, and a critic that may learn for 50 steps before the policy would use up the budget
_FOUR = {"updates": {"num_mini_batches": 4}, "train": {"learning_rate": RATE / 2}}
BESIDE: dict[str, dict[str, Any]] = {
    "ppo": {"updates": {"num_iterations": 2}, "value": {"num_iterations": 2}, "train": {"learning_rate": RATE / 2}},
    "vapo": _FOUR | {"value": {"pretrain_steps": 8, "num_mini_batches": 4}},
    "dapo": _FOUR, "gspo": _FOUR, "r1_zero": _FOUR,
}
SUMS = ("grpo", "dapo", "rloo", "reinforce_pp_baseline", "ppo", "vapo", "orz", "r1_zero", "dr_grpo", "gspo",
        "reinforce_pp")
COUNTDOWN = SUMS[:6]
FORM = {"sums": re.compile(r"(.:\d([+-]\d)+=.\d;)*.:\d([+-]\d)+=.\d####\d+"),
        "countdown": re.compile(r"([\d()+*/-]+=-?\d+(/\d+)?;)*[\d()+*/-]+=-?\d+(/\d+)?####[\d()+*/-]+")}
OPD = {"opd_tenth": 52, "opd_quarter": 132}  # steps of 32 answers: that share of the budget


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/reinforce"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", default=["sums", "countdown"])
    parser.add_argument("--only", nargs="+", help="presets, opd_tenth, opd_quarter, dpo or rm; by default all")
    args = parser.parse_args()
    study = Study(args.out)
    for seed in args.seeds:
        for task in args.tasks:
            world = args.out / f"{task}-{seed}"
            study.prepare(world, task, seed)
            methods = [*SUMS, *OPD, "dpo", "rm"] if task == "sums" else COUNTDOWN
            for method in methods:
                if not args.only or method in args.only:
                    study.one(world, task, seed, method)
            write_atomic(RESULTS, json.dumps(study.summary(), indent=1) + "\n")
    print(json.dumps(study.summary()["methods"], indent=1))


class Study:
    """The runs in a folder; `rows.json` has those that are done."""

    def __init__(self, out: Path):
        self.out = out
        out.mkdir(parents=True, exist_ok=True)
        path = out / "rows.json"
        self.rows: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else {}

    def keep(self, name: str, row: dict[str, Any]) -> None:
        """Note a finished run."""
        self.rows[name] = row
        write_atomic(self.out / "rows.json", json.dumps(self.rows, indent=1) + "\n")
        print(name, json.dumps({k: v for k, v in row.items() if k != "curve"}), flush=True)

    def run(self, verb: str, raw: dict[str, Any]) -> dict[str, Any]:
        """A run in a child process, begun or gone on with."""
        config = build(VERBS[verb][0], raw, verb)
        folder = Path(raw["output_dir"])
        resume = (folder / "config.resolved.yaml").is_file()
        ended = run_in_child(_carry_out, verb, config, resume, json_mode=False)
        if ended.value is None or ended.value.get("ending") != "finished":
            raise SystemExit(f"{folder}: {ended.fault or ended.value}")
        return ended.value

    def prepare(self, world: Path, task: str, seed: int) -> None:
        """Problems, tokenizer, random weights, cold start; for sums a teacher too."""
        if not (world / "init" / "student").is_dir():
            make_world(world, task, seed)
        if f"{world.name}/cold" not in self.rows:
            steps = 700 if task == "sums" else 600
            result = self.run("sft", sft_raw(world, "student", "solutions", "cold", steps, seed))
            row = measured(result, "cold", task, seed)
            self.keep(f"{world.name}/cold", row | {"well_formed": well_formed(world / "cold", task)})
        if task == "sums" and f"{world.name}/teacher" not in self.rows:
            result = self.run("sft", sft_raw(world, "teacher", "careful", "teacher", 1400, seed))
            self.keep(f"{world.name}/teacher", measured(result, "teacher", task, seed))

    def one(self, world: Path, task: str, seed: int, method: str) -> None:
        """One method's run, unless it is done."""
        name = f"{world.name}/{method}"
        if name in self.rows:
            return
        if method in OPD:
            row = measured(self.run("distill", opd_raw(world, seed, method)), method, task, seed)
        elif method in ("dpo", "rm"):
            self.run("reject", pairs_raw(world, seed))
            row = measured(self.run(method, pair_raw(world, seed, method)), method, task, seed)
        else:
            row = measured(self.run("reinforce", policy_raw(world, task, seed, method)), method, task, seed)
        self.keep(name, row)

    def summary(self) -> dict[str, Any]:
        """Every row, and each method over its seeds."""
        found: dict[str, list[dict[str, Any]]] = {}
        for row in self.rows.values():
            found.setdefault(f"{row['task']}/{row['method']}", []).append(row)
        methods = {name: over_seeds(rows, found[f"{rows[0]['task']}/cold"]) for name, rows in found.items()}
        return {"budget": BUDGET, "answers_a_step": ANSWERS, "held_out": HELD_OUT, "rate": RATE, "careless": CARELESS,
                "beside": BESIDE, "methods": methods, "rows": list(self.rows.values()),
                "machine": describe_machine(str(Path(__file__).parent))}


def _carry_out(verb: str, config: Any, resume: bool, console: Console) -> dict[str, Any]:
    return VERBS[verb][1](config, console, resume=resume)


def over_seeds(rows: Sequence[dict[str, Any]], cold: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds; the interval is Wilson's, over all held-out answers together."""
    out: dict[str, Any] = {"seeds": len(rows)}
    for key in ("tokens", "seconds", "steps", "pair_accuracy"):
        values = [r[key] for r in rows if r.get(key) is not None]
        if values:
            out[key] = round(fmean(values), 4)
    if any(r.get("pass_at_1") is None for r in rows):
        return out
    start = {r["seed"]: r["pass_at_1"] for r in cold}
    right = sum(round(r["pass_at_1"] * HELD_OUT) for r in rows)
    low, high = wilson(right, HELD_OUT * len(rows))
    return out | {"pass_at_1": fmean(r["pass_at_1"] for r in rows), "low": low, "high": high,
                  "by_seed": [r["pass_at_1"] for r in rows],
                  "gain": [round(100 * (r["pass_at_1"] - start[r["seed"]]), 1) for r in rows]}


# the worlds


def make_world(world: Path, task: str, seed: int) -> None:
    """Problem files, a tokenizer, and models with random weights."""
    if task == "sums":
        sums = SignedSums(terms=3, min_terms=3, digits=3)
        train, held = signed_sums(sums, "train", 20_000, seed), signed_sums(sums, "held_out", HELD_OUT, seed)
        worked = signed_sums(sums.model_copy(update={"careless": CARELESS}), "train", 20_000, seed)
    else:
        level = Countdown(numbers=3, low=1, high=20, max_target=100, tries=2)
        train, held = countdown(level, "train", 8_000, seed), countdown(level, "held_out", HELD_OUT, seed)
        worked = train
    world.mkdir(parents=True, exist_ok=True)
    for name, problems, solved in (("problems", train, False), ("careful", train, True), ("solutions", worked, True),
                                   ("held_out", held, False)):
        write_atomic(world / f"{name}.jsonl", "".join(_line(p, solved) for p in problems))
    texts = [m.content for p in worked[:2000] for m in (*p.messages, *p.completion)]
    tokenizer = train_tokenizer(texts, vocab_size=32, alphabet="corpus")
    for name, hidden in (("student", 64 if task == "sums" else 96), ("teacher", 96)):
        torch.manual_seed(derive(seed, "init", name))
        model = Qwen3ForCausalLM(Qwen3Config(
            hidden_size=hidden, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
            head_dim=hidden // 4, intermediate_size=3 * hidden, vocab_size=len(tokenizer), max_position_embeddings=256,
            tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None))
        save_model(model, tokenizer, world / "init" / name)


def _line(p: Problem, solved: bool) -> str:
    row = {"prompt": [{"role": m.role, "content": m.content} for m in p.messages], "answer": p.answer, **p.columns}
    if solved:
        row["completion"] = [{"role": m.role, "content": m.content} for m in p.completion]
    return json.dumps(row) + "\n"


# the runs


def _train(seed: int, steps: int, rate: float, **more: Any) -> dict[str, Any]:
    return {"optim": "muon", "learning_rate": rate, "max_steps": steps, "seed": seed, "num_threads": 1,
            "save_steps": 50, "log_completions_steps": 0} | more


def _judged(world: Path, task: str, temperature: float = 1.0) -> dict[str, Any]:
    return {"eval_data": {"path": str(world / "held_out.jsonl")}, "device": "cpu",
            "eval": {"max_completion_length": 96, "temperature": temperature},
            "rewards": [{"name": "exact_answer" if task == "sums" else "countdown"}]}


def sft_raw(world: Path, init: str, data: str, out: str, steps: int, seed: int) -> dict[str, Any]:
    """Supervised fine-tuning on worked solutions."""
    return _judged(world, world.name.split("-")[0]) | {
        "model": {"path": str(world / "init" / init)}, "data": {"path": str(world / f"{data}.jsonl")},
        "examples_per_step": 64, "output_dir": str(world / out), "train": _train(seed, steps, 6e-3, warmup_steps=20)}


def policy_raw(world: Path, task: str, seed: int, preset: str) -> dict[str, Any]:
    """A policy preset from the cold start, for a little more than the budget."""
    n = {"ppo": 1, "reinforce_pp": 1, "rloo": 4, "grpo": 8, "dr_grpo": 8, "gspo": 8,
         "reinforce_pp_baseline": 8}.get(preset, 16)
    beside = BESIDE.get(preset, {})
    # answers to sums are of one length; those to countdown grow shorter, and dropped groups cost more answers a step
    steps, every = (33, 0) if task == "sums" and preset != "dapo" else (25, 5) if task == "sums" else (48, 4)
    train = _train(seed, steps, RATE, eval_steps=every, eval_on_start=True, lr_scheduler_type="constant",
                   warmup_steps=3)
    return {**_judged(world, task), "algorithm": preset, "model": {"path": str(world / "cold/final")},
            "data": {"path": str(world / "problems.jsonl")}, "output_dir": str(world / preset),
            "rollout": {"prompts_per_step": ANSWERS // n, "num_generations": n, "max_completion_length": 96},
            **{k: v for k, v in beside.items() if k != "train"}, "train": train | beside.get("train", {})}


def opd_raw(world: Path, seed: int, method: str) -> dict[str, Any]:
    """On-policy distillation of the cold start."""
    return {**_judged(world, "sums"), "student": {"path": str(world / "cold/final")},
            "teacher": {"path": str(world / "teacher/final")}, "data": {"path": str(world / "problems.jsonl")},
            "rollout": {"prompts_per_step": 32, "max_completion_length": 96}, "output_dir": str(world / method),
            "train": _train(seed, OPD[method], RATE, eval_on_start=True, warmup_steps=3)}


def pairs_raw(world: Path, seed: int) -> dict[str, Any]:
    """Right and wrong answers of the cold start to the same problems."""
    return {"model": {"path": str(world / "cold/final")}, "num_generations": 8, "temperature": 1.0, "pairs": True,
            "data": {"path": str(world / "problems.jsonl"), "limit": 3000}, "max_completion_length": 96, "seed": seed,
            "rewards": [{"name": "exact_answer"}], "num_threads": 1, "output_dir": str(world / "pairs"),
            "problems_per_chunk": 512}


def pair_raw(world: Path, seed: int, algorithm: str) -> dict[str, Any]:
    """DPO of the cold start, or a reward model from it; the last 256 pairs are held out."""
    lines = (world / "pairs/pairs.jsonl").read_text().splitlines(keepends=True)
    for name, part in (("pairs_train", lines[:-256]), ("pairs_held_out", lines[-256:])):
        write_atomic(world / f"{name}.jsonl", "".join(part))
    return {"algorithm": algorithm, "model": {"path": str(world / "cold/final")}, "pairs_per_step": 32,
            "data": {"path": str(world / "pairs_train.jsonl")}, "output_dir": str(world / algorithm), "device": "cpu",
            "eval_data": {"path": str(world / "pairs_held_out.jsonl")},
            "train": _train(seed, 150, 1e-4 if algorithm == "dpo" else 2e-3, warmup_steps=10)}


def measured(result: dict[str, Any], method: str, task: str, seed: int) -> dict[str, Any]:
    """A row: the last evaluation within the budget, and what it took to get there."""
    folder = Path(result["run"])
    rows, clocks = read_jsonl(folder / "metrics.jsonl"), read_jsonl(folder / "timing.jsonl")
    generated = [round(r.get("completions/mean_length", 0.0) * ANSWERS) for r in rows]
    total, evals = 0, []
    for r, n in zip(rows, generated, strict=True):
        total = r.get("num_generated_tokens", total + n * 32 // ANSWERS if method in OPD else 0)
        if "eval_pass@1" in r:
            evals.append({"step": r["step"], "tokens": total, "pass_at_1": r["eval_pass@1"],
                          "length": r["eval_completions/mean_length"], "clipped": r["eval_completions/clipped_ratio"]})
    row: dict[str, Any] = {"method": method, "task": task, "seed": seed, "steps": rows[-1]["step"],
                           "seconds": round(sum(c.get("step_s", 0.0) for c in clocks), 1)}
    if "eval_accuracy" in rows[-1]:
        row |= {"pair_accuracy": rows[-1]["eval_accuracy"], "pairs": rows[-1]["eval_accuracy_n"]}
    if method == "dpo":
        return row | judged(folder, task)
    if not evals:
        return row
    last = [e for e in evals if e["tokens"] <= BUDGET[task]][-1]
    row |= {k: last[k] for k in ("pass_at_1", "tokens", "length", "clipped")} | {"steps": last["step"], "curve": evals}
    row["seconds"] = round(sum(c.get("step_s", 0.0) for c in clocks if c["step"] <= last["step"]), 1)
    if method != "rm":
        row["greedy"] = judged(folder, task, temperature=0.0)["pass_at_1"]
    return row


def well_formed(folder: Path, task: str) -> float:
    """The share of sampled answers that have the form of a worked solution, right or wrong."""
    model = load_model(ModelConfig(path=str(folder / "final")), torch.device("cpu"))
    tokenizer = load_tokenizer(ModelConfig(path=str(folder / "final")))
    problems = load_problems(DataConfig(path=str(folder.parent / "held_out.jsonl")))
    sampling = SamplingConfig(temperature=1.0, max_completion_length=96)
    rollouts = sample(setup.policy_of(model, tokenizer, len(tokenizer)), problems, n=1, sampling=sampling, seed=0)
    return fmean(FORM[task].fullmatch(r.text) is not None and r.finish == "stop" for r in rollouts)


def judged(folder: Path, task: str, temperature: float = 1.0) -> dict[str, Any]:
    """pass@1 of a finished model on the held-out problems."""
    from tinyr2.recipes.evaluate import EvaluateConfig, evaluate_model

    raw = _judged(folder.parent, task, temperature)
    config = build(EvaluateConfig, {"model": {"path": str(folder / "final")}, "data": raw["eval_data"],
                                    "eval": raw["eval"], "rewards": raw["rewards"], "device": "cpu"}, "eval")
    torch.set_num_threads(1)
    found = evaluate_model(config, Console(plain=True))
    return {"pass_at_1": found["pass@1"], "length": found["completions/mean_length"]}


if __name__ == "__main__":
    main()
