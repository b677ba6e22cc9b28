"""`tinyr2 distill`: the student writes, a teacher judges, the student learns.

In: a config. Out: a run folder whose `final/` is the student as a plain Hugging Face folder.
"""

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from pydantic import Field, model_validator
from transformers import PreTrainedTokenizerBase

from tinyr2.core.config import Config
from tinyr2.core.errors import DataError
from tinyr2.core.rng import generator
from tinyr2.core.types import Batch, Problem, Rollout
from tinyr2.data.problems import DataConfig, draw
from tinyr2.data.problems import fingerprint as data_fingerprint
from tinyr2.eval.suite import EvalConfig, evaluate
from tinyr2.models.load import ModelConfig, load_model, save_model
from tinyr2.objectives.advantage import leave_one_out
from tinyr2.recipes import setup
from tinyr2.recipes.checks import check_training
from tinyr2.recipes.findings import Part, Reader, Setup, raise_faults
from tinyr2.recipes.run import identity, open_run, refuse_own_input, refuse_taken
from tinyr2.recipes.show import completions_of
from tinyr2.report.console import Console
from tinyr2.rewards.grade import RewardConfig, RewardFunction, grade, load_rewards
from tinyr2.rollouts.sample import Policy, sample
from tinyr2.teachers.local import Teacher, hire
from tinyr2.tokens.chat import fingerprint, render_example
from tinyr2.train.loop import StepResult, TrainConfig
from tinyr2.train.loss import LossConfig, Objective, count, importance, sequence_distillation, token_distillation
from tinyr2.train.metrics import completion_metrics, reward_metrics, score_metrics
from tinyr2.train.step import Learner, Reading, Scores, accumulate


class RolloutConfig(setup.WritingConfig):
    """Who answers how many of a step's prompts."""

    num_generations: int = Field(1, ge=0)  # by the student, per prompt
    num_teacher_generations: int = Field(0, ge=0)  # by the teacher, per prompt; for reward_loss: weighted_nll
    lmbda: float = Field(1.0, ge=0.0, le=1.0)  # share of prompts the student answers; the data's completions the rest
    importance_cap: float = Field(2.0, gt=0.0)  # of the weights that correct for bfloat16


class DistillConfig(Config):
    """Everything that `tinyr2 distill` can be told."""

    student: setup.StudentConfig
    teacher: ModelConfig
    data: DataConfig
    eval_data: DataConfig | None = None
    rollout: RolloutConfig = RolloutConfig()
    loss: LossConfig = LossConfig()
    rewards: tuple[RewardConfig, ...] = ()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    eval_kl_problems: int = Field(64, ge=0)  # held-out prompts whose KL is measured on the student's own answers
    device: str = "auto"
    output_dir: str

    @model_validator(mode="after")
    def _choices_fit(self) -> "DistillConfig":
        loss, rollout = self.loss, self.rollout
        sequence = loss.level == "sequence"
        if sequence and not self.rewards:
            raise ValueError("loss.level: sequence needs a reward; add rewards: [{name: exact_answer}], or your own "
                             "file and function")
        if sequence and loss.reward_loss == "reinforce" and rollout.num_generations < 2:
            raise ValueError("reward_loss: reinforce takes its baseline from the other answers to the same prompt; set "
                             "rollout.num_generations to 2 or more")
        if rollout.num_teacher_generations and not (sequence and loss.reward_loss == "weighted_nll"):
            raise ValueError("rollout.num_teacher_generations: only loss.level: sequence with reward_loss: "
                             "weighted_nll may learn from answers that the teacher wrote")
        if rollout.num_generations + rollout.num_teacher_generations < 1:
            raise ValueError("rollout: nobody writes; set num_generations to 1 or more")
        if rollout.lmbda < 1 and (sequence or loss.estimator == "sampled"):
            raise ValueError("rollout.lmbda below 1 mixes in the data's completions, which only loss.level: token with "
                             "estimator: full can learn from")
        return self


@dataclass(frozen=True)
class Inputs:
    """What a run reads, before any weight is loaded."""

    tokenizer: PreTrainedTokenizerBase
    problems: list[Problem]
    held_out: list[Problem]
    rewards: list[RewardFunction]
    vocab: int

    @classmethod
    def of(cls, found: Setup) -> "Inputs":
        """What a setup without faults holds."""
        tokenizer, models = found.student.tokenizer, [found.student, found.teacher or found.student]
        vocab = setup.shared_vocabulary(*(m.config.get_text_config().vocab_size for m in models), tokenizer)
        held_out = [p for part in found.parts[1:] for p in part.problems]
        return cls(tokenizer, list(found.parts[0].problems), held_out, list(found.rewards), vocab)


def read_setup(config: DistillConfig) -> Setup:
    """Tokenizers, model configs, data and rewards; what cannot be read is a fault in the setup."""
    reader = Reader()
    student, teacher = reader.model("student", config.student), reader.model("teacher", config.teacher)
    rewards = reader.read("rewards", lambda: load_rewards(config.rewards)) or []
    parts = [Part(
        key="data", path=config.data.source, problems=reader.problems("data", config.data),
        completions="needed" if config.rollout.lmbda < 1 else "ignored",
        answer_limit=("rollout.max_completion_length", config.rollout.max_completion_length),
        rewards=config.rewards if config.loss.level == "sequence" else ())]
    if config.eval_data is not None:
        parts.append(Part(
            key="eval_data", path=config.eval_data.source, problems=reader.problems("eval_data", config.eval_data),
            answer_limit=("eval.max_completion_length", config.eval.max_completion_length), rewards=config.rewards,
            wanted=config.eval.num_problems if config.rewards else None))
    return Setup(student=student, teacher=teacher, parts=tuple(parts), rewards=tuple(rewards), train=config.train,
                 evaluates=len(parts) > 1 and bool(config.rewards or config.eval_kl_problems), device=config.device,
                 output_dir=config.output_dir, unread=tuple(reader.faults))


def checked_inputs(found: Setup, console: Console) -> Inputs:
    """What `found` holds, after every check that needs no compute; a ConfigError names all faults."""
    for warning in raise_faults(check_training(found)):
        console.note(f"warning: {warning.line}")
    return Inputs.of(found)


def distill(config: DistillConfig, console: Console, *, resume: bool = False, overwrite: bool = False) -> dict:
    """Run it; returns what `--json` prints."""
    refuse_taken(Path(config.output_dir), resume=resume, overwrite=overwrite)
    if overwrite:
        refuse_own_input(Path(config.output_dir), [config.student.path, config.teacher.path,
                                                    *config.data.files])
    inputs = checked_inputs(read_setup(config), console)
    device = setup.choose_device(config.device, config.train)
    # before the folder is made: weights that cannot be read, or adapters that fit nothing, leave no run behind
    model = setup.load_student(config.student, device, config.train.seed)
    learner = setup.learner_of(model, inputs.vocab, device, config.train)
    student = setup.policy_of(model, inputs.tokenizer, inputs.vocab, exact=config.train.deterministic,
                              dtype=setup.decode_dtype(config.rollout.dtype, learner))
    work = Distillation(config, inputs, hire(load_model(config.teacher, device), inputs.vocab), learner, student)
    with open_run(config, "distill", console, total=config.train.max_steps, resume=resume, overwrite=overwrite,
                  show=lambda step, result: completions_of(step, result, inputs.tokenizer)) as run:
        state = setup.restore(run, model, config.train, _identity(config, inputs), resume)
        return setup.carry_out(run, work, state, train_config=config.train, evaluates=bool(inputs.held_out),
                               save=partial(save_model, model, inputs.tokenizer))


@dataclass(frozen=True)
class Distillation:
    """The steps of one run: everything random in step t follows from t."""

    config: DistillConfig
    inputs: Inputs
    teacher: Teacher
    learner: Learner
    student: Policy  # before the first step

    def step(self, t: int) -> StepResult:
        """Write, grade, judge, and leave the gradient of step `t` (0-based) on the student."""
        clock = [time.perf_counter()]
        own, given = self._deal(t)
        # the data's completions are learned from, not graded: the reward is that of what was sampled
        rollouts = center(grade(self._write(own, t), self.inputs.rewards))
        tell_errors(rollouts, t + 1, fatal=self.config.loss.level == "sequence")
        rollouts += worked(given, self.inputs.tokenizer, len(own), self.config.rollout.temperature)
        clock.append(time.perf_counter())
        # a token-level loss reads no reward, so a grader's fault costs it nothing
        kept = [r for r in rollouts if r.error is None or self.config.loss.level == "token"]
        scores = self._learn(kept, t / max(1, self.config.train.max_steps - 1))
        clock.append(time.perf_counter())
        return StepResult(
            metrics=(score_metrics(scores, self._importance_cap) | completion_metrics(rollouts)
                     | reward_metrics(rollouts)),
            num_tokens=sum(len(r.prompt_ids) + len(r.response_ids) for r in kept), rollouts=rollouts, scores=scores,
            seconds={"rollout_s": clock[1] - clock[0], "learn_s": clock[2] - clock[1]})

    def evaluate(self, step: int) -> dict[str, float]:
        """Held-out pass@1 where there is a reward, and the divergence per token on the student's own answers."""
        config, policy, out, written = self.config, self._student(step), {}, []
        with self.learner.autocast():
            if self.inputs.rewards:
                result = evaluate(policy, self.inputs.held_out, self.inputs.rewards, config.eval)
                out |= {f"eval_{name}": v for name, v in result.figures().items()}
            if config.eval_kl_problems:
                written = sample(policy, self.inputs.held_out[:config.eval_kl_problems], n=1, seed=config.eval.seed,
                                 sampling=config.rollout, max_rows=config.rollout.max_rows)
        del policy  # its memory is the learner's now
        return out | {"eval_kl": self._divergence(written)} if written else out

    @property
    def _importance_cap(self) -> float | None:
        # two bfloat16 sides round differently too: decode copy and learner add up in other orders
        rounded = torch.bfloat16 in (self.student.dtype, self.learner.dtype)
        return self.config.rollout.importance_cap if rounded else None

    def _student(self, version: int) -> Policy:
        """For one version of the weights, and as long as it writes: a decode copy is a second set of weights."""
        return replace(self.student, version=version)

    @cached_property
    def _writing_teacher(self) -> Policy:
        return setup.policy_of(self.teacher.model, self.inputs.tokenizer, self.inputs.vocab,
                               exact=self.config.train.deterministic)

    def _deal(self, t: int) -> tuple[list[Problem], list[Problem]]:
        """The problems of step `t`: those that are answered now, and those whose completion in the data is read."""
        config, seed = self.config.rollout, self.config.train.seed
        problems = draw(self.inputs.problems, config.prompts_per_step, t, seed)
        asked = generator(seed, "lmbda", t).random(len(problems)) < config.lmbda
        return ([p for p, a in zip(problems, asked, strict=True) if a],
                [p for p, a in zip(problems, asked, strict=True) if not a])

    def _write(self, own: list[Problem], t: int) -> list[Rollout]:
        config, rollouts = self.config.rollout, []
        write = partial(sample, sampling=config, seed=self.config.train.seed, step=t, max_rows=config.max_rows)
        with self.learner.autocast():
            if config.num_generations and own:
                rollouts += write(self._student(t), own, n=config.num_generations)
            if config.num_teacher_generations and own:
                rollouts += write(self._writing_teacher, own, n=config.num_teacher_generations, author="teacher")
        return rollouts

    def _learn(self, rollouts: Sequence[Rollout], progress: float) -> Scores:
        loss, counts = self.config.loss, count(rollouts)

        def objective(batch: Batch) -> Objective:
            weigh = importance(batch, self._importance_cap)
            if loss.level == "sequence":
                return sequence_distillation(loss, batch, counts, progress, weigh)
            return token_distillation(loss, counts, weigh)

        divergence = loss.divergence if loss.estimator == "full" else None
        return accumulate(self.learner, rollouts, objective, Reading(
            temperature=self.config.rollout.temperature, divergence=divergence, teacher=self.teacher))

    @torch.no_grad()
    def _divergence(self, rollouts: Sequence[Rollout]) -> float:
        counts = count(rollouts)
        scores = accumulate(self.learner, rollouts, lambda _: token_distillation(LossConfig(), counts), Reading(
            temperature=self.config.rollout.temperature, divergence=LossConfig().divergence, teacher=self.teacher))
        return float(scores.divergence.mean())


def tell_errors(rollouts: Sequence[Rollout], step: int, *, fatal: bool) -> None:
    """Warn of each error that a grader made; if `fatal`, a DataError where no answer of the step could be graded."""
    errors = list(dict.fromkeys(r.error for r in rollouts if r.error is not None))
    if fatal and errors and all(r.error is not None for r in rollouts):
        raise DataError(f"no answer of step {step} could be graded: {'; '.join(errors)}; mend the reward function")
    for error in errors:  # without the step, so that each is told once
        warnings.warn(f"answers without a grade: {error}", stacklevel=2)


def center(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Each group's leave-one-out advantages, over the answers that one author wrote."""
    groups: dict[tuple[int, str], list[int]] = {}
    for i, r in enumerate(rollouts):
        groups.setdefault((r.group, r.author), []).append(i)
    out = list(rollouts)
    for members in groups.values():
        rewards = [rollouts[i].reward for i in members]
        for i, advantage in zip(members, leave_one_out(rewards), strict=True):
            out[i] = replace(rollouts[i], advantage=advantage)
    return out


def worked(problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase, first_group: int = 0,
           temperature: float = 1.0) -> list[Rollout]:
    """The data's own completions as rollouts."""
    out = []
    for i, p in enumerate(problems):
        prompt, response = render_example(tokenizer, p.messages, p.completion)
        out.append(Rollout(problem=p, group=first_group + i, sample=0, author="dataset", prompt_ids=tuple(prompt),
                           response_ids=tuple(response), temperature=temperature, finish="stop"))
    return out


def _identity(config: DistillConfig, inputs: Inputs) -> dict[str, str]:
    return {"config": identity(config), "data": data_fingerprint(inputs.problems),
            "eval_data": data_fingerprint(inputs.held_out),
            "tokenizer": fingerprint(inputs.tokenizer), "student": setup.model_fingerprint(config.student.path),
            "teacher": setup.model_fingerprint(config.teacher.path),
            "rewards": setup.code_fingerprint([r.file for r in config.rewards if r.file])}
