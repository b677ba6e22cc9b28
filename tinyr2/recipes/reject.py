"""Rejection sampling: a model answers each problem several times, and of its right answers some are kept.

In: a model, problems, rewards. Out: a run folder with `data.jsonl`, worked problems ready for `tinyr2 sft`, and, where
asked for, `pairs.jsonl`, a right and a wrong answer to one problem, for reward models and DPO. After Yuan et al. 2023
(2308.01825), Section 3.3, and DeepSeek-R1 (2501.12948), Section 2.3.3.
"""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator

from tinyr2.core.files import write_atomic
from tinyr2.core.rng import derive
from tinyr2.data.problems import fingerprint as data_fingerprint
from tinyr2.models.load import ModelConfig, load_model, load_tokenizer, pick_device
from tinyr2.recipes import setup
from tinyr2.recipes.answers import Answering, AnswersConfig, answered, check_choices, chunks, joined
from tinyr2.recipes.mix import DATA, Sources, load_all, write_rows
from tinyr2.recipes.run import Run, identity, open_run, refuse_own_input, refuse_taken
from tinyr2.recipes.show import completions_of
from tinyr2.report.console import Console
from tinyr2.rewards.grade import RewardConfig, load_rewards
from tinyr2.rollouts.sample import sample

PAIRS = "pairs.jsonl"


class RejectConfig(AnswersConfig):
    """Which model answers what, and which of its answers are kept."""

    model: ModelConfig
    data: Sources
    rewards: tuple[RewardConfig, ...] = Field((RewardConfig(name="exact_answer"),), min_length=1)
    pairs: bool = False  # also up to `keep` pairs of a right and a wrong answer to a problem
    num_threads: int = Field(0, ge=0)  # CPU threads; 0: torch's own choice
    seed: int = 0
    device: str = "auto"
    output_dir: str

    @model_validator(mode="after")
    def _choices_fit(self) -> "RejectConfig":
        check_choices(self, self.rewards)
        if self.pairs and self.num_generations < 2:
            raise ValueError("pairs: a pair has two answers to one problem; set num_generations to 2 or more")
        return self


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
    write = partial(sample, policy, n=config.num_generations, sampling=config, seed=derive(config.seed, "reject"),
                    max_rows=config.max_rows)
    work = Answering(config=config, write=lambda: write, rewards=rewards, seed=config.seed, pairs=config.pairs)
    facts = {"config": identity(config), "data": data_fingerprint(problems),
             "model": setup.model_fingerprint(config.model.path),
             "rewards": setup.code_fingerprint([r.file for r in config.rewards if r.file])}
    with open_run(config, "reject", console, total=chunks(problems, config), resume=resume, overwrite=overwrite,
                  show=lambda step, result: completions_of(step, result, tokenizer)) as run:
        run.rewind({})  # rows of a chunk that is there are written again, from its part
        parts, tokens = [], 0
        for i, part in enumerate(answered(run, work, problems, facts)):
            tokens += part["counts"]["num_generated_tokens"]
            run.record({"step": i + 1, **part["metrics"], "num_generated_tokens": tokens},
                       {"step": i + 1, "step_s": part["seconds"]}, [])
            parts.append(part)
        return _finish(run, config, parts)


def _finish(run: Run, config: RejectConfig, parts: Sequence[Mapping[str, Any]]) -> dict:
    """Write the rows of all parts; returns, and leaves as result.json, what they come to."""
    found = joined(parts, config.model.path, pairs=config.pairs)
    rows, pairs, counts = found["rows"], found["pairs"], found["counts"]
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
