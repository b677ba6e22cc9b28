"""Token-level and sequence-level distillation on the quickstart's task, at equal generated tokens.

    python bench/sequence_study.py --study runs/study --seeds 0 1 2

In: the folders of quickstart_study.py, for their teachers, students with random weights, and problems. Each seed gets a
cold start of its own (1,152 solutions: from the quickstart's 768, a reward for the whole answer is almost never earned;
see docs/log.md), from which each method writes the same number of answers with the same optimizer and rate. Out: pass@1
with intervals, and the share of the gap from cold start to teacher that each closes. Runs that are done are kept.
"""

import argparse
import json
from pathlib import Path
from statistics import fmean

from tinyr2.core.config import build
from tinyr2.core.files import write_atomic
from tinyr2.eval.intervals import wilson
from tinyr2.recipes import quickstart
from tinyr2.recipes.distill import distill
from tinyr2.recipes.distill_config import DistillConfig
from tinyr2.recipes.machine import describe_machine
from tinyr2.recipes.sft import SftConfig, sft
from tinyr2.report.console import Console
from tinyr2.report.jsonl import read_jsonl

RESULTS = Path(__file__).resolve().parent / "results"
METHODS = {
    "token": {"level": "token"},
    "sequence_reinforce": {"level": "sequence", "reward_loss": "reinforce"},
    "sequence_weighted_nll": {"level": "sequence", "reward_loss": "weighted_nll"},
}
SOLUTIONS, STEPS, RATE = 1152, 540, 4e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, default=Path("runs/study"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    runs = {s: one_seed(args.study / f"seed-{s}", s) for s in args.seeds}
    teachers = [json.loads((args.study / f"seed-{s}/study.json").read_text())["rows"]["teacher"]["pass_at_1"]
                for s in args.seeds]
    colds = [runs[s]["cold"]["pass_at_1"] for s in args.seeds]
    result = {"teacher": teachers, "cold": colds, "solutions": SOLUTIONS, "steps": STEPS, "learning_rate": RATE,
              "methods": {m: summary([runs[s][m] for s in args.seeds], colds, teachers) for m in METHODS},
              "machine": describe_machine(Path(__file__).parent)}
    write_atomic(RESULTS / "sequence.json", json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["methods"], indent=1))


def one_seed(folder: Path, seed: int) -> dict[str, dict]:
    """The cold start and every method of one seed."""
    solutions = (folder / "data/teacher_solutions.jsonl").read_text().splitlines()[:SOLUTIONS]
    data = folder / f"data/solutions_{SOLUTIONS}.jsonl"
    write_atomic(data, "\n".join(solutions) + "\n")
    cold = quickstart.cold_config(folder, seed, quickstart.Plan()).model_dump(mode="json")
    cold |= {"data": cold["data"] | {"path": str(data)}, "output_dir": str(folder / "study_cold")}
    rows = {"cold": one(folder, "cold", build(SftConfig, cold, "cold"))}
    for method, loss in METHODS.items():
        config = quickstart.opd_config(folder, seed, quickstart.Plan(), quickstart.LEVEL).model_dump(mode="json")
        config |= {"output_dir": str(folder / f"study_{method}"), "loss": loss,
                   "student": config["student"] | {"path": str(folder / "study_cold/final")}}
        if method != "token":  # 32 prompts twice instead of 64 once: as many answers
            config["rollout"] |= {"prompts_per_step": 32, "num_generations": 2}
        config["train"] |= {"max_steps": STEPS, "learning_rate": RATE}
        rows[method] = one(folder, method, build(DistillConfig, config, method))
    return rows


def one(folder: Path, name: str, config: SftConfig | DistillConfig) -> dict:
    """Train and measure one model, or read what an earlier call measured."""
    out = Path(config.output_dir)
    done = out / "study.json"
    if done.is_file():
        return json.loads(done.read_text())
    recipe = distill if isinstance(config, DistillConfig) else sft
    recipe(config, Console(plain=True), overwrite=out.exists())
    measured, _, _ = quickstart.measure(out / "final", folder / "data/held_out.jsonl")
    metrics = read_jsonl(out / "metrics.jsonl")
    result = {"name": name, "pass_at_1": measured.pass_at[1].value, "solved": sum(v is True for v in measured.correct),
              "n": len(measured.correct), "steps": len(metrics),
              "seconds": round(sum(r["step_s"] for r in read_jsonl(out / "timing.jsonl")), 1)}
    if isinstance(config, DistillConfig):
        answers = config.rollout.prompts_per_step * config.rollout.num_generations
        result["generated_tokens"] = round(sum(r["completions/mean_length"] * answers for r in metrics))
    write_atomic(done, json.dumps(result) + "\n")
    return result


def summary(runs: list[dict], colds: list[float], teachers: list[float]) -> dict:
    """Pooled pass@1, and the share of the gap from cold start to teacher that was closed, by seed and pooled."""
    solved, n = sum(r["solved"] for r in runs), sum(r["n"] for r in runs)
    low, high = wilson(solved, n)
    by_seed = [(r["pass_at_1"] - c) / (t - c) for r, c, t in zip(runs, colds, teachers, strict=True)]
    cold, teacher = fmean(colds), fmean(teachers)
    return {"pass_at_1": solved / n, "low": low, "high": high, "gap_closed": (solved / n - cold) / (teacher - cold),
            "gap_closed_by_seed": by_seed, "runs": runs}


if __name__ == "__main__":
    main()
