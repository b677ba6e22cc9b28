"""`algorithm: dpo`: direct preference optimization, on pairs that someone judged before.

In: a config. Out: a run folder whose `final/` is the model as a plain Hugging Face folder.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from tinyr2.core.types import Batch, Rollout
from tinyr2.data.pairs import Pair
from tinyr2.data.problems import draw
from tinyr2.models.head import TokenScores
from tinyr2.models.load import ModelConfig, load_model, save_model
from tinyr2.objectives.preference import dpo_loss
from tinyr2.objectives.rows import repeat, total
from tinyr2.recipes import setup
from tinyr2.recipes.findings import Finding, ModelFiles, Reader, Setup
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
from tinyr2.tokens.chat import vocabulary_faults
from tinyr2.train.loop import StepResult
from tinyr2.train.loss import Objective
from tinyr2.train.metrics import score_metrics
from tinyr2.train.step import Learner, Reading, Scores, accumulate, score


class DpoConfig(PreferenceConfig):
    """Everything that `algorithm: dpo` can be told; names and defaults are TRL's."""

    algorithm: Literal["dpo"] = "dpo"
    reference: ModelConfig | None = None  # the policy that the loss measures from; None: the model as it begins
    beta: float = Field(0.1, gt=0)  # how closely the reference is kept to
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)  # the chance that a pair's sides were swapped


def read_setup(config: DpoConfig) -> Setup:
    """Tokenizer, model configs and pairs; what cannot be read is a fault in the setup."""
    return _read(config).setup


def dpo(config: DpoConfig, console: Console, *, resume: bool = False, overwrite: bool = False) -> dict:
    """Run it; returns what `--json` prints."""
    folder, reference = Path(config.output_dir), _reference(config)
    refuse_taken(folder, resume=resume, overwrite=overwrite)
    if overwrite:
        refuse_own_input(folder, [*paths_read(config), reference.path])
    inputs = checked(_read(config), console)
    device = setup.choose_device(config.device, config.train)
    # before the folder is made: weights that cannot be read, or adapters that fit nothing, leave no run behind
    model = setup.load_student(config.model, device, config.train.seed)
    learners = [setup.learner_of(m, inputs.vocab, device, config.train)
                for m in (model, load_model(reference, device).requires_grad_(False))]
    with open_run(config, "dpo", console, total=config.train.max_steps, resume=resume, overwrite=overwrite) as run:
        facts = inputs.facts(config) | {"reference": setup.model_fingerprint(reference.path)}
        state = setup.restore(run, model, config.train, facts, resume)
        return setup.carry_out(run, PairTuning(config, inputs, *learners), state, train_config=config.train,
                               evaluates=bool(inputs.held_out), save=partial(save_model, model, inputs.tokenizer))


@dataclass(frozen=True)
class PairTuning:
    """The steps of one run: step t reads the pairs that follow from t."""

    config: DpoConfig
    inputs: Inputs
    learner: Learner
    reference: Learner  # never trained

    def step(self, t: int) -> StepResult:
        """Leave the gradient of step `t` (0-based) on the model."""
        start = time.perf_counter()
        pairs = draw(self.inputs.pairs, self.config.pairs_per_step, t, self.config.train.seed)
        rollouts = remembered(self._known, pairs, self._judged)
        referred = time.perf_counter()
        scores = self._accumulate(rollouts)
        return StepResult(metrics=score_metrics(scores) | pair_metrics(scores, self.config.beta), scores=scores,
                          num_tokens=sum(len(r.prompt_ids) + len(r.response_ids) for r in rollouts),
                          seconds={"reference_s": referred - start, "learn_s": time.perf_counter() - referred})

    @torch.no_grad()
    def evaluate(self, step: int) -> dict[str, float]:
        """The loss of the held-out pairs, and how many of them the model puts in the right order."""
        scores = self._accumulate(self._held_out)
        chosen, rejected = by_pair(self.config.beta * log_ratios(scores))
        return held_out_figures(chosen, rejected, scores.loss)

    def _accumulate(self, rollouts: list[Rollout]) -> Scores:
        objective = partial(preference, beta=self.config.beta, label_smoothing=self.config.label_smoothing,
                            denom=len(rollouts) // 2)
        return accumulate(self.learner, rollouts, objective, Reading(score_first=True, keep_groups=True))

    @cached_property
    def _known(self) -> dict[str, list[Rollout]]:
        return {}

    @cached_property
    def _held_out(self) -> list[Rollout]:
        return self._judged(self.inputs.held_out)

    def _judged(self, pairs: Sequence[Pair]) -> list[Rollout]:
        """Both answers of each pair, with the reference's log-probs."""
        rollouts = answers(pairs, self.inputs.tokenizer)
        logps = score(self.reference, rollouts)
        return [replace(r, reference_logp=logp) for r, logp in zip(rollouts, logps, strict=True)]


def preference(batch: Batch, *, beta: float, label_smoothing: float, denom: int) -> Objective:
    """The loss of a batch of whole pairs, as an objective that a part of its tokens can be asked for.

    The loss bends with the sum over an answer, so its derivative by that sum is taken from the log-probs as they are,
    which are known; each token then adds derivative times log-prob to the gradient, and its share to the value.
    """
    lengths = batch.learned
    ratio = total(batch.learner_logp - batch.reference_logp.to(batch.learner_logp), lengths)
    with torch.enable_grad():
        chosen, rejected = by_pair(ratio.requires_grad_())
        loss = dpo_loss(chosen, rejected, beta=beta, label_smoothing=label_smoothing, denom=denom)
        (by_ratio,) = torch.autograd.grad(loss, ratio)
    weight, share = repeat(by_ratio, lengths), loss.detach() / sum(lengths)

    def objective(s: TokenScores) -> Tensor:
        logp = s.learner_logp
        return (weight[s.part] * (logp - logp.detach())).sum() + share * len(logp)

    return objective


def log_ratios(scores: Scores) -> Tensor:
    """(2P,) nats: of each answer, the sum over its tokens of learner_logp - reference_logp."""
    reference = [v for r in scores.rollouts for v in r.reference_logp]
    return total(scores.learner_logp - scores.learner_logp.new_tensor(reference), [r.learned for r in scores.rollouts])


def pair_metrics(scores: Scores, beta: float) -> dict[str, float]:
    """Implicit rewards (beta times the log-ratio) and log-probs of the answers, under TRL's names.

    In rewards/accuracies a tie counts half: before the first update every pair is one.
    """
    chosen, rejected = by_pair(beta * log_ratios(scores))
    logps = by_pair(total(scores.learner_logp, [r.learned for r in scores.rollouts]))
    return {"rewards/chosen": float(chosen.mean()), "rewards/rejected": float(rejected.mean()),
            "rewards/margins": float((chosen - rejected).mean()), "rewards/accuracies": accuracy(chosen, rejected),
            "logps/chosen": float(logps[0].mean()), "logps/rejected": float(logps[1].mean())}


def _read(config: DpoConfig) -> Found:
    found, reader = read(config), Reader()
    if config.reference is not None:
        reference = reader.model("reference", config.reference)
        reader.faults += _check_reference(found.setup.student, reference)
    return found.with_findings(reader.faults)


def _check_reference(student: ModelFiles, reference: ModelFiles) -> list[Finding]:
    """Whether the reference reads the same ids as the model, and has all of them."""
    if any(files is None for files in (student.tokenizer, student.config, reference.tokenizer, reference.config)):
        return []
    found = []
    if faults := vocabulary_faults(student.tokenizer, reference.tokenizer):
        found.append(Finding("fault", "reference.tokenizer", ", ".join(faults).replace("teacher", "reference"),
                             f"take a reference with the tokenizer of {student.source.path}"))
    ours, theirs = (files.config.get_text_config().vocab_size for files in (student, reference))
    if ours != theirs:
        found.append(Finding("fault", "reference.vocabulary", f"the model has {ours:,} ids, the reference {theirs:,}, "
                             "so their log-probs would not compare", "take a reference of the model's own size"))
    return found


def _reference(config: DpoConfig) -> ModelConfig:
    if config.reference is not None:
        return config.reference
    return ModelConfig(path=config.model.path, revision=config.model.revision, dtype=config.model.dtype)
