"""Time one workload beside its peers: the same shapes, counts and length distribution, in turn on one machine.

    python bench/run.py W2 [--rounds 3] [--steps 7]

In: a workload's id. Out: one JSON object as the last line: id, ours, peer, ratio (the peer's median over ours),
memory_ratio (our peak over the peer's) and the machine; also written to bench/results/. W5 and W5r have two peers:
`peer` is vLLM, in the interpreter that VLLM_PYTHON names (exit code 3 where it names none), and ratio_generate is
against transformers' generate, as is memory_ratio: vLLM's weights and cache live in a process that it does not measure.
W7 and W8 have no peer: `ours` is a share, and both ratios are null.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from sides import HERE, peers_folder

THREADS = 2


@dataclass(frozen=True)
class Workload:
    """One row of the table; every command runs as a process of its own."""

    ours: str  # script and flags
    figure: str  # the key of a side's JSON that is compared
    peers: dict[str, str] = field(default_factory=dict)  # name → script and flags; `ratio` is with the first
    rounds: int = 3
    steps: int | None = None  # of each process, the first two not counted; None: the scripts take no such flag


def _distill(flags: str, **counts: int) -> Workload:
    return Workload(f"distill_step.py {flags}", "step_s", {"trl": f"peer_trl.py distill {flags}"}, **counts)


def _rollouts(flags: str) -> Workload:
    return Workload(f"rollouts.py {flags}", "seconds", {"vllm": f"peer_rollouts.py vllm {flags}",
                                                        "generate": f"peer_rollouts.py generate {flags}"})


_W3 = "--hidden 256 --layers 6 --new-tokens 512"
WORKLOADS = {
    "W1": _distill("--new-tokens 64", steps=7),
    "W2": _distill("--new-tokens 512", steps=7),
    "W3": Workload(f"policy_step.py {_W3}", "step_s", {"trl": f"peer_trl.py grpo {_W3}"}, rounds=2, steps=7),
    "W4": _distill("--hidden 256 --teacher-layers 8 --vocab 151936 --batch 8 --new-tokens 128", rounds=2, steps=5),
    "W5": _rollouts("--lengths equal"),
    "W5r": _rollouts("--lengths ragged"),
    "W6": Workload("mla_step.py", "step_s", {"transformers": "peer_rollouts.py mla"}),
    "W7": Workload("growth.py", "variation", rounds=1, steps=5),
    "W8": Workload("engine_share.py", "share", rounds=1, steps=7),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("id", choices=WORKLOADS)
    parser.add_argument("--steps", type=int, help="steps of each process; the first two are not counted")
    parser.add_argument("--rounds", type=int, help="processes of each side, in turn")
    args = parser.parse_args()
    work = WORKLOADS[args.id]
    if work.steps is None and args.steps is not None:
        parser.error(f"{args.id} has a fixed number of steps")
    steps = args.steps or work.steps
    commands = {"tinyr2": _command("tinyr2", work.ours, steps)}
    commands |= {name: _command(name, line, steps) for name, line in work.peers.items()}
    runs: dict[str, list[dict]] = {name: [] for name in commands}
    for _ in range(args.rounds or work.rounds):
        for name, command in commands.items():
            runs[name].append(_one(name, command, work.figure))
    _report(args.id, work, runs)


def _command(side: str, line: str, steps: int | None) -> list[str]:
    """Interpreter, script and flags; the program ends here where one of them is missing."""
    script, *flags = line.split()
    path = (HERE if side == "tinyr2" else peers_folder()) / script
    if not path.is_file():
        sys.exit(f"{path}: not there; set TINYR2_SHARED to the folder that has bench/{script}")
    python = os.environ.get("VLLM_PYTHON", "") if side == "vllm" else sys.executable
    if not Path(python).is_file():
        print(f"VLLM_PYTHON is {python!r}: name the interpreter that has vLLM; {peers_folder()}/vllm_cpu.sh install "
              "VENV makes one, VENV/bin/python", file=sys.stderr)
        sys.exit(3)
    return [python, str(path), *flags] + ([] if steps is None else [f"--steps={steps}"])


def _one(side: str, command: list[str], figure: str) -> dict:
    """Run a side once; the JSON line it printed."""
    done = subprocess.run(command, capture_output=True, text=True, env=_environment(side))
    found = [line for line in done.stdout.splitlines() if line.startswith("{") and f'"{figure}"' in line]
    if done.returncode or not found:
        sys.exit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-3000:]}")
    result = json.loads(found[-1])
    length = f", mean length {result['mean_length']:.1f}" if "mean_length" in result else ""
    print(f"{side}: {figure} {result[figure]:.4f}{length}, {result['peak_mib']} MiB", flush=True)
    return result


def _environment(side: str) -> dict[str, str]:
    env = os.environ | {"OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if side == "vllm":
        # left alone, vLLM keeps a core free for its scheduler and computes on the other; told its cores, it sets its
        # workers' OMP_NUM_THREADS itself and is faster where nobody else did
        del env["OMP_NUM_THREADS"]
        cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0))[:THREADS])
        env |= {"VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": cores}
    return env


def _report(name: str, work: Workload, runs: dict[str, list[dict]]) -> None:
    from tinyr2.recipes.machine import describe_machine  # late: a side's memory begins as large as its parent's

    def median(side: str, key: str) -> float:
        return statistics.median(run[key] for run in runs[side])

    def ratio(side: str) -> float:
        return round(median(side, work.figure) / median("tinyr2", work.figure), 3)

    first, last = (next(iter(work.peers), None), next(reversed(work.peers), None))
    result = {
        "id": name, "figure": work.figure, "ours": median("tinyr2", work.figure),
        "peer": median(first, work.figure) if first else None, "ratio": ratio(first) if first else None,
        "memory_ratio": round(median("tinyr2", "peak_mib") / median(last, "peak_mib"), 3) if last else None,
    }
    if "generate" in runs:
        result["ratio_generate"] = ratio("generate")
    for key in ("tokens_per_s", "mean_length", "peak_mib", "logits_gap"):
        given = {side: median(side, key) for side in runs if key in runs[side][0]}
        result |= {key: given} if given else {}
    values = {side: [run[work.figure] for run in found] for side, found in runs.items()}
    result |= {"spread": {side: [min(v), max(v)] for side, v in values.items()}, "threads": THREADS, "runs": runs,
               "machine": describe_machine(HERE)}
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
