"""Token-level and sequence-level distillation on the quickstart's task, at equal generated tokens.

    python bench/sequence_study.py --study runs/study --seeds 0 1 2

In: the folders of quickstart_study.py, for their teachers and cold starts. Each method runs until it has generated as
many tokens as the token-level run of the same seed; out: pass@1 with intervals and the share of the gap from cold
start to teacher that each closes. Runs that are done are not run again.
"""

import argparse
import json
from pathlib import Path

from tinyr2.core.config import build
from tinyr2.core.files import write_atomic
from tinyr2.data.tasks import SignedSums
from tinyr2.eval.intervals import wilson
from tinyr2.recipes import quickstart
from tinyr2.recipes.distill import DistillConfig, distill
from tinyr2.recipes.machine import describe_machine
from tinyr2.report.console import Console
from tinyr2.report.jsonl import read_jsonl

RESULTS = Path(__file__).resolve().parent / "results"
METHODS = {
    "token": {"level": "token"},
    "sequence_reinforce": {"level": "sequence", "reward_loss": "reinforce"},
    "sequence_weighted_nll": {"level": "sequence", "reward_loss": "weighted_nll"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, default=Path("runs/study"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    args = parser.parse_args()
    rows = {m: [one(args.study / f"seed-{s}", s, m) for s in args.seeds] for m in args.methods}
    starts = [json.loads((args.study / f"seed-{s}/study.json").read_text())["rows"] for s in args.seeds]
    result = {"methods": {m: summary(r, starts) for m, r in rows.items()}, "machine": describe_machine()}
    write_atomic(RESULTS / "sequence.json", json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["methods"], indent=1))


def one(folder: Path, seed: int, method: str) -> dict:
    """Train and measure one method of one seed."""
    out = folder / f"study_{method}"
    done = out / "study.json"
    if done.is_file():
        return json.loads(done.read_text())
    steps = quickstart.Plan().opd
    config = quickstart.opd_config(folder, seed, quickstart.Plan(), SignedSums()).model_dump(mode="json")
    config |= {"output_dir": str(out), "loss": METHODS[method]}
    if method != "token":
        # the token-level run writes one answer to each of 64 prompts; four to each of 16 cost as many tokens
        config["rollout"] |= {"prompts_per_step": 16, "num_generations": 4}
        config["rewards"] = [{"name": "exact_answer"}]
    config["train"] |= {"max_steps": steps}
    distill(build(DistillConfig, config, method), Console(plain=True), overwrite=out.exists())
    measured, _, _ = quickstart.measure(out / "final", folder / "data/held_out.jsonl")
    batch = config["rollout"]["prompts_per_step"] * config["rollout"]["num_generations"]
    generated = sum(r["completions/mean_length"] * batch for r in read_jsonl(out / "metrics.jsonl"))
    seconds = sum(r["step_s"] for r in read_jsonl(out / "timing.jsonl"))
    result = {"seed": seed, "solved": sum(v is True for v in measured.correct), "n": len(measured.correct),
              "generated_tokens": round(generated), "steps": steps, "seconds": round(seconds, 1)}
    write_atomic(done, json.dumps(result) + "\n")
    return result


def summary(runs: list[dict], starts: list[dict]) -> dict:
    """Pooled pass@1 and the share of the gap that was closed, per seed and pooled."""
    solved, n = sum(r["solved"] for r in runs), sum(r["n"] for r in runs)
    low, high = wilson(solved, n)
    cold = sum(s["student_cold"]["pass_at_1"] for s in starts) / len(starts)
    teacher = sum(s["teacher"]["pass_at_1"] for s in starts) / len(starts)
    each = [(r["solved"] / r["n"] - s["student_cold"]["pass_at_1"])
            / (s["teacher"]["pass_at_1"] - s["student_cold"]["pass_at_1"]) for r, s in zip(runs, starts, strict=True)]
    return {"pass_at_1": solved / n, "low": low, "high": high, "cold": cold, "teacher": teacher,
            "gap_closed": (solved / n - cold) / (teacher - cold), "gap_closed_by_seed": each, "runs": runs}


if __name__ == "__main__":
    main()
