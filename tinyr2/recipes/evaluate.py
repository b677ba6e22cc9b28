"""`tinyr2 eval`: how often a model is right on a dataset.

In: a model, a dataset, rewards. Out: a table with intervals, and the figures as JSON.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinyr2.core.config import Config
from tinyr2.core.errors import ConfigError, DataError
from tinyr2.core.files import write_atomic
from tinyr2.data.problems import DataConfig, load_problems
from tinyr2.eval.intervals import Estimate
from tinyr2.eval.suite import EvalConfig, EvalResult, evaluate
from tinyr2.models.load import ModelConfig, count_parameters, load_config, load_model, load_tokenizer, pick_device
from tinyr2.recipes.check_rewards import lacks
from tinyr2.recipes.setup import policy_of, shared_vocabulary
from tinyr2.report.console import Console
from tinyr2.report.table import result_table
from tinyr2.rewards.grade import RewardConfig, load_rewards
from tinyr2.rewards.named import needs


class EvaluateConfig(Config):
    """Everything that `tinyr2 eval` can be told."""

    model: ModelConfig
    data: DataConfig
    rewards: tuple[RewardConfig, ...] = (RewardConfig(name="exact_answer"),)
    eval: EvalConfig = EvalConfig()
    device: str = "auto"


def evaluate_model(config: EvaluateConfig, console: Console, *, out: Path | None = None) -> dict:
    """Run it, print the table, write the JSON to `out` where one is given; returns what `--json` prints."""
    if out is not None:
        _check_writable(out)
    device = pick_device(config.device)
    tokenizer, settings = load_tokenizer(config.model), load_config(config.model)
    problems = load_problems(config.data)
    _check_answers(config, problems)
    rewards = load_rewards(config.rewards, max_completion_length=config.eval.max_completion_length)
    size = settings.get_text_config().vocab_size
    vocab = shared_vocabulary(size, size, tokenizer)
    console.note(f"{config.model.path} on {config.data.source}, {len(problems):,} problems, {device}")
    model = load_model(config.model, device)
    result = evaluate(policy_of(model, tokenizer, vocab), problems, rewards, config.eval)
    row = {"model": config.model.path, "data": config.data.source, "params": count_parameters(model)[0],
           **result.to_dict()}
    console.table(result_table(_rows(result), title=f"{config.model.path} on {config.data.source}"))
    console.note(_remarks(result))
    for error in result.errors:
        console.note(f"not graded: {error}")
    if out is not None:
        write_atomic(out, json.dumps(row | {"config": config.model_dump(mode="json")}, indent=2) + "\n")
        console.note(f"written to {out}")
    return row


def _check_answers(config: EvaluateConfig, problems: list) -> None:
    """Without one gold answer, a reward that compares can decide nothing: say so before any compute."""
    wanted = [needs(r.name, r.options) if r.name is not None else () for r in config.rewards]
    blind = [next((n for n in some if all(lacks(p, n) for p in problems)), None) for some in wanted]
    if None in blind:
        return
    if blind[0] != "answer":
        raise DataError(f"{config.data.source}: no row has a column `{blind[0]}`, which {config.rewards[0].name} needs;"
                        " fill it in, measure on --task countdown, or take another reward")
    raise DataError(f"{config.data.source}: no row has an answer to compare with; name the column with --column "
                    "answer=theirs, or grade with a function of your own: --reward file.py:function")


def _rows(result: EvalResult) -> dict[str, Mapping[str, Any]]:
    """A row for each figure: pass@k, maj@k."""
    found = {f"pass@{k}": estimate for k, estimate in result.pass_at.items()}
    found |= {f"maj@{k}": estimate for k, estimate in result.maj_at.items()}
    return {name: _row(estimate) for name, estimate in found.items()}


def _row(estimate: Estimate | None) -> dict[str, Any]:
    if estimate is None:
        return {"share": None, "low": None, "high": None, "n": 0}
    return {"share": f"{estimate.value:.1%}", "low": estimate.low, "high": estimate.high, "n": estimate.n}


def _remarks(result: EvalResult) -> str:
    undecided = f", {result.undecided:,} answers without a verdict" if result.undecided else ""
    return (f"mean length {result.mean_length:.1f} tokens, {result.clipped_ratio:.1%} cut off at the limit{undecided}, "
            f"{result.seconds:.1f} s, {result.tokens_per_s:,.0f} tokens/s")


def _check_writable(out: Path) -> None:
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise ConfigError(f"--out {out}: not a file that can be written; give a file in a folder that is there")
