"""The steps of a distillation run: write, grade, let the teachers judge, learn; and what its evaluations say.

In: the config and everything that takes part. Out: gradients and step results for the loop.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from tinyr2.core.rng import generator
from tinyr2.core.types import Batch, Problem, Rollout
from tinyr2.data.mixture import Mixture
from tinyr2.data.problems import draw
from tinyr2.eval.suite import evaluate
from tinyr2.objectives.divergence import Divergence
from tinyr2.recipes.distill_config import DistillConfig
from tinyr2.recipes.graded import center, tell_errors, worked
from tinyr2.recipes.hiring import Staff
from tinyr2.recipes.inputs import Inputs
from tinyr2.rewards.grade import grade
from tinyr2.rollouts.sample import Policy, sample
from tinyr2.train import kd
from tinyr2.train.loop import StepResult
from tinyr2.train.loss import (
    Counts,
    LossConfig,
    Objective,
    Weigh,
    count,
    importance,
    sequence_distillation,
    sequence_divergence,
    token_distillation,
    token_divergence,
)
from tinyr2.train.metrics import completion_metrics, reward_metrics, score_metrics, teacher_metrics
from tinyr2.train.step import Learner, Reading, Scores, accumulate


@dataclass(frozen=True)
class Distillation:
    """The steps of one run: everything random in step t follows from t."""

    config: DistillConfig
    inputs: Inputs
    staff: Staff
    learner: Learner
    student: Policy  # before the first step

    def step(self, t: int) -> StepResult:
        """Write, grade, judge, and leave the gradient of step `t` (0-based) on the student."""
        clock = [time.perf_counter()]
        self.staff.follow(self.learner.model, t)
        own, given = self._deal(t)
        # the data's completions are learned from, not graded: the reward is that of what was sampled
        rollouts = center(grade(self._write(own, t), self.inputs.rewards))
        tell_errors(rollouts, t + 1, fatal=self.config.loss.level == "sequence")
        rollouts += worked(given, self.inputs.tokenizer, len(own), self.config.rollout.temperature)
        clock.append(time.perf_counter())
        # a token-level loss reads no reward, so a grader's fault costs it nothing
        kept = [r for r in rollouts if r.error is None or self.config.loss.level == "token"]
        progress = t / max(1, self.config.train.max_steps - 1)
        with self.learner.autocast():
            self.staff.panel.prepare(kept, progress)
        clock.append(time.perf_counter())
        scores = self._learn(kept, progress)
        clock.append(time.perf_counter())
        served, net = self.staff.served()
        return StepResult(
            metrics=(score_metrics(scores, self._importance_cap) | completion_metrics(rollouts)
                     | reward_metrics(rollouts) | teacher_metrics(scores) | self.staff.metrics() | served),
            num_tokens=sum(len(r.prompt_ids) + len(r.response_ids) for r in kept), rollouts=rollouts, scores=scores,
            seconds={"rollout_s": clock[1] - clock[0], "consult_s": clock[2] - clock[1],
                     "learn_s": clock[3] - clock[2], **net})

    def evaluate(self, step: int) -> dict[str, float]:
        """Held-out pass@1 where there is a reward, and the reverse KL per token on the student's own answers."""
        config, policy, out, written = self.config, self._student(step), {}, []
        with self.learner.autocast():
            if self.inputs.rewards:
                result = evaluate(policy, self.inputs.held_out, self.inputs.rewards, config.eval)
                out |= {f"eval_{name}": v for name, v in result.figures().items()}
            if config.eval_kl_problems:
                written = sample(policy, self.inputs.held_out[:config.eval_kl_problems], n=1, seed=config.eval.seed,
                                 sampling=config.rollout, max_rows=config.rollout.max_rows)
        del policy  # its memory is the learner's now
        out |= self._divergence(written) if written else {}
        self.staff.served(), self.staff.metrics()  # what servers were asked, and teachers shown, here is no step's
        return out

    @property
    def _importance_cap(self) -> float | None:
        # two bfloat16 sides round differently too: decode copy and learner add up in other orders
        rounded = torch.bfloat16 in (self.student.dtype, self.learner.dtype)
        return self.config.rollout.importance_cap if rounded else None

    def _student(self, version: int) -> Policy:
        """For one version of the weights, and as long as it writes: a decode copy is a second set of weights."""
        return replace(self.student, version=version)

    @cached_property
    def _mixture(self) -> Mixture | None:
        mixed = self.config.mixture
        return None if mixed is None else Mixture.of(self.inputs.problems, mixed.shares)

    def _deal(self, t: int) -> tuple[list[Problem], list[Problem]]:
        """The problems of step `t`: those that are answered now, and those whose completion in the data is read."""
        config, seed = self.config.rollout, self.config.train.seed
        if self._mixture is None:
            problems = draw(self.inputs.problems, config.prompts_per_step, t, seed)
        else:
            problems = self._mixture.deal(config.prompts_per_step, t, seed)
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
                rollouts += write(self.staff.writer, own, n=config.num_teacher_generations, author="teacher")
        return rollouts

    def _learn(self, rollouts: Sequence[Rollout], progress: float) -> Scores:
        loss, counts = self.config.loss, count(rollouts)
        hidden, soft = self.staff.hidden, self.config.kd
        states = {} if hidden is None else hidden.reading(self.learner, counts.tokens)
        if soft is not None:
            return self._learn_labels(rollouts, counts, progress, states)

        def weigh(batch: Batch) -> Weigh | None:
            return importance(batch, self._importance_cap)

        def objective(batch: Batch) -> Objective:
            if loss.level == "sequence":
                return sequence_distillation(loss, batch, counts, progress, weigh(batch))
            return token_distillation(loss, batch, counts, weigh(batch))

        def compare(batch: Batch) -> Objective:
            if loss.level == "sequence":
                return sequence_divergence(loss, batch, counts, progress)
            return token_divergence(counts, weigh(batch))

        divergence = loss.divergence if loss.estimator == "full" else None
        return accumulate(self.learner, rollouts, objective, Reading(
            temperature=self.config.rollout.temperature, divergence=divergence, judge=self.staff.panel, compare=compare,
            anchor=lambda batch: token_divergence(counts),
            shows_states=self.staff.shows_states, apart=self.staff.apart, **states))

    def _learn_labels(self, rollouts: Sequence[Rollout], counts: Counts, progress: float, states: dict) -> Scores:
        """Logits distillation: the data's labels at temperature 1, the teacher's at the config's."""
        config, vocab = self.config.kd, self.inputs.vocab
        return accumulate(
            self.learner, rollouts, lambda batch: kd.hard(config, batch, counts, vocab, progress), Reading(
                divergence=self.config.loss.divergence, judge=self.staff.panel, teaching_temperature=config.temperature,
                teacher_entropy=config.by == "entropy", apart=self.staff.apart,
                compare=lambda batch: kd.soft(config, batch, counts, vocab, progress),
                anchor=lambda batch: token_divergence(counts), **states))

    @torch.no_grad()
    def _divergence(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """The reverse KL to the teachers, per token; of those who know sampled tokens alone, its estimate."""
        counts, panel = count(rollouts), self.staff.panel
        with self.learner.autocast():
            panel.prepare(rollouts, 1.0)
        scores = accumulate(
            self.learner, rollouts, lambda batch: token_distillation(LossConfig(), batch, counts), Reading(
                temperature=self.config.teaching_temperature, divergence=Divergence(), judge=panel,
                compare=lambda batch: token_divergence(counts), shows_states=self.staff.shows_states,
                apart=self.staff.apart))
        estimated = None if scores.teacher_gap is None else -scores.teacher_gap
        said: list[Tensor] = [x for x in (scores.divergence, estimated) if x is not None]
        return {"eval_kl": float(torch.stack(said).sum(0).mean())} if said else {}
