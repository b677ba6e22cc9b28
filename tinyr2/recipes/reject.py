"""Rejection sampling: a model answers each problem several times, and of its right answers some are kept.

In: a model, problems, rewards. Out: a run folder with `data.jsonl`, worked problems ready for `tinyr2 sft`, and, where
asked for, `pairs.jsonl`, a right and a wrong answer to one problem, for reward models and DPO. After Yuan et al. 2023
(2308.01825), Section 3.3, and DeepSeek-R1 (2501.12948), Section 2.3.3.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from tinyr2.core.config import nearest
from tinyr2.core.errors import DataError, RunError
from tinyr2.core.files import write_atomic
from tinyr2.core.rng import derive, permutation
from tinyr2.core.types import Message, Problem, Rollout
from tinyr2.data.problems import fingerprint as data_fingerprint
from tinyr2.models.load import ModelConfig, load_model, load_tokenizer, pick_device
from tinyr2.recipes import setup
from tinyr2.recipes.mix import DATA, Sources, load_all, row_of, turns, write_rows
from tinyr2.recipes.run import Run, identity, open_run, refuse_own_input, refuse_taken
from tinyr2.recipes.show import completions_of
from tinyr2.report.console import Console
from tinyr2.rewards.grade import RewardConfig, RewardFunction, grade, load_rewards
from tinyr2.rollouts.sample import Policy, sample
from tinyr2.rollouts.sampling import SamplingConfig
from tinyr2.train.loop import StepResult
from tinyr2.train.metrics import completion_metrics, reward_metrics

PAIRS = "pairs.jsonl"


class RejectConfig(SamplingConfig):
    """Which model answers what, and which of its answers are kept."""

    model: ModelConfig
    data: Sources
    rewards: tuple[RewardConfig, ...] = Field((RewardConfig(name="exact_answer"),), min_length=1)
    num_generations: int = Field(4, ge=1)  # answers to each problem
    temperature: float = Field(0.8, gt=0.0)
    threshold: float = 1.0  # an answer is right from this weighted sum of the rewards on
    require: dict[str, float] = {}  # by reward: what a kept answer has of it at least; its weight may be 0
    max_tokens: int | None = Field(None, ge=1)  # of a kept answer; None: any that came to its end
    keep: int = Field(1, ge=1)  # right answers to a problem, all different
    prefer: Literal["shortest", "longest", "random"] = "shortest"
    pairs: bool = False  # also up to `keep` pairs of a right and a wrong answer to a problem
    problems_per_chunk: int = Field(64, ge=1)  # a kill loses a chunk
    max_rows: int = Field(256, ge=1)  # decoded side by side
    num_threads: int = Field(0, ge=0)  # CPU threads; 0: torch's own choice
    seed: int = 0
    device: str = "auto"
    output_dir: str

    @model_validator(mode="after")
    def _choices_fit(self) -> "RejectConfig":
        names = [r.name or r.function for r in self.rewards]
        for name in self.require:
            if name not in names:
                hint = nearest(name, names)
                raise ValueError(f"require.{name}: no reward of that name; "
                                 f"{f'did you mean {hint!r}? ' if hint else ''}there are {', '.join(names)}")
        if not any(r.weight for r in self.rewards):
            raise ValueError("rewards: every weight is 0, so no answer is right or wrong; give one a weight")
        if self.pairs and self.num_generations < 2:
            raise ValueError("pairs: a pair has two answers to one problem; set num_generations to 2 or more")
        return self


@dataclass(frozen=True)
class Judged:
    """One answer, and whether it is right."""

    rollout: Rollout
    right: bool | None  # None: nobody could decide
    good: bool  # came to its end, is not blank, and meets every requirement


def reject(config: RejectConfig, console: Console, *, resume: bool = False, overwrite: bool = False) -> dict:
    """Run it; returns what was kept. One seed gives the same rows. DataError where nothing could be kept."""
    refuse_taken(Path(config.output_dir), resume=resume, overwrite=overwrite)
    if overwrite:
        refuse_own_input(Path(config.output_dir), [config.model.path, *(s.path for s in config.data if s.path)])
    problems = load_all(config.data)
    rewards = load_rewards(config.rewards, max_completion_length=config.max_completion_length)
    tokenizer = load_tokenizer(config.model)
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    model = load_model(config.model, pick_device(config.device))
    size = model.config.get_text_config().vocab_size
    policy = setup.policy_of(model, tokenizer, setup.shared_vocabulary(size, size, tokenizer))
    chunks = [problems[i:i + config.problems_per_chunk] for i in range(0, len(problems), config.problems_per_chunk)]
    with open_run(config, "reject", console, total=len(chunks), resume=resume, overwrite=overwrite,
                  show=lambda step, result: completions_of(step, result, tokenizer)) as run:
        parts = _parts_folder(run, config, problems)
        run.rewind({})  # rows of a chunk that is there are written again, from its part
        done = []
        for i, chunk in enumerate(chunks):
            part = _read_part(parts, i) or _write_part(parts, i, _chunk(run, config, policy, rewards, (i, chunk)))
            tokens = sum(p["counts"]["num_generated_tokens"] for p in done) + part["counts"]["num_generated_tokens"]
            run.record({"step": i + 1, **part["metrics"], "num_generated_tokens": tokens},
                       {"step": i + 1, "step_s": part["seconds"]}, [])
            done.append(part)
        return _joined(run, config, done)


def choose(group: Sequence[Judged], config: RejectConfig) -> list[Rollout]:
    """Of the answers to one problem those to keep: right, good, and no two alike."""
    different: dict[str, Rollout] = {}
    for judged in group:
        if judged.right and judged.good:
            different.setdefault(judged.rollout.text.strip(), judged.rollout)
    found = list(different.values())
    if config.prefer == "random":
        found = _shuffled(found, config.seed, "right")
    else:
        sign = 1 if config.prefer == "shortest" else -1
        found.sort(key=lambda r: sign * len(r.response_ids))  # stable: the earlier of two equally long ones
    return found[:config.keep]


def pair(group: Sequence[Judged], config: RejectConfig) -> list[tuple[Rollout, Rollout]]:
    """(right, wrong) answers to one problem: the right ones as `choose` has them, the wrong ones drawn by the seed."""
    wrong: dict[str, Rollout] = {}
    for judged in group:
        r = judged.rollout
        if judged.right is False and r.finish == "stop" and r.text.strip():
            wrong.setdefault(r.text.strip(), r)
    return list(zip(choose(group, config), _shuffled(list(wrong.values()), config.seed, "wrong"), strict=False))


def judge(rollout: Rollout, rewards: Sequence[RewardFunction], config: RejectConfig) -> Judged:
    """Whether a graded answer is right, by the rewards that have a weight, and whether it is good."""
    parts = rollout.reward_parts
    counted = [r.weight * parts[r.name] for r in rewards if r.weight and parts.get(r.name) is not None]
    right = sum(counted) >= config.threshold if counted and rollout.error is None else None
    # a reward without a word on an answer (it is for other tasks) requires nothing of it
    met = all(parts[name] >= least for name, least in config.require.items() if parts.get(name) is not None)
    short = config.max_tokens is None or len(rollout.response_ids) <= config.max_tokens
    return Judged(rollout, right, good=rollout.finish == "stop" and bool(rollout.text.strip()) and met and short)


def _shuffled(rollouts: list[Rollout], seed: int, what: str) -> list[Rollout]:
    if not rollouts:
        return []
    return [rollouts[i] for i in permutation(len(rollouts), seed, what, rollouts[0].problem.id)]


def _chunk(run: Run, config: RejectConfig, policy: Policy, rewards: Sequence[RewardFunction],
           numbered: tuple[int, Sequence[Problem]]) -> dict[str, Any]:
    """Answer, grade and choose; all that the part of a chunk holds."""
    start, (i, problems) = time.perf_counter(), numbered
    rollouts = grade(sample(policy, problems, n=config.num_generations, sampling=config,
                            seed=derive(config.seed, "reject"), max_rows=config.max_rows), rewards)
    judged = [judge(r, rewards, config) for r in rollouts]
    if not any(j.right is not None for j in judged):
        errors = list(dict.fromkeys(r.error for r in rollouts if r.error))
        raise DataError(f"no answer of chunk {i + 1} could be graded: {'; '.join(errors) or 'no gold answers'}; mend "
                        "the reward function, or name the column that holds the answer")
    groups = [judged[g:g + config.num_generations] for g in range(0, len(judged), config.num_generations)]
    chosen = [choose(group, config) for group in groups]
    pairs = [found for group in groups for found in pair(group, config)] if config.pairs else []
    tokens = sum(len(r.response_ids) for r in rollouts)
    metrics = {**reward_metrics(rollouts), **completion_metrics(rollouts)}
    run.completions(i + 1, StepResult(metrics=metrics, num_tokens=tokens, rollouts=rollouts))
    return {"rows": [row_of(r.problem, [Message("assistant", r.text)]) for kept in chosen for r in kept],
            "pairs": [_pair_row(*found) for found in pairs], "metrics": metrics,
            "counts": {"problems": len(problems), "solved": sum(bool(kept) for kept in chosen),
                       "answers": len(judged), "right": sum(j.right is True for j in judged),
                       "undecided": sum(j.right is None for j in judged), "num_generated_tokens": tokens},
            "seconds": time.perf_counter() - start}


def _pair_row(right: Rollout, wrong: Rollout) -> dict[str, Any]:
    problem = right.problem
    return {"task": problem.task, **problem.columns, "answer": problem.answer, "prompt": turns(problem.messages),
            "chosen": turns([Message("assistant", right.text)]), "rejected": turns([Message("assistant", wrong.text)])}


def _parts_folder(run: Run, config: RejectConfig, problems: Sequence[Problem]) -> Path:
    """Where the finished chunks lie; RunError where they come from another model, data or reward file."""
    files = [r.file for r in config.rewards if r.file]
    facts = {"config": identity(config), "data": data_fingerprint(problems),
             "model": setup.model_fingerprint(config.model.path), "rewards": setup.code_fingerprint(files)}
    folder = run.folder / "parts"
    folder.mkdir(exist_ok=True)
    path = folder / "made_of.json"
    before: Mapping[str, str] = json.loads(path.read_text()) if path.is_file() else facts
    changed = [name for name in facts if before.get(name) != facts[name]]
    if changed:
        raise RunError(f"{run.folder}: begun with another {' and another '.join(changed)}, so what it holds does not "
                       "fit what would follow; delete the folder, or give another output_dir")
    write_atomic(path, json.dumps(facts) + "\n")
    return folder


def _part_path(folder: Path, i: int) -> Path:
    return folder / f"part-{i:05d}.json"


def _read_part(folder: Path, i: int) -> dict[str, Any] | None:
    path = _part_path(folder, i)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _write_part(folder: Path, i: int, part: dict[str, Any]) -> dict[str, Any]:
    write_atomic(_part_path(folder, i), json.dumps(part) + "\n")
    return part


def _joined(run: Run, config: RejectConfig, parts: Sequence[Mapping[str, Any]]) -> dict:
    """Write the rows of all parts; returns, and leaves as result.json, what they come to."""
    rows, pairs = ([row for part in parts for row in part[name]] for name in ("rows", "pairs"))
    counts = {name: sum(part["counts"][name] for part in parts) for name in parts[0]["counts"]}
    if not rows or (config.pairs and not pairs):
        what = "answer was right, whole and as required" if not rows else "problem had a right and a wrong answer"
        raise DataError(f"{config.model.path}: among {counts['answers']:,} answers to {counts['problems']:,} problems "
                        f"no {what}; train the model further, or raise num_generations or temperature")
    write_rows(run.folder / DATA, rows)
    if config.pairs:
        write_rows(run.folder / PAIRS, pairs)
    result = {**counts, "kept": len(rows), "pairs": len(pairs),
              "pass_rate": counts["right"] / max(1, counts["answers"] - counts["undecided"]),
              "seconds": sum(part["seconds"] for part in parts)}
    write_atomic(run.folder / "result.json", json.dumps(result, indent=2) + "\n")
    run.console.note(f"kept {len(rows):,} answers to {counts['solved']:,} of {counts['problems']:,} problems"
                     + (f", {len(pairs):,} pairs" if config.pairs else "")
                     + f"; {result['pass_rate']:.1%} of what was sampled is right")
    report = run.finish("finished")
    return {"ending": "finished", "step": len(parts), "run": str(run.folder), "data": str(run.folder / DATA),
            "report": str(report), **result}
