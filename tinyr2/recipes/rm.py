"""`algorithm: rm`: a reward model, from pairs of which one answer was preferred (Bradley and Terry 1952).

In: a config. Out: a run folder whose `final/` is a plain Hugging Face folder for `AutoModelForSequenceClassification`.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from tinyr2.core.packing import pack, split
from tinyr2.core.types import Batch, Rollout
from tinyr2.data.pairs import Pair
from tinyr2.data.problems import draw
from tinyr2.models.packed import hidden_states
from tinyr2.models.scalar import load_scalar, pooling_pad, save_scalar, scalars
from tinyr2.objectives.preference import bradley_terry
from tinyr2.recipes import setup
from tinyr2.recipes.findings import Finding, Reader, Setup
from tinyr2.recipes.preference import (
    Found,
    Inputs,
    PreferenceConfig,
    accuracy,
    answers,
    by_pair,
    checked,
    held_out_figures,
    paths_read,
    read,
    remembered,
)
from tinyr2.recipes.run import open_run, refuse_own_input, refuse_taken
from tinyr2.report.console import Console
from tinyr2.train.loop import StepResult
from tinyr2.train.step import Learner


class RewardModelConfig(PreferenceConfig):
    """Everything that `algorithm: rm` can be told; names are TRL's."""

    algorithm: Literal["rm"] = "rm"
    center_rewards_coefficient: float = Field(0.0, ge=0)  # holds scores around 0; 0.01 is usual
    use_margin: bool = False  # ask for a difference of the pair's margin, not just for the right order

    @model_validator(mode="after")
    def _whole(self) -> "RewardModelConfig":
        if self.model.lora is not None:
            raise ValueError("model.lora: a reward model is trained whole; set it to null")
        return self


def read_setup(config: RewardModelConfig) -> Setup:
    """Tokenizer, model config and pairs; what cannot be read is a fault in the setup."""
    return _read(config).setup


def rm(config: RewardModelConfig, console: Console, *, resume: bool = False, overwrite: bool = False) -> dict:
    """Run it; returns what `--json` prints."""
    folder = Path(config.output_dir)
    refuse_taken(folder, resume=resume, overwrite=overwrite)
    if overwrite:
        refuse_own_input(folder, paths_read(config))
    inputs = checked(_read(config), console)
    device = setup.choose_device(config.device, config.train)
    # before the folder is made: weights that cannot be read leave no run behind
    model = load_scalar(config.model, device).requires_grad_(True).train()
    with open_run(config, "rm", console, total=config.train.max_steps, resume=resume, overwrite=overwrite) as run:
        state = setup.restore(run, model, config.train, inputs.facts(config), resume)
        work = RewardTuning(config, inputs, setup.learner_of(model, inputs.vocab, device, config.train))
        return setup.carry_out(run, work, state, train_config=config.train, evaluates=bool(inputs.held_out),
                               save=partial(save_scalar, model, inputs.tokenizer))


@dataclass(frozen=True)
class PairScores:
    """What the forward saw, detached: one score for each answer of P pairs, in no order that matters."""

    chosen: Tensor  # (P,)
    rejected: Tensor  # (P,)
    loss: float


@dataclass(frozen=True)
class RewardTuning:
    """The steps of one run: step t reads the pairs that follow from t."""

    config: RewardModelConfig
    inputs: Inputs
    learner: Learner

    def step(self, t: int) -> StepResult:
        """Leave the gradient of step `t` (0-based) on the model."""
        start = time.perf_counter()
        pairs = draw(self.inputs.pairs, self.config.pairs_per_step, t, self.config.train.seed)
        rollouts = remembered(self._known, pairs, self._rendered)
        scores = self._accumulate(pairs, rollouts)
        return StepResult(metrics=_metrics(scores),
                          num_tokens=sum(len(r.prompt_ids) + len(r.response_ids) for r in rollouts),
                          seconds={"learn_s": time.perf_counter() - start})

    @torch.no_grad()
    def evaluate(self, step: int) -> dict[str, float]:
        """The loss of the held-out pairs, and how many of them the model puts in the right order."""
        scores = self._accumulate(self.inputs.held_out, self._held_out)
        return held_out_figures(scores.chosen, scores.rejected, scores.loss)

    def _accumulate(self, pairs: Sequence[Pair], rollouts: list[Rollout]) -> PairScores:
        """Add the gradient of the pairs' loss to the parameters, micro-batch by micro-batch."""
        device = next(self.learner.model.parameters()).device
        seen, loss = [], 0.0
        for some in split(rollouts, self.learner.tokens_per_micro_batch, keep_groups=True):
            with self.learner.autocast():
                scores = last_scores(self.learner, pack(some, device))
            chosen, rejected = by_pair(scores)
            margin = chosen.new_tensor([self._margin(pairs[r.group]) for r in some[::2]])
            part = bradley_terry(chosen, rejected, margin=margin, center=self.config.center_rewards_coefficient,
                                 denom=len(pairs))
            if part.requires_grad:
                part.backward()
            seen.append(scores.detach())
            loss += float(part.detach())
        return PairScores(*by_pair(torch.cat(seen)), loss)

    def _margin(self, pair: Pair) -> float:
        return pair.margin if self.config.use_margin else 0.0

    @cached_property
    def _known(self) -> dict[str, list[Rollout]]:
        return {}

    @cached_property
    def _held_out(self) -> list[Rollout]:
        return self._rendered(self.inputs.held_out)

    def _rendered(self, pairs: Sequence[Pair]) -> list[Rollout]:
        return answers(pairs, self.inputs.tokenizer)


def last_scores(learner: Learner, batch: Batch) -> Tensor:
    """(B,) each row's score, read at its last token."""
    states = hidden_states(learner.model, batch.tokens, batch.position, batch.lengths,
                           gradient_checkpointing=learner.gradient_checkpointing)
    ends = torch.tensor(batch.lengths).cumsum(0) - 1
    return scalars(learner.model, states[ends.to(states.device)])


def _metrics(scores: PairScores) -> dict[str, float]:
    every = torch.cat([scores.chosen, scores.rejected])
    return {"loss": scores.loss, "accuracy": accuracy(scores.chosen, scores.rejected),
            "margin": float((scores.chosen - scores.rejected).mean()), "min_reward": float(every.min()),
            "mean_reward": float(every.mean()), "max_reward": float(every.max())}


def _read(config: RewardModelConfig) -> Found:
    found, reader = read(config), Reader()
    if (tokenizer := found.setup.student.tokenizer) is not None:
        reader.read("model.pad", lambda: pooling_pad(tokenizer))
    for key, pairs in (("data", found.pairs), ("eval_data", found.held_out)) if config.use_margin else ():
        if lacking := sum(p.margin is None for p in pairs):
            reader.faults.append(Finding("fault", f"{key}.margin", f"use_margin, and {lacking:,} of {len(pairs):,} "
                                         "pairs have no margin", "fill in the column `margin`, name it with "
                                         f"{key}.columns={{margin: its_name}}, or set use_margin to false"))
    return found.with_findings(reader.faults)
