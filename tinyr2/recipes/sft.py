"""`tinyr2 sft`: supervised fine-tuning on worked solutions.

In: a config. Out: a run folder whose `final/` is the model as a plain Hugging Face folder.
"""

import time
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from pydantic import Field

from tinyr2.core.config import Config
from tinyr2.core.types import Problem, Rollout
from tinyr2.data.problems import DataConfig, draw
from tinyr2.data.problems import fingerprint as data_fingerprint
from tinyr2.eval.suite import EvalConfig, evaluate
from tinyr2.models.load import save_model
from tinyr2.recipes import setup
from tinyr2.recipes.distill import Inputs, checked_inputs, worked
from tinyr2.recipes.findings import Part, Reader, Setup
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
    data: DataConfig
    eval_data: DataConfig | None = None
    rewards: tuple[RewardConfig, ...] = ()  # how held-out answers are graded; none: only their likelihood
    examples_per_step: int = Field(16, ge=1)
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    device: str = "auto"
    output_dir: str


def read_setup(config: SftConfig) -> Setup:
    """Tokenizer, model config, data and rewards; what cannot be read is a fault in the setup."""
    reader = Reader()
    model = reader.model("model", config.model)
    rewards = reader.read("rewards", lambda: load_rewards(config.rewards)) or []
    parts = [Part(key="data", path=config.data.source, problems=reader.problems("data", config.data),
                  completions="needed")]
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


def sft(config: SftConfig, console: Console, *, resume: bool = False, overwrite: bool = False) -> dict:
    """Run it; returns what `--json` prints."""
    refuse_taken(Path(config.output_dir), resume=resume, overwrite=overwrite)
    if overwrite:
        refuse_own_input(Path(config.output_dir), [config.model.path, *config.data.files])
    inputs = checked_inputs(read_setup(config), console)
    device = setup.choose_device(config.device, config.train)
    # before the folder is made: weights that cannot be read, or adapters that fit nothing, leave no run behind
    model = setup.load_student(config.model, device, config.train.seed)
    with open_run(config, "sft", console, total=config.train.max_steps, resume=resume, overwrite=overwrite) as run:
        facts = {"config": identity(config), "data": data_fingerprint(inputs.problems),
                 "eval_data": data_fingerprint(inputs.held_out), "tokenizer": fingerprint(inputs.tokenizer),
                 "model": setup.model_fingerprint(config.model.path)}
        state = setup.restore(run, model, config.train, facts, resume)
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

    def step(self, t: int) -> StepResult:
        """Leave the gradient of step `t` (0-based) on the model."""
        start = time.perf_counter()
        rollouts = self._render(draw(self.inputs.problems, self.config.examples_per_step, t, self.config.train.seed))
        counts = count(rollouts)
        scores = accumulate(self.learner, rollouts, lambda _: likelihood(counts))
        return StepResult(metrics=score_metrics(scores), scores=scores,
                          num_tokens=sum(len(r.prompt_ids) + len(r.response_ids) for r in rollouts),
                          seconds={"learn_s": time.perf_counter() - start})

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
