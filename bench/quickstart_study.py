"""The quickstart over several seeds, pooled, and one control more.

    python bench/quickstart_study.py --seeds 0 1 2 --out runs/study

Per seed: `tinyr2 quickstart`, then a student that starts from the same cold start and is fine-tuned, for as many
seconds as distillation took, on the teacher's answers to distillation's own prompts (greedy, one each; the time that
writing them took is reported apart). Differences are paired by problem. Seeds that are done are not run again.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from tinyr2.core.config import load
from tinyr2.core.files import write_atomic
from tinyr2.core.types import Problem
from tinyr2.data.problems import DataConfig, draw, load_problems
from tinyr2.eval.intervals import paired_difference, wilson
from tinyr2.models.load import ModelConfig, count_parameters, load_model, load_tokenizer
from tinyr2.recipes import quickstart, setup
from tinyr2.recipes.distill_config import DistillConfig
from tinyr2.recipes.machine import describe_machine
from tinyr2.recipes.sft import SftConfig, sft
from tinyr2.report.console import Console
from tinyr2.report.jsonl import read_jsonl
from tinyr2.rollouts.sample import sample
from tinyr2.rollouts.sampling import SamplingConfig

RESULTS = Path(__file__).resolve().parent / "results"
CONTROL = "student_sft_on_teacher_answers"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=quickstart.BASE_MINUTES)
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    args = parser.parse_args()
    runs = [one_seed(args.out / f"seed-{seed}", seed, args.minutes) for seed in args.seeds]
    verdicts = {name: [v for r in runs for v in r["verdicts"][name]] for name in runs[0]["verdicts"]}
    pooled = {name: share(values) for name, values in verdicts.items()}
    differences = {f"{a} - {b}": pair(verdicts[a], verdicts[b]) for a, b in (
        ("teacher", "student_cold"), ("teacher", "student_opd"), ("student_opd", "student_sft"),
        ("student_opd", CONTROL))}
    teacher, student = (count_parameters(load_model(ModelConfig(path=str(args.out / f"seed-{args.seeds[0]}" / name)),
                                                    torch.device("cpu")))
                        for name in ("teacher/final", "student_opd/final"))
    result = {"pooled": pooled, "differences": differences, "ratio": teacher[0] / student[0],
              "ratio_without_embeddings": teacher[1] / student[1],
              "seeds": [{k: r[k] for k in ("seed", "rows", "seconds", "teacher_writing_s")} for r in runs],
              "machine": describe_machine(Path(__file__).parent)}
    RESULTS.mkdir(exist_ok=True)
    write_atomic(RESULTS / "quickstart.json", json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: result[k] for k in ("pooled", "differences", "ratio", "ratio_without_embeddings")}, indent=1))


def share(values: list[bool | None]) -> dict:
    decided = [v for v in values if v is not None]
    low, high = wilson(sum(decided), len(decided))
    return {"pass_at_1": sum(decided) / len(decided), "low": low, "high": high, "n": len(decided)}


def pair(a: list[bool | None], b: list[bool | None]) -> dict:
    found = paired_difference(a, b)
    return {"points": 100 * found.value, "low": 100 * found.low, "high": 100 * found.high, "n": found.n}


def one_seed(out: Path, seed: int, minutes: float) -> dict:
    """All rows of one seed, from disk where they are there already."""
    done = out / "study.json"
    if done.is_file():
        return json.loads(done.read_text())
    subprocess.run([sys.executable, "-m", "tinyr2", "quickstart", "--seed", str(seed), "--minutes", str(minutes),
                    "--out", str(out), "--overwrite"], check=True)
    found = json.loads((out / quickstart.MARKER).read_text())
    verdicts = json.loads((out / "verdicts.json").read_text())
    row, verdict, writing = control(out, seed, found["rows"]["student_opd"]["seconds"])
    result = found | {"rows": found["rows"] | {CONTROL: row}, "verdicts": verdicts | {CONTROL: verdict},
                      "teacher_writing_s": writing}
    write_atomic(done, json.dumps(result) + "\n")
    return result


def control(out: Path, seed: int, seconds: float) -> tuple[dict, list[bool | None], float]:
    """Fine-tune the cold student on the teacher's answers; (row, verdicts, seconds of writing)."""
    start = time.perf_counter()
    count = write_answers(out)
    writing = time.perf_counter() - start
    rate = statistics.median(row["step_s"] for row in read_jsonl(out / "student_cold/timing.jsonl"))
    steps = max(8, round(seconds / rate))
    base = load(SftConfig, out / "student_sft/config.resolved.yaml", [
        f"data.path={out}/data/teacher_answers.jsonl", f"output_dir={out}/{CONTROL}", f"train.max_steps={steps}",
        f"train.eval_steps={max(1, steps // 8)}"])
    sft(base, Console(plain=True), overwrite=(out / CONTROL).exists())
    trained = sum(r.get("step_s", 0.0) for r in read_jsonl(out / CONTROL / "timing.jsonl"))
    measured, total, inner = quickstart.measure(out / CONTROL / "final", out / "data/held_out.jsonl")
    figure = measured.pass_at[1]
    return ({"params": total, "params_without_embeddings": inner, "pass_at_1": figure.value, "low": figure.low,
             "high": figure.high, "n": figure.n, "seconds": round(trained, 1), "steps": steps, "examples": count},
            list(measured.correct), writing)


def write_answers(out: Path) -> int:
    """The teacher's greedy answers to every problem that distillation drew, as a data set."""
    config = load(DistillConfig, out / "student_opd/config.resolved.yaml")
    problems = load_problems(DataConfig(path=str(out / "data/problems.jsonl")))
    drawn: dict[str, Problem] = {}
    for t in range(config.train.max_steps):
        for p in draw(problems, config.rollout.prompts_per_step, t, config.train.seed):
            drawn[p.id] = p
    where = ModelConfig(path=str(out / "teacher/final"))
    model, tokenizer = load_model(where, torch.device("cpu")), load_tokenizer(where)
    greedy = SamplingConfig(temperature=0.0, max_completion_length=config.rollout.max_completion_length)
    rollouts = sample(setup.policy_of(model, tokenizer, model.config.vocab_size), list(drawn.values()), n=1, seed=0,
                      sampling=greedy, author="teacher")
    rows = [{"prompt": [{"role": "user", "content": r.problem.messages[0].content}], "answer": r.problem.answer,
             "completion": [{"role": "assistant", "content": r.text}]} for r in rollouts if r.finish == "stop"]
    write_atomic(out / "data/teacher_answers.jsonl", "\n".join(json.dumps(r) for r in rows) + "\n")
    return len(rows)


if __name__ == "__main__":
    main()
