"""Answers that become data: written chunk by chunk, graded, and the best of them chosen.

In: problems, something that writes n answers to each, rewards. Out: for each chunk a part: rows for `tinyr2 sft`, pairs
for reward models, counts. A part is a file that stands whole or not at all: a kill loses a chunk and changes nothing.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from tinyr2.core.config import nearest
from tinyr2.core.errors import DataError, RunError
from tinyr2.core.files import write_atomic
from tinyr2.core.rng import permutation
from tinyr2.core.types import Message, Problem, Rollout
from tinyr2.recipes.mix import row_of, turns
from tinyr2.recipes.run import Run
from tinyr2.rewards.grade import RewardConfig, RewardFunction, grade
from tinyr2.rollouts.sampling import SamplingConfig
from tinyr2.train.loop import StepResult
from tinyr2.train.metrics import completion_metrics, reward_metrics

Write = Callable[[Sequence[Problem]], list[Rollout]]  # the answers to each problem, problem by problem


class AnswersConfig(SamplingConfig):
    """How many answers there are to a problem, and which of them are kept."""

    num_generations: int = Field(4, ge=1)  # answers to each problem
    temperature: float = Field(0.8, gt=0.0)
    threshold: float = 1.0  # an answer is right from this weighted sum of the rewards on
    require: dict[str, float] = {}  # by reward: what a kept answer has of it at least; its weight may be 0
    max_tokens: int | None = Field(None, ge=1)  # of a kept answer; None: any that came to its end
    keep: int = Field(1, ge=1)  # right answers to a problem, all different
    prefer: Literal["shortest", "longest", "random", "best"] = "shortest"  # best: of the highest reward
    problems_per_chunk: int = Field(64, ge=1)  # a kill loses a chunk
    max_rows: int = Field(256, ge=1)  # decoded side by side


def check_choices(config: AnswersConfig, rewards: Sequence[RewardConfig]) -> None:
    """ValueError where no reward can say what `config` asks of an answer."""
    names = [r.name or r.function for r in rewards]
    for name in config.require:
        if name not in names:
            hint = nearest(name, names)
            raise ValueError(f"require.{name}: no reward of that name; "
                             f"{f'did you mean {hint!r}? ' if hint else ''}there are {', '.join(names) or 'none'}")
    if rewards and not any(r.weight for r in rewards):
        raise ValueError("rewards: every weight is 0, so no answer is right or wrong; give one a weight")


@dataclass(frozen=True)
class Judged:
    """One answer, and whether it is right."""

    rollout: Rollout
    right: bool | None  # None: nobody could decide
    good: bool  # came to its end, is not blank or too long, and meets every requirement
    tokens: int | None  # of its text, as who learns from it counts; None: that one cannot read it whole


def own_tokens(rollout: Rollout) -> int:
    """The tokens of an answer, as its writer counts."""
    return len(rollout.response_ids)


@dataclass(frozen=True, kw_only=True)
class Answering:
    """Who writes, who grades, and what is kept."""

    config: AnswersConfig
    write: Callable[[], Write]  # called once, when the first chunk has to be written: what it loads may be large
    rewards: Sequence[RewardFunction]
    seed: int  # of random choices
    pairs: bool = False  # also up to `keep` pairs of a right and a wrong answer to a problem
    measure: Callable[[Rollout], int | None] = own_tokens  # gives `Judged.tokens`


def judge(rollout: Rollout, work: Answering) -> Judged:
    """Whether a graded answer is right, by the rewards that have a weight, and whether it is good.

    Without rewards every answer is right that came to its end and is not blank.
    """
    parts, config = rollout.reward_parts, work.config
    counted = [r.weight * parts[r.name] for r in work.rewards if r.weight and parts.get(r.name) is not None]
    # a reward without a word on an answer (it is for other tasks) requires nothing of it
    met = all(parts[name] >= least for name, least in config.require.items() if parts.get(name) is not None)
    whole = rollout.finish == "stop" and rollout.error is None and bool(rollout.text.strip())
    right = None
    if rollout.error is None and (counted or not work.rewards):
        right = sum(counted) >= config.threshold if work.rewards else whole
    tokens = work.measure(rollout) if whole else None
    short = tokens is not None and (config.max_tokens is None or tokens <= config.max_tokens)
    return Judged(rollout, right, good=whole and met and short, tokens=tokens)


def choose(group: Sequence[Judged], config: AnswersConfig, seed: int) -> list[Rollout]:
    """Of the answers to one problem those to keep: right, good, and no two alike."""
    different: dict[str, Judged] = {}
    for judged in group:
        if judged.right and judged.good:
            different.setdefault(judged.rollout.text.strip(), judged)
    found = list(different.values())
    if config.prefer == "random":
        return _shuffled([j.rollout for j in found], seed, "right")[:config.keep]
    if config.prefer == "best":  # the shorter of two equally good ones
        found.sort(key=lambda j: (-(j.rollout.reward or 0.0), j.tokens))
    else:
        sign = 1 if config.prefer == "shortest" else -1
        found.sort(key=lambda j: sign * j.tokens)  # stable: the earlier of two equally long ones
    return [j.rollout for j in found[:config.keep]]


def pair(group: Sequence[Judged], config: AnswersConfig, seed: int) -> list[tuple[Rollout, Rollout]]:
    """(right, wrong) answers to one problem: the right ones as `choose` has them, the wrong ones drawn by the seed."""
    wrong: dict[str, Rollout] = {}
    for judged in group:
        r = judged.rollout
        if judged.right is False and r.finish == "stop" and r.text.strip():
            wrong.setdefault(r.text.strip(), r)
    return list(zip(choose(group, config, seed), _shuffled(list(wrong.values()), seed, "wrong"), strict=False))


def answered(run: Run, work: Answering, problems: Sequence[Problem],
             facts: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """The part of each chunk of the problems, in order: read where it is there, else written.

    facts: what the parts are made of, by name. RunError where those that are there come from something else, DataError
    where no answer of a chunk could be graded.
    """
    parts, size, write = _parts_folder(run, facts), work.config.problems_per_chunk, None
    for i, first in enumerate(range(0, len(problems), size)):
        path = parts / f"part-{i:05d}.json"
        if path.is_file():
            yield json.loads(path.read_text(encoding="utf-8"))
            continue
        write = write or work.write()
        part = _chunk(run, work, write, (i, problems[first:first + size]))
        write_atomic(path, json.dumps(part) + "\n")
        yield part


def chunks(problems: Sequence[Problem], config: AnswersConfig) -> int:
    """How many parts there will be."""
    return -(-len(problems) // config.problems_per_chunk)


def joined(parts: Sequence[Mapping[str, Any]], author: str, *, pairs: bool = False) -> dict[str, Any]:
    """`rows`, `pairs` and summed `counts` of all parts; DataError, which names the author, where nothing was kept."""
    out = {name: [row for part in parts for row in part[name]] for name in ("rows", "pairs")}
    counts = {name: sum(part["counts"][name] for part in parts) for name in parts[0]["counts"]}
    if not out["rows"] or (pairs and not out["pairs"]):
        what = "problem had a right and a wrong answer" if out["rows"] else "answer was right, whole and as required"
        raise DataError(f"{author}: among {counts['answers']:,} answers to {counts['problems']:,} problems no {what}; "
                        "train the model further, or raise num_generations or temperature")
    return out | {"counts": counts}


def _shuffled(rollouts: list[Rollout], seed: int, what: str) -> list[Rollout]:
    if not rollouts:
        return []
    return [rollouts[i] for i in permutation(len(rollouts), seed, what, rollouts[0].problem.id)]


def _chunk(run: Run, work: Answering, write: Write, numbered: tuple[int, Sequence[Problem]]) -> dict[str, Any]:
    """Answer, grade and choose; all that the part of a chunk holds."""
    start, (i, problems), config = time.perf_counter(), numbered, work.config
    rollouts = grade(write(problems), work.rewards)
    judged = [judge(r, work) for r in rollouts]
    if not any(j.right is not None for j in judged):
        errors = list(dict.fromkeys(r.error for r in rollouts if r.error))
        raise DataError(f"no answer of chunk {i + 1} could be graded: {'; '.join(errors) or 'no gold answers'}; mend "
                        "the reward function, or name the column that holds the answer")
    groups: dict[int, list[Judged]] = {}
    for j in judged:
        groups.setdefault(j.rollout.group, []).append(j)
    chosen = [choose(group, config, work.seed) for group in groups.values()]
    pairs = [found for group in groups.values() for found in pair(group, config, work.seed)] if work.pairs else []
    tokens = sum(len(r.response_ids) for r in rollouts)
    metrics = {**reward_metrics(rollouts), **completion_metrics(rollouts)}
    run.completions(i + 1, StepResult(metrics=metrics, num_tokens=tokens, rollouts=rollouts))
    return {"rows": [row_of(r.problem, [Message("assistant", r.text)]) for kept in chosen for r in kept],
            "pairs": [_pair_row(*found) for found in pairs], "metrics": metrics,
            "counts": {"problems": len(problems), "solved": sum(bool(kept) for kept in chosen),
                       "answers": len(judged), "right": sum(j.right is True for j in judged),
                       "undecided": sum(j.right is None for j in judged), "num_generated_tokens": tokens,
                       "too_long": sum(_too_long(j, config) for j in judged)},
            "seconds": time.perf_counter() - start}


def _too_long(judged: Judged, config: AnswersConfig) -> bool:
    """Whether a right answer is more than who learns from it may read."""
    if not judged.right or judged.rollout.finish != "stop" or not judged.rollout.text.strip():
        return False
    return judged.tokens is None or (config.max_tokens is not None and judged.tokens > config.max_tokens)


def _pair_row(right: Rollout, wrong: Rollout) -> dict[str, Any]:
    problem = right.problem
    return {"task": problem.task, **problem.columns, "answer": problem.answer, "prompt": turns(problem.messages),
            "chosen": turns([Message("assistant", right.text)]), "rejected": turns([Message("assistant", wrong.text)])}


def _parts_folder(run: Run, facts: Mapping[str, str]) -> Path:
    """Where the finished chunks lie; RunError where they are made of something else."""
    folder = run.folder / "parts"
    folder.mkdir(exist_ok=True)
    path = folder / "made_of.json"
    before: Mapping[str, str] = json.loads(path.read_text()) if path.is_file() else facts
    changed = [name for name in facts if before.get(name) != facts[name]]
    if changed:
        raise RunError(f"{run.folder}: begun with another {' and another '.join(changed)}, so what it holds does not "
                       "fit what would follow; delete the folder, or give another output_dir")
    write_atomic(path, json.dumps(dict(facts)) + "\n")
    return folder
