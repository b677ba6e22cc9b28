"""GSM8K with two Qwen3-style models made here: how far does distillation lower the held-out reverse KL per token?

    python bench/gsm8k_study.py --seeds 0 1 2

Runs the commands of examples/gsm8k/ as they stand, once for the teacher and per seed for the student; reads eval_kl
(128 held-out problems, the student's own answers) at step 0 and at the end. Needs TINYR2_SHARED (default ../shared)
with data/ and tokenizers/.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from tinyr2.core.files import write_atomic
from tinyr2.recipes.machine import describe_machine
from tinyr2.report.jsonl import read_jsonl

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parent / "examples" / "gsm8k"
SHARED = Path(os.environ.get("TINYR2_SHARED", HERE.parent.parent / "shared"))


def tinyr2(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "tinyr2", *words], check=True)


def data(*keys: str) -> list[str]:
    return [f"{key}.path={SHARED}/data/gsm8k_{'test' if key == 'eval_data' else 'train'}.jsonl" for key in keys]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/gsm8k"))
    args = parser.parse_args()
    out, tokenizer = args.out, str(SHARED / "tokenizers" / "minimind")
    teacher = out / "teacher"
    if not (teacher / "final").is_dir():
        tinyr2("build", str(out / "teacher-init"), "--preset", "qwen3-5m", "--tokenizer", tokenizer, "--overwrite")
        tinyr2("sft", str(EXAMPLES / "teacher.yaml"), *data("data"), f"model.path={out}/teacher-init",
               f"output_dir={teacher}", "--overwrite")
    rows = [one(out, tokenizer, seed) for seed in args.seeds]
    result = {"runs": rows, "lowered_by": [1 - r["eval_kl_end"] / r["eval_kl_start"] for r in rows],
              "machine": describe_machine(Path(__file__).parent)}
    write_atomic(HERE / "results" / "gsm8k.json", json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: result[k] for k in ("runs", "lowered_by")}, indent=1))


def one(out: Path, tokenizer: str, seed: int) -> dict:
    """Student of one seed: cold start, then distillation."""
    init, cold, run = (out / f"{name}-{seed}" for name in ("student-init", "student", "distill"))
    start = time.perf_counter()
    if not (run / "final").is_dir():
        tinyr2("build", str(init), "--preset", "qwen3-1m", "--tokenizer", tokenizer, "--seed", str(seed), "--overwrite")
        tinyr2("sft", str(EXAMPLES / "student.yaml"), *data("data"), f"model.path={init}", f"output_dir={cold}",
               f"train.seed={seed}", "--overwrite")
        tinyr2("distill", str(EXAMPLES / "distill.yaml"), *data("data", "eval_data"), f"student.path={cold}/final",
               f"teacher.path={out}/teacher/final", f"output_dir={run}", f"train.seed={seed}", "--overwrite")
    found = [(row["step"], row["eval_kl"]) for row in read_jsonl(run / "metrics.jsonl") if "eval_kl" in row]
    last = read_jsonl(run / "metrics.jsonl")[-1]
    return {"seed": seed, "eval_kl_start": found[0][1], "eval_kl_end": found[-1][1], "eval_kl": found,
            "num_tokens": last["num_tokens"], "distill_s": round(sum(r.get("step_s", 0) for r in
                                                                     read_jsonl(run / "timing.jsonl")), 1),
            "wall_s": round(time.perf_counter() - start, 1)}


if __name__ == "__main__":
    main()
