"""What the recipe tests share: runs of a few steps in the small world of the kill tests, and curves to compare with."""

import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.recipes import killing
from tinyr2.core.config import apply, build
from tinyr2.recipes.distill import distill
from tinyr2.recipes.distill_config import DistillConfig
from tinyr2.recipes.reinforce import ReinforceConfig, reinforce
from tinyr2.recipes.run import Run
from tinyr2.recipes.sft import SftConfig, sft
from tinyr2.report.console import Console
from tinyr2.report.jsonl import read_jsonl
from tinyr2.train.loop import StepResult

GOLDEN = Path(__file__).parents[1] / "golden"
Settings = SftConfig | DistillConfig | ReinforceConfig
VERBS = {"sft": (SftConfig, sft), "distill": (DistillConfig, distill), "reinforce": (ReinforceConfig, reinforce)}


@dataclass(frozen=True)
class Outcome:
    """A run and what it did."""

    config: Settings
    folder: Path
    result: dict  # what --json prints
    steps: list[StepResult]
    said: str  # on the console

    @property
    def rows(self) -> list[dict]:
        """metrics.jsonl"""
        return read_jsonl(self.folder / "metrics.jsonl")

    def column(self, name: str) -> list[float]:
        return [row[name] for row in self.rows]


def make_world(folder: Path) -> Path:
    """Problems, a student, a teacher, and a reward that tells answers apart: the share of digits."""
    killing.make_world(folder)
    (folder / "rewards.py").write_text(
        "def digits(completions, **kwargs):\n"
        "    return [sum(c.isdigit() for c in turns[0]['content']) / 12 for turns in completions]\n\n\n"
        "def broken(completions, **kwargs):\n    raise ValueError('no verdict')\n")
    return folder


def settings(verb: str, world: Path, out: Path, *overrides: str) -> Settings:
    """Three steps without evaluation; `overrides` as on the command line, with {world} for the world's folder."""
    raw = {"data": {"path": str(world / "data.jsonl")}, "device": "cpu", "output_dir": str(out),
           "train": {"learning_rate": 3e-3, "max_steps": 3, "log_completions_steps": 1, "num_threads": 1}}
    if verb == "sft":
        raw |= {"model": {"path": str(world / "student")}, "examples_per_step": 6}
    else:
        raw |= {"rollout": {"prompts_per_step": 4, "max_completion_length": 12}}
    if verb == "distill":
        raw |= {"student": {"path": str(world / "student")}, "teacher": {"path": str(world / "teacher")}}
    if verb == "reinforce":
        raw["rollout"]["num_generations"] = 4
        raw |= {"model": {"path": str(world / "student")},
                "rewards": [{"file": str(world / "rewards.py"), "function": "digits"}]}
    raw = apply(raw, [text.replace("{world}", str(world)) for text in overrides])
    return build(VERBS[verb][0], raw, verb)


def go(config: Settings, **options: bool) -> Outcome:
    """Run it in this process."""
    stream, steps = io.StringIO(), []
    record = Run.completions

    def note(self: Run, step: int, result: StepResult) -> None:
        steps.append(result)
        record(self, step, result)

    with pytest.MonkeyPatch.context() as patch, torch_as_it_was():
        patch.setattr(Run, "completions", note)
        recipe = next(recipe for kind, recipe in VERBS.values() if isinstance(config, kind))
        result = recipe(config, Console(plain=True, stream=stream), **options)
    return Outcome(config, Path(config.output_dir), result, steps, stream.getvalue())


@contextmanager
def torch_as_it_was() -> Iterator[None]:
    """A run chooses threads and kernels for its process; the tests after it have their own."""
    threads, exact = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(exact)


def compare_with_golden(name: str, losses: list[float]) -> None:
    """`losses` against tests/golden/<name>.json; TINYR2_WRITE_GOLDEN=1 writes that file anew instead.

    On one machine the curve repeats to the bit. Other processors sum in another order: with torch's kernels and MKL
    held to SSE or AVX2, these curves differ from AVX-512's by 2e-6 at most. 1e-4 is far above that, and far below what
    a changed formula, seed or schedule does.
    """
    path = GOLDEN / f"{name}.json"
    if os.environ.get("TINYR2_WRITE_GOLDEN") == "1":
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"loss": losses}, indent=1) + "\n")
    assert losses == pytest.approx(json.loads(path.read_text())["loss"], rel=1e-4)
