"""`tinyr2 sft`: supervised fine-tuning on worked solutions, of one source or of several at a ratio.

In: a config. Out: a run folder whose `final/` is the model as a plain Hugging Face folder.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from pydantic import Field, model_validator

from tinyr2.core.config import Config
from tinyr2.core.types import Problem, Rollout
from tinyr2.data.mixture import Mixture, MixtureConfig, drop_long, load_mixture, source_of
from tinyr2.data.problems import DataConfig, draw
from tinyr2.data.problems import fingerprint as data_fingerprint
from tinyr2.eval.suite import EvalConfig, evaluate
from tinyr2.models.load import context_length, save_model
from tinyr2.recipes import setup
from tinyr2.recipes.findings import Finding, ModelFiles, Part, Reader, Setup
from tinyr2.recipes.graded import worked
from tinyr2.recipes.inputs import Inputs, checked_inputs
from tinyr2.recipes.run import identity, open_run, refuse_own_input, refuse_taken
from tinyr2.report.console import Console
from tinyr2.rewards.grade import RewardConfig, load_rewards
from tinyr2.rollouts.sample import Policy
from tinyr2.tokens.chat import fingerprint
from tinyr2.train.loop import StepResult, TrainConfig
from tinyr2.train.loss import count, likelihood
from tinyr2.train.metrics import score_metrics
from tinyr2.train.step import Learner, accumulate


class SftConfig(Config):
    """Everything that `tinyr2 sft` can be told."""

    model: setup.StudentConfig
    data: DataConfig | None = None
    mixture: MixtureConfig | None = None  # in place of data
    eval_data: DataConfig | None = None
    rewards: tuple[RewardConfig, ...] = ()  # how held-out answers are graded; none: only their likelihood
    examples_per_step: int = Field(16, ge=1)
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    device: str = "auto"
    output_dir: str

    @model_validator(mode="after")
    def _one_source(self) -> "SftConfig":
        if (self.data is None) == (self.mixture is None):
            raise ValueError("data: missing; give data=…, or a mixture of several sources" if self.data is None else
                             "data and mixture: both are what is trained on; give one of the two")
        return self

    @property
    def trained_on(self) -> DataConfig | MixtureConfig:
        """Where the examples come from."""
        return self.data or self.mixture


def read_setup(config: SftConfig) -> Setup:
    """Tokenizer, model config, data and rewards; what cannot be read is a fault in the setup."""
    reader = Reader()
    model = reader.model("model", config.model)
    rewards = reader.read("rewards", lambda: load_rewards(config.rewards)) or []
    parts = [read_mixture(reader, config.mixture, model) if config.mixture is not None else Part(
        key="data", path=config.data.source, problems=reader.problems("data", config.data), completions="needed")]
    held_out = reader.problems("eval_data", config.eval_data)
    if config.eval_data is not None:
        limit = ("eval.max_completion_length", config.eval.max_completion_length)
        parts.append(Part(
            key="eval_data", path=config.eval_data.source, problems=held_out, completions="read",
            answer_limit=limit if config.rewards else None,
            rewards=config.rewards, wanted=config.eval.num_problems if config.rewards else None))
    evaluates = config.eval_data is not None and (bool(config.rewards) or any(p.completion for p in held_out))
    return Setup(student=model, parts=tuple(parts), rewards=tuple(rewards), train=config.train, evaluates=evaluates,
                 device=config.device, output_dir=config.output_dir, unread=tuple(reader.faults))


def read_mixture(reader: Reader, config: MixtureConfig, model: ModelFiles) -> Part:
    """What is left of the sources where over-long rows are dropped; the reader warns of what was dropped."""
    problems = reader.read("mixture", lambda: load_mixture(config)) or []
    if problems and model.tokenizer is not None:
        context = context_length(model.config) if model.config is not None else None
        problems, dropped = reader.read("mixture", lambda: drop_long(
            problems, model.tokenizer, config.max_completion_length, context)) or ([], {})
        cure = "raise mixture.max_completion_length to keep more of them"
        reader.faults += [Finding("warn", f"mixture.{name}", f"{over:,} over-long rows of "
                                  f"{config.sources[name].source} are dropped", cure)
                          for name, over in dropped.items() if over]
    return Part(key="mixture", path=config.source, problems=problems, completions="needed")


def sft(config: SftConfig, console: Console, *, resume: bool = False, overwrite: bool = False) -> dict:
    """Run it; returns what `--json` prints."""
    refuse_taken(Path(config.output_dir), resume=resume, overwrite=overwrite)
    if overwrite:
        refuse_own_input(Path(config.output_dir), [config.model.path, *config.trained_on.files])
    found = read_setup(config)
    inputs = checked_inputs(found, console)
    device = setup.choose_device(config.device, config.train)
    # before the folder is made: weights that cannot be read, or adapters that fit nothing, leave no run behind
    model = setup.load_student(config.model, device, config.train.seed)
    with open_run(config, "sft", console, total=config.train.max_steps, resume=resume, overwrite=overwrite) as run:
        facts = {"config": identity(config), "data": data_fingerprint(inputs.problems),
                 "eval_data": data_fingerprint(inputs.held_out), "tokenizer": fingerprint(inputs.tokenizer),
                 "model": setup.model_fingerprint(config.model.path)}
        state = setup.restore(run, model, config.train, facts, resume)
        if state.step == 0:
            for dropped in found.unread:  # a fault would have ended the run
                run.event("dropped", source=dropped.name, what=dropped.what)
        work = FineTuning(config, inputs, setup.learner_of(model, inputs.vocab, device, config.train))
        return setup.carry_out(run, work, state, train_config=config.train, evaluates=bool(inputs.held_out),
                               save=partial(save_model, model, inputs.tokenizer))


@dataclass(frozen=True)
class FineTuning:
    """The steps of one run: step t reads the examples that follow from t."""

    config: SftConfig
    inputs: Inputs
    learner: Learner

    @cached_property
    def _rendered(self) -> dict[str, Rollout]:
        return {}

    @cached_property
    def _mixture(self) -> Mixture | None:
        mixed = self.config.mixture
        return None if mixed is None else Mixture.of(self.inputs.problems, mixed.shares)

    def step(self, t: int) -> StepResult:
        """Leave the gradient of step `t` (0-based) on the model."""
        start = time.perf_counter()
        n, seed = self.config.examples_per_step, self.config.train.seed
        rollouts = self._render(draw(self.inputs.problems, n, t, seed) if self._mixture is None
                                else self._mixture.deal(n, t, seed))
        counts = count(rollouts)
        scores = accumulate(self.learner, rollouts, lambda _: likelihood(counts))
        return StepResult(metrics=score_metrics(scores) | self._shares(rollouts), scores=scores,
                          num_tokens=sum(len(r.prompt_ids) + len(r.response_ids) for r in rollouts),
                          seconds={"learn_s": time.perf_counter() - start})

    def _shares(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """Of each source in a mixture, the share of the examples and of the learned tokens."""
        out, tokens = {}, sum(r.learned for r in rollouts)
        for name in self._mixture.sources if self._mixture is not None else ():
            own = [r.learned for r in rollouts if source_of(r.problem) == name]
            out |= {f"mixture/{name}": len(own) / len(rollouts), f"mixture/{name}_tokens": sum(own) / tokens}
        return out

    @torch.no_grad()
    def evaluate(self, step: int) -> dict[str, float]:
        """Held-out pass@1 where there is a reward, and the held-out loss where there are solutions."""
        out = {}
        with self.learner.autocast():
            if self.inputs.rewards:
                result = evaluate(self._policy(step), self.inputs.held_out, self.inputs.rewards, self.config.eval)
                out |= {f"eval_{name}": v for name, v in result.figures().items()}
        solved = [p for p in self.inputs.held_out if p.completion][:self.config.eval.num_problems]
        if solved:
            rollouts = worked(solved, self.inputs.tokenizer)
            counts = count(rollouts)
            out["eval_loss"] = accumulate(self.learner, rollouts, lambda _: likelihood(counts)).loss
        return out

    @cached_property
    def _untrained(self) -> Policy:
        return setup.policy_of(self.learner.model, self.inputs.tokenizer, self.inputs.vocab,
                               dtype=setup.decode_dtype("auto", self.learner), exact=self.config.train.deterministic)

    def _policy(self, version: int) -> Policy:
        return replace(self._untrained, version=version)

    def _render(self, problems: list[Problem]) -> list[Rollout]:
        """Tokenized once per problem."""
        new = {p.id: p for p in problems if p.id not in self._rendered}
        for rollout in worked(list(new.values()), self.inputs.tokenizer):
            self._rendered[rollout.problem.id] = rollout
        return [self._rendered[p.id] for p in problems]
