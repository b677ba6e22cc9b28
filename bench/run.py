"""Time a distillation step beside TRL's: the same shapes, counts and length distribution, in turn on one machine.

    python bench/run.py W1

In: a workload's id. Out: one JSON object as the last line: id, ours, peer, ratio (peer's seconds over ours) and
memory_ratio (our peak over the peer's), with the machine; also written to bench/results/.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SHARED = Path(os.environ.get("TINYR2_SHARED", HERE.parent.parent / "shared"))
WORKLOADS = {
    "W1": {"new_tokens": 64},
    "W2": {"new_tokens": 512},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("id", choices=WORKLOADS)
    parser.add_argument("--steps", type=int, default=7, help="steps of each process; the first two are not counted")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side, in turn")
    args = parser.parse_args()
    peer = SHARED / "bench" / "peer_trl.py"
    if not peer.is_file():
        sys.exit(f"{peer}: not there; set TINYR2_SHARED to the folder that has bench/peer_trl.py")
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in WORKLOADS[args.id].items()]
    flags.append(f"--steps={args.steps}")
    ours, theirs = [], []
    for _ in range(args.rounds):
        ours.append(one([sys.executable, str(HERE / "distill_step.py"), *flags]))
        theirs.append(one([sys.executable, str(peer), "distill", *flags]))
    report(args.id, ours, theirs)


def one(command: list[str]) -> dict:
    """Run a side in a process of its own; its JSON line."""
    env = os.environ | {"OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-3000:]}")
    found = json.loads(next(line for line in reversed(done.stdout.splitlines()) if '"step_s"' in line))
    print(f"{found.get('peer', 'tinyr2')}: {found['step_s']:.4f} s a step, mean length {found['mean_length']:.1f}, "
          f"{found['peak_mib']} MiB", flush=True)
    return found


def report(name: str, ours: list[dict], theirs: list[dict]) -> None:
    from tinyr2.recipes.machine import describe_machine

    def median(side: list[dict], key: str) -> float:
        return statistics.median(s[key] for s in side)

    result = {
        "id": name, "ours": median(ours, "step_s"), "peer": median(theirs, "step_s"),
        "ratio": round(median(theirs, "step_s") / median(ours, "step_s"), 3),
        "memory_ratio": round(median(ours, "peak_mib") / median(theirs, "peak_mib"), 3),
        "ours_peak_mib": median(ours, "peak_mib"), "peer_peak_mib": median(theirs, "peak_mib"),
        "ours_mean_length": median(ours, "mean_length"), "peer_mean_length": median(theirs, "mean_length"),
        "ours_steps_s": [s["steps_s"] for s in ours], "peer_steps_s": [s["steps_s"] for s in theirs],
        "machine": describe_machine(Path(__file__).parent),
    }
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
