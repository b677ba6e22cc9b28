"""Symptoms: for each thing that can go wrong in a run, the rule that sees it in one step's metrics.

In: thresholds, one step's metrics, what earlier steps left in memory. Out: a finding (level, evidence, what to do), or
None where the metric is not there. How many findings in a row make an alarm is `health.py`'s business.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Literal

from pydantic import Field, field_validator

from tinyr2.core.config import Config

Level = Literal["warn", "critical"]
Metrics = Mapping[str, float]


class HealthConfig(Config):
    """Thresholds of the alarms. Shares lie in 0 … 1, lengths are tokens, entropies and log-probs nats per token."""

    warmup_steps: int = Field(20, ge=0)  # silent at first, but for NaN, the log-prob gap and errored rollouts
    patience: int = Field(3, ge=1)  # steps in a row that raise most alarms, and as many healthy ones clear them
    baseline_steps: int = Field(5, ge=1)  # "initial" is the mean of this many first steps
    non_finite_stop: int = Field(3, ge=1)  # steps in a row with NaN or infinity that stop the run
    grad_norm_window: int = Field(50, ge=5)  # steps of the running median
    grad_norm_warn_ratio: float = Field(5.0, gt=1)  # × running median, grad_norm_patience times in a row
    grad_norm_critical_ratio: float = Field(10.0, gt=1)
    grad_norm_patience: int = Field(2, ge=1)
    grad_norm_floor: float = Field(0.01, gt=0)  # a median below counts as this: small norms may jump freely
    grad_norm_high: float = Field(100.0, gt=0)  # warns whatever the median
    entropy_ratio: float = Field(0.2, gt=0, lt=1)  # × initial: warn
    entropy_low: float = Field(0.01, ge=0)  # critical
    entropy_patience: int = Field(20, ge=1)
    entropy_kl_close: float = Field(0.05, ge=0)  # KL to the teacher under which certainty is the teacher's own
    entropy_earned: float = Field(0.5, gt=0, lt=1)  # × initial: a distance to the goal that excuses certainty
    length_window: int = Field(50, ge=10)
    length_growth: float = Field(2.0, gt=1)  # × within the window: warn
    length_floor: float = Field(16.0, ge=0)  # answers shorter than this do not explode
    length_cap_ratio: float = Field(0.95, gt=0, le=1)  # × the cap: critical
    clipped_ratio_warn: float = Field(0.5, ge=0, le=1)
    clipped_ratio_critical: float = Field(0.8, ge=0, le=1)
    zero_std_warn: float = Field(0.8, ge=0, le=1)  # groups whose rewards are all equal
    zero_std_patience: int = Field(20, ge=1)  # steps with every group so: critical
    reward_worst: float = 0.0  # rewards of a wrong and of a perfect answer: they tell "all wrong" from "all right"
    reward_best: float = 1.0
    logp_gap_warn: float = Field(0.1, gt=0)  # mean |actor_logp - learner_logp|
    logp_gap_critical: float = Field(0.2, gt=0)
    errored_warn: float = Field(0.05, ge=0, le=1)
    errored_critical: float = Field(0.2, ge=0, le=1)
    max_drop: float | None = Field(None, gt=0)  # of drop_metric below its best so far: the run halts; null: no guard
    drop_metric: str = "eval_pass@1"  # of the evaluations, and of which more is better
    drop_patience: int = Field(1, ge=1)  # evaluations in a row

    @field_validator("drop_metric")
    @classmethod
    def _grows(cls, name: str) -> str:
        if not name.startswith("eval_") or name in ("eval_kl", "eval_loss"):
            raise ValueError("the guard watches what an evaluation finds and of which more is better; take eval_pass@1 "
                             "or another of the eval_ metrics")
        return name


@dataclass(frozen=True)
class Finding:
    """What a rule sees at one step; level None is health."""

    level: Level | None
    evidence: str = ""
    action: str = ""


@dataclass
class Memory:
    """What the rules remember between steps."""

    first_step: int | None = None
    grad_norms: list[float] = field(default_factory=list)  # newest last; steps without any gradient left out
    lengths: list[float] = field(default_factory=list)  # newest last; after warm-up
    baselines: dict[str, list[float]] = field(default_factory=dict)  # first values of entropy, kl, reward, loss
    best: float | None = None  # of drop_metric, over all evaluations
    best_step: int | None = None  # where it was first reached


def value(metrics: Metrics, name: str) -> float | None:
    """The metric, or None where it is absent or not finite."""
    value = metrics.get(name)
    return value if value is not None and math.isfinite(value) else None


def _initial(config: HealthConfig, memory: Memory, name: str) -> float | None:
    seen = memory.baselines.get(name, [])
    return fmean(seen) if len(seen) >= config.baseline_steps else None


def _above(value: float, warn: float, critical: float) -> Level | None:
    return "critical" if value > critical else "warn" if value > warn else None


def non_finite(config: HealthConfig, metrics: Metrics, memory: Memory) -> Finding | None:
    """A loss or gradient norm that is no number."""
    seen = {name: metrics[name] for name in ("loss", "grad_norm") if metrics.get(name) is not None}
    if not seen:
        return None
    bad = [f"{name} is {value}" for name, value in seen.items() if not math.isfinite(value)]
    return Finding(
        "critical" if bad else None, ", ".join(bad),
        f"{config.non_finite_stop} such steps in a row stop the run; start a new one with a lower "
        "learning_rate or max_grad_norm; try float32 in place of bf16; look for empty loss masks and for rewards that "
        "are not finite")


def grad_norm(config: HealthConfig, metrics: Metrics, memory: Memory) -> Finding | None:
    """A gradient norm far above the run's own median."""
    norm = value(metrics, "grad_norm")
    if norm is None or len(memory.grad_norms) < config.baseline_steps:
        return None
    usual = max(median(memory.grad_norms), config.grad_norm_floor)
    level = _above(norm / usual, config.grad_norm_warn_ratio, config.grad_norm_critical_ratio)
    if level is None and norm > config.grad_norm_high:
        level = "warn"
    return Finding(
        level, f"grad_norm {norm:.4g}, {norm / usual:.3g} × the median {usual:.4g} of the last "
        f"{len(memory.grad_norms)} steps",
        "lower learning_rate; set max_grad_norm near the median; look at this step's completions for outliers in "
        "length or reward")


def entropy(config: HealthConfig, metrics: Metrics, memory: Memory) -> Finding | None:
    """Certain without a reason.

    The absolute levels of the literature come from models of 1–30 B on open text. A tiny student of a task with one
    right wording legitimately falls from 1.2 to 0.01 nats, since its teacher is that certain too, so low entropy alone
    says nothing. It is a collapse where the goal did not come nearer: for a student that puts all its mass on one
    token, KL(student‖teacher) is the teacher's surprise at that token, so a small KL means shared certainty and a
    large one means a student sure of what its teacher would not write. Without a teacher the reward decides. Supervised
    text has neither: to be sure of it is what was asked for.
    """
    if value(metrics, "kl") is None and value(metrics, "reward") is None:
        return None
    entropy, initial = value(metrics, "entropy"), _initial(config, memory, "entropy")
    if entropy is None or initial is None:
        return None
    level: Level | None = None
    if entropy < config.entropy_low:
        level = "critical"
    elif entropy < config.entropy_ratio * initial:
        level = "warn"
    goal = _goal(config, metrics, memory)
    if level is not None and goal is not None and goal[0]:
        level = None
    return Finding(
        level, f"entropy {entropy:.4g} nats per token, {entropy / initial if initial else 1:.1%} of the initial "
        f"{initial:.4g}" + (f", while {goal[1]}" if goal else ""),
        "lower learning_rate; check that completions differ (temperature 1, varied prompts); give KL to the teacher "
        "or reference more weight, or use forward KL, which covers all that the teacher would write")


def _goal(config: HealthConfig, metrics: Metrics, memory: Memory) -> tuple[bool, str] | None:
    """Whether the goal is near enough to explain certainty, and the numbers; None without any measure of it."""
    for name in ("kl", "reward", "loss"):
        now, initial = value(metrics, name), _initial(config, memory, name)
        if now is None or initial is None:
            continue
        numbers = f"{name} is {now:.4g} (initially {initial:.4g})"
        if name == "kl" and now <= config.entropy_kl_close:
            return True, numbers
        if name == "kl" and initial <= config.entropy_kl_close:
            continue  # a distance that started near 0 is one from the start (a reference), and no goal
        best = config.reward_best if name == "reward" else 0.0
        near = abs(now - best) <= config.entropy_earned * abs(initial - best) or (name == "reward" and now >= best)
        return near, numbers
    return None


def length(config: HealthConfig, metrics: Metrics, memory: Memory) -> Finding | None:
    """Answers that grow without bound, or sit at the limit."""
    mean, longest = value(metrics, "completions/mean_length"), value(metrics, "completions/max_length")
    if mean is None:
        return None
    action = ("read the longest completions for repetition; check that the end token is in the learned tokens; "
              "penalize length or lower max_completion_length")
    # Where something was cut, the longest completion is as long as the cap.
    if longest and value(metrics, "completions/clipped_ratio") and mean >= config.length_cap_ratio * longest:
        return Finding("critical", f"mean length {mean:.1f} tokens is at the cap of {longest:.0f}", action)
    values = [*memory.lengths, mean][-config.length_window:]
    few = config.baseline_steps
    if len(values) < 2 * few:
        return Finding(None)
    before, now = fmean(values[:few]), fmean(values[-few:])
    grew = now >= config.length_floor and now > config.length_growth * before
    return Finding("warn" if grew else None,
                    f"mean length {now:.1f} tokens, {before:.1f} {len(values) - few} steps ago", action)


def truncation(config: HealthConfig, metrics: Metrics, memory: Memory) -> Finding | None:
    """Answers cut off at the limit."""
    clipped = value(metrics, "completions/clipped_ratio")
    if clipped is None:
        return None
    return Finding(
        _above(clipped, config.clipped_ratio_warn, config.clipped_ratio_critical),
        f"completions/clipped_ratio {clipped:.3g}: {clipped:.0%} of completions were cut before they ended",
        "raise max_completion_length; check that the end token is trained and that generation stops at it; read a few "
        "cut completions for repetition")


def equal_rewards(config: HealthConfig, metrics: Metrics, memory: Memory) -> Finding | None:
    """Groups whose answers all earn the same, and so teach nothing."""
    equal = value(metrics, "frac_reward_zero_std")
    if equal is None:
        return None
    level = _above(equal, config.zero_std_warn, math.nextafter(1.0, 0.0))
    reward, span = value(metrics, "reward"), config.reward_best - config.reward_worst
    share = None if reward is None or not span else (reward - config.reward_worst) / span
    if share is None:
        cause, action = "reward mean unknown", "log the reward to see whether all are right, all wrong or constant"
    elif share >= 0.95:
        # The task is solved: worth one word, but nothing is broken, so it never grows critical.
        level = "warn" if level else None
        cause, action = "all right", "stop here, or give harder problems"
    elif share <= 0.05:
        cause, action = "all wrong", ("give easier problems or a longer cold start; check that the grader parses the "
                                      "answers; read a few completions")
    else:
        cause, action = "constant within groups", (
            "check that the reward function looks at the completion and that temperature is not near 0; leave out "
            "problems that are always or never solved")
    mean = "" if reward is None else f", reward mean {reward:.4g}"
    return Finding(level, f"{equal:.0%} of groups have equal rewards{mean}: {cause}", action)


def logp_gap(config: HealthConfig, metrics: Metrics, memory: Memory) -> Finding | None:
    """Sampler and learner that disagree on the same tokens."""
    gap = value(metrics, "sampling/sampling_logp_difference/mean")
    if gap is None:
        return None
    return Finding(
        _above(gap, config.logp_gap_warn, config.logp_gap_critical),
        f"mean |actor_logp - learner_logp| {gap:.4g} nats per token",
        "check that the engine took over the newest weights; compare temperature and dtype of sampling and scoring; "
        "sample with the reference engine to see which side is wrong")


def dropped(config: HealthConfig, metrics: Metrics, memory: Memory) -> Finding | None:
    """Answers without a verdict, by a grader's fault or because it could not decide."""
    dropped = value(metrics, "rollouts/dropped_ratio")
    if dropped is None:
        return None
    return Finding(
        _above(dropped, config.errored_warn, config.errored_critical),
        f"rollouts/dropped_ratio {dropped:.3g}: {dropped:.1%} of rollouts have no verdict and teach nothing",
        "read the errors in completions/; look for problems without an answer and for verdicts that ran out of time")


def errored(config: HealthConfig, metrics: Metrics, memory: Memory) -> Finding | None:
    """Answers that no grader could grade."""
    errored = value(metrics, "rollouts/errored_ratio")
    if errored is None:
        return None
    return Finding(
        _above(errored, config.errored_warn, config.errored_critical),
        f"rollouts/errored_ratio {errored:.3g}: {errored:.1%} of rollouts carry an error",
        "read the errors in completions/; mend the grader or the teacher's connection; such rollouts train nothing")


def unheard(config: HealthConfig, metrics: Metrics, memory: Memory) -> Finding | None:
    """A teacher whose server fails to answer, or that could read none of the answers that are its business."""
    failed = {n: v for n, v in metrics.items() if n.startswith("teacher/") and n.endswith("/failed")}
    silent = {n: v for n, v in metrics.items() if n.startswith("teacher/") and n.endswith("/unread") and v == 1}
    name, share = max({**failed, **silent}.items(), key=lambda found: found[1], default=(None, None))
    if name is None:
        return None
    level = "warn" if name in silent else _above(share, config.errored_warn, config.errored_critical)
    return Finding(
        level, f"{name} {share:.3g}: this teacher says nothing of {share:.1%} of the answers",
        "look at its server (timeouts, load), its context length (a longer paper is no paper), and what a privileged "
        "teacher is shown; answers without a judgment train nothing")


def held_out_drop(config: HealthConfig, metrics: Metrics, memory: Memory) -> Finding | None:
    """A student that unlearns: far worse on the held-out problems than it has been.

    Of a privileged self-teacher this is known to happen within tens of steps, while its loss looks well.
    """
    now = value(metrics, config.drop_metric)
    if now is None or config.max_drop is None or memory.best is None:
        return None
    return Finding(
        "critical" if now < memory.best - config.max_drop else None,
        f"{config.drop_metric} {now:.4g}, {memory.best - now:.3g} below its best, {memory.best:.4g} at step "
        f"{memory.best_step}",
        "the best model so far is in best/, take that one; for a new run, give a KL to the start (guard.kl_to_start), "
        "a lower learning_rate, a self-teacher that follows more slowly (a decay nearer to 1), or show the teacher "
        "less")
