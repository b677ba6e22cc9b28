"""What other teachers teach: another tokenizer, several specialists, one who knows more, and long beside short chains.

    python bench/teacher_study.py --out runs/teachers --parts cross merge privileged mixture --seeds 0 1 2

Out: pass@1 with intervals on 2,048 held-out problems a seed, in bench/results/teachers.json. Runs that are done are
kept, and one that was stopped goes on.

cross       the quickstart's cold student learns from a teacher with its own tokenizer, and from one that has another
            vocabulary (byte-level, digits merged) and another chat template, by each signal; equal generated tokens.
merge       a base model becomes a specialist in sums and one in sorting; one student, from the same base, learns from
            both. Beside it: fine-tuning on both kinds of solutions, and the average of the specialists' weights.
privileged  a student that has read a careless author teaches itself, as it reads when a right answer of the same group
            stands in its prompt; beside it GRPO with eight times the tokens.
mixture     a student of 43,000 parameters reads long chains, short ones, or both at one in five; equal tokens.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from teacher_runs import HELD_OUT, PARTS, SIGNALS, WORLDS, Teachers

from tinyr2.core.files import write_atomic
from tinyr2.eval.intervals import wilson
from tinyr2.recipes.machine import describe_machine

RESULTS = Path(__file__).resolve().parent / "results" / "teachers.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/teachers"))
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--prepare", action="store_true", help="worlds, teachers and cold starts only")
    args = parser.parse_args()
    study = Teachers(args.out)
    for seed in args.seeds:
        for part in args.parts:
            (WORLDS if args.prepare else PARTS)[part](study, seed)
            write_atomic(RESULTS, json.dumps(summary(study), indent=1) + "\n")


def summary(study: Teachers) -> dict[str, Any]:
    """Each run over its seeds, pooled, with intervals; the cross-tokenizer runs beside their same-tokenizer one."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, row in study.rows.items():
        world, _, who = name.partition("/")
        found.setdefault(f"{world.rpartition('-')[0]}/{who}", []).append(row)
    runs = {name: pooled(rows) for name, rows in found.items()}
    return {"held_out": HELD_OUT, "runs": runs, "gain_kept": gains(study), "signals": SIGNALS,
            "machine": describe_machine(str(Path(__file__).parent))}


def pooled(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Right answers over all seeds, on each held-out file; other figures as means."""
    out: dict[str, Any] = {"seeds": len(rows)}
    for key, value in rows[0].items():
        if not isinstance(value, dict):
            out[key] = round(fmean(row[key] for row in rows), 4)
            continue
        right, n = (sum(f(row[key]) for row in rows) for f in (lambda x: x["correct"].count("1"), lambda x: x["n"]))
        low, high = wilson(right, n)
        out[key] = {"pass_at_1": right / n, "low": low, "high": high, "n": n,
                    "by_seed": [round(row[key]["pass_at_1"], 4) for row in rows]}
    return out


def gains(study: Teachers, draws: int = 4000) -> dict[str, dict[str, float]]:
    """Of each signal, the share of the same-tokenizer gain over the cold start that it keeps; a paired bootstrap."""
    rng = np.random.default_rng(0)
    worlds = sorted({name.partition("/")[0] for name in study.rows if name.startswith("cross-")})
    out = {}
    for signal in SIGNALS:
        have = [w for w in worlds if f"{w}/{signal}" in study.rows and f"{w}/same" in study.rows]
        if not have:
            continue
        three = [np.array([[c == "1" for w in have for c in study.rows[f"{w}/{who}"]["held_out"]["correct"]]
                           for who in ("cold", "same", signal)], dtype=float)][0]
        picked = rng.integers(three.shape[1], size=(draws, three.shape[1]))
        cold, same, mine = (x[picked].mean(-1) for x in three)
        kept = (mine - cold) / (same - cold)
        value = (three[2].mean() - three[0].mean()) / (three[1].mean() - three[0].mean())
        out[signal] = {"kept": float(value), "low": float(np.quantile(kept, 0.025)),
                       "high": float(np.quantile(kept, 0.975)), "seeds": len(have)}
    return out


if __name__ == "__main__":
    main()
