"""The steps of a reinforcement run: write, grade, score, give credit, learn; and what its evaluations say.

In: the config and everything that takes part. Out: gradients and step results for the loop.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite, nan
from statistics import fmean

import torch
from torch import Tensor

from tinyr2.core.rng import generator, permutation
from tinyr2.core.types import Batch, Problem, Rollout
from tinyr2.data.adaptation import choose, weights
from tinyr2.data.adaptation import update as moved
from tinyr2.data.problems import draw
from tinyr2.eval.suite import evaluate
from tinyr2.recipes.graded import tell_errors
from tinyr2.recipes.inputs import Inputs
from tinyr2.recipes.reinforce_config import ReinforceConfig
from tinyr2.recipes.show import SHOWN
from tinyr2.rewards.grade import RewardFunction, grade, verdict_of
from tinyr2.rollouts.sample import Policy, sample
from tinyr2.teachers.local import Teacher, judge_of
from tinyr2.train.agent import Agent
from tinyr2.train.collect import Collection, collect
from tinyr2.train.credit import assign_credit, old_logp
from tinyr2.train.critic import Critic, accumulate_value, assess, fit, loss_of
from tinyr2.train.loop import StepResult, update
from tinyr2.train.metrics import completion_metrics, reward_metrics, score_metrics
from tinyr2.train.optim import Joint, Offloaded, Optimizer
from tinyr2.train.policy_loss import PolicyLoss, StepCounts
from tinyr2.train.policy_metrics import UpdateMetrics, collection_metrics
from tinyr2.train.step import Learner, Reading, Scores, accumulate, score


@dataclass(frozen=True, kw_only=True)
class Company:
    """The models that take part."""

    agent: Agent
    learner: Learner
    critic: Critic | None
    reference: Learner | None
    teacher: Teacher | None


@dataclass(frozen=True)
class Reinforcement:
    """The steps of one run: everything random in step t follows from t, everything learned before is in the agent."""

    config: ReinforceConfig
    inputs: Inputs
    company: Company
    writer: Policy  # before the first step
    optimizer: Optimizer | Offloaded | Joint
    graders: Sequence[RewardFunction]  # of held-out answers

    @property
    def learner(self) -> Learner:
        """The policy as the training steps see it."""
        return self.company.learner

    def step(self, t: int) -> StepResult:
        """Take all updates of step `t` (0-based) but the last, whose gradient is left for the loop."""
        clock = [time.perf_counter()]
        collection = self._collect(t)
        tell_errors(collection.written, t + 1, fatal=True)
        clock.append(time.perf_counter())
        credited, facts = self._credited(collection.kept, t)
        clock.append(time.perf_counter())
        kept = [r for r in credited if not (self.config.loss.mask_truncated_completions and r.finish == "length")]
        scores, learned = self._learn(kept, t)
        clock.append(time.perf_counter())
        agent = self.company.agent
        metrics = (learned | facts | completion_metrics(collection.written) | reward_metrics(collection.written)
                   | collection_metrics(collection, len(kept))
                   | {"num_generated_tokens": int(agent.num_generated)})
        failed = [r for r in collection.written if r.error is not None][:SHOWN // 2]
        return StepResult(metrics=metrics, rollouts=[*failed, *(kept or collection.written)], scores=scores,
                          num_tokens=sum(len(r.prompt_ids) + len(r.response_ids) for r in kept),
                          seconds={"rollout_s": clock[1] - clock[0], "score_s": clock[2] - clock[1],
                                   "learn_s": clock[3] - clock[2]})

    def evaluate(self, step: int) -> dict[str, float]:
        """Held-out pass@1 and what goes with it."""
        with self.learner.autocast():
            result = evaluate(replace(self.writer, version=step), self.inputs.held_out, self.graders, self.config.eval)
        return {f"eval_{name}": v for name, v in result.figures().items()}

    # what is written

    def _judged(self, rollout: Rollout) -> Rollout:
        """Right or wrong; without a verdict there is no reward either, whatever the shape of the answer earns."""
        verdict = verdict_of(self.inputs.rewards, rollout.problem.task)
        part = None if verdict is None else rollout.reward_parts.get(verdict.name)
        return replace(rollout, reward=None) if part is None else replace(rollout, right=part >= 1.0)

    def _collect(self, t: int) -> Collection:
        config = self.config
        policy = replace(self.writer, version=t)

        def deal(round_: int, n: int, asked: Sequence[Problem]) -> list[Problem]:
            return [self.inputs.problems[i] for i in self._chosen(t, round_, n, asked)]

        def answer(round_: int, problems: Sequence[Problem]) -> list[Rollout]:
            with self.learner.autocast():
                # a round is a step of its own to the sampler: an unlucky problem is not answered in the same words
                rollouts = sample(policy, problems, n=config.rollout.num_generations, sampling=config.rollout,
                                  seed=config.train.seed, step=t * config.sampling.max_rounds + round_,
                                  max_rows=config.rollout.max_rows)
            return [self._judged(r) for r in grade(rollouts, self.inputs.rewards)]

        found = collect(config.sampling, config.rollout.prompts_per_step, deal, answer)
        self._remember(found)
        return found

    def _chosen(self, t: int, round_: int, n: int, asked: Sequence[Problem]) -> list[int]:
        """Which problems are asked: the epoch's next, or by pass rates; in later rounds others, while there are any."""
        config, seed, problems = self.config.sampling, self.config.train.seed, self.inputs.problems
        if config.adapt is None and round_ == 0:
            return draw(range(len(problems)), n, t, seed)
        taken = {id(p) for p in asked}
        free = [i for i, p in enumerate(problems) if id(p) not in taken]
        if len({problems[i].task for i in free}) < len({p.task for p in problems}):
            free = list(range(len(problems)))  # a domain has none left: another answer to one that was asked
        if config.adapt is None:
            order = permutation(len(free), seed, "refill", t, round_)
            return [free[i] for i in order[:n]]
        weight = weights(self.company.agent.pass_rate.double().numpy()[free], config.adapt)
        domains = [problems[i].task for i in free]
        return [free[i] for i in choose(weight, n, domains, config.adapt, seed=seed, path=(t, round_))]

    def _remember(self, found: Collection) -> None:
        agent = self.company.agent
        agent.num_generated += sum(len(r.response_ids) for r in found.written)
        if self.config.sampling.adapt is None:
            return
        place = {id(p): i for i, p in enumerate(self.inputs.problems)}
        verdicts: dict[int, list[bool]] = {}
        for r in found.written:
            if r.right is not None:
                verdicts.setdefault(place[id(r.problem)], []).append(r.right)
        rates = moved(agent.pass_rate.numpy(), list(verdicts), [fmean(v) for v in verdicts.values()],
                      self.config.sampling.adapt.ema)
        agent.pass_rate.copy_(torch.as_tensor(rates))

    # what it is worth

    def _credited(self, rollouts: Sequence[Rollout], t: int) -> tuple[list[Rollout], dict[str, float]]:
        """What can be learned from, with its credit; and what was seen on the way."""
        config, company = self.config, self.company
        temperature, facts, ends = config.rollout.temperature, {}, None
        if self._corrects and self._updates > 1:
            rollouts = _with(rollouts, "old_logp", score(self.learner, rollouts, temperature))
        if company.reference is not None:
            rollouts = _with(rollouts, "reference_logp", score(company.reference, rollouts, temperature))
        if company.critic is not None:
            rollouts, ends = assess(company.critic, rollouts)
        rewards = {r.name: (r.weight, r.gamma) for r in self.inputs.rewards}
        # a critic is pretrained on what the answers really earned (Monte-Carlo returns)
        lam = 1.0 if config.value is None or self._pretrains(t) else config.value.lam
        credit = partial(assign_credit, rollouts, config.advantage, config.kl, rewards, last_values=ends)
        out = credit(critic_lam=lam)
        # λ below 1 would compare the critic with itself
        earned = out if lam == 1.0 else credit(critic_lam=1.0)
        if company.critic is not None and earned and (explained := fit(earned)) is not None:
            facts["value/explained_variance"] = explained
            if explained >= config.value.pretrain_until:
                company.agent.critic_ready.fill_(True)
        if config.opd is not None and config.opd.place == "advantage" and out:
            out, facts["teacher_kl"] = self._taught(out)
        return out, facts

    def _taught(self, rollouts: Sequence[Rollout]) -> tuple[list[Rollout], float]:
        """The teacher's log-ratio on each token, added to its credit: the reverse KL as an advantage; and that KL."""
        teacher = replace(self.learner, model=self.company.teacher.model)
        said = score(teacher, rollouts, self.config.rollout.temperature)
        gaps = [[q - p for q, p in zip(logp, old_logp(r), strict=True)] for r, logp in zip(rollouts, said, strict=True)]
        taught = [replace(r, credit=tuple(c + self.config.opd.weight * g for c, g in zip(r.credit, gap, strict=True)))
                  for r, gap in zip(rollouts, gaps, strict=True)]
        return taught, -fmean(g for gap in gaps for g in gap)

    def _pretrains(self, t: int) -> bool:
        """Whether the policy still waits for the critic."""
        value = self.config.value
        return value is not None and t < value.pretrain_steps and not bool(self.company.agent.critic_ready)

    @property
    def _corrects(self) -> bool:
        """Whether the actor's log-probs are not the learner's, so that weights correct for it."""
        mode = self.config.loss.importance.mode
        # two bfloat16 sides round differently too: decode copy and learner add up in other orders
        rounded = torch.bfloat16 in (self.writer.dtype, self.learner.dtype)
        return rounded if mode == "auto" else mode != "none"

    @property
    def _updates(self) -> int:
        return self.config.updates.num_iterations * self.config.updates.num_mini_batches

    # what is learned

    def _learn(self, rollouts: list[Rollout], t: int) -> tuple[Scores | None, dict[str, float]]:
        """All updates but the last; with the scores of the first pass."""
        value, found, pretrains = self.config.value, {}, self._pretrains(t)
        if value is not None and value.trunk == "separate" and rollouts:
            found = self._fit_critic(rollouts, t, leave_last=pretrains) | {"value/pretraining": float(pretrains)}
        if pretrains or not rollouts:
            return None, found | {"loss": found.get("value/loss", 0.0)}
        metrics, first, seen = UpdateMetrics(), [], []
        some = self._mini_batches(rollouts, self.config.updates.num_iterations, self.config.updates.num_mini_batches, t)
        once = len(some) // self.config.updates.num_iterations
        for i, part in enumerate(some):
            loss = self._loss(part)
            scores = self._accumulate(part, loss, metrics)
            metrics.add(scores, loss)
            first += [scores] if i < once else []
            seen.append(scores.loss)
            if i < len(some) - 1:
                seen += update(self.optimizer, self.config.train.max_grad_norm, scores.loss).values()
        joined = Scores.joined(first)
        if not all(map(isfinite, seen)):  # one of several updates was skipped: the monitor is to know
            joined = replace(joined, loss=nan)
        cap = self.config.loss.importance.cap if self._corrects else None
        # actor and learner have the same weights before the first update alone
        gaps = {name: x for name, x in score_metrics(first[0], cap).items() if name.startswith("sampling/")}
        out = score_metrics(joined, cap) | gaps
        if "kl" in out and self.company.reference is not None:  # `kl` is to the reference
            out["teacher_kl"] = out.pop("kl")
        return joined, out | metrics.means() | found

    def _fit_critic(self, rollouts: list[Rollout], t: int, *, leave_last: bool) -> dict[str, float]:
        value, losses, norms = self.config.value, [], []
        some = self._mini_batches(rollouts, value.num_iterations, value.num_mini_batches, t, "value")
        for i, part in enumerate(some):
            losses.append(accumulate_value(self.company.critic, part, value))
            if not (leave_last and i == len(some) - 1):
                norms.append(update(self.optimizer, self.config.train.max_grad_norm, losses[-1])["value/grad_norm"])
        return {"value/loss": fmean(losses)} | ({"value/grad_norm": fmean(norms)} if norms else {})

    def _mini_batches(self, rollouts: list[Rollout], iterations: int, parts: int, t: int,
                      who: str = "policy") -> list[list[Rollout]]:
        """The optimizer steps of a step: each pass cuts the rollouts anew into parts of equal size."""
        out = []
        for i in range(iterations):
            order = generator(self.config.train.seed, "updates", who, t, i).permutation(len(rollouts))
            cuts = [len(rollouts) * j // parts for j in range(parts + 1)]
            out += [[rollouts[k] for k in sorted(order[a:b])] for a, b in zip(cuts, cuts[1:], strict=False) if a < b]
        return out

    def _loss(self, rollouts: Sequence[Rollout]) -> PolicyLoss:
        config = self.config
        return PolicyLoss(config=config.loss, kl=config.kl, counts=StepCounts.of(rollouts), opd=config.opd,
                          corrects=self._corrects,
                          constant=config.loss.constant or config.rollout.max_completion_length)

    def _accumulate(self, rollouts: Sequence[Rollout], loss: PolicyLoss, metrics: UpdateMetrics) -> Scores:
        company, opd = self.company, self.config.opd

        def value(batch: Batch, states: Tensor) -> Tensor:
            term = loss_of(company.critic, batch, states, self.config.value, loss.counts.tokens)
            metrics.note("value/loss", float(term.detach()) * loss.counts.tokens, len(batch.learn))
            return term

        by_loss = opd is not None and opd.place == "loss"
        shared = company.critic is not None and self.config.value.trunk == "shared"
        reading = Reading(
            temperature=self.config.rollout.temperature, score_first=loss.score_first,
            judge=judge_of(company.teacher) if by_loss else None, divergence=opd.divergence if by_loss else None,
            also=value if shared else None)
        return accumulate(self.learner, rollouts, loss.on, reading)


def _with(rollouts: Sequence[Rollout], name: str, values: Sequence[tuple[float, ...]]) -> list[Rollout]:
    return [replace(r, **{name: v}) for r, v in zip(rollouts, values, strict=True)]
