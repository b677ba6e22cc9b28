"""Numbers of a step, under TRL's names where the meaning is the same.

In: scores and rollouts. Out: a flat mapping of floats; what was not measured is absent, never 0.
"""

from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean, stdev

from tinyr2.core.types import Rollout
from tinyr2.objectives.policy import truncated_importance
from tinyr2.train.step import Scores


def score_metrics(scores: Scores, importance_cap: float | None = None) -> dict[str, float]:
    """loss, entropy, kl (the divergence that the loss reads, nats per token) and the actor/learner gap.

    importance_cap: of the weights that the loss put on sampled tokens, which are then reported too; None: it put none
    """
    out = {"loss": scores.loss}
    if not len(scores.row):
        return out
    out["entropy"] = float(scores.entropy.mean())
    if scores.divergence is not None:
        out["kl"] = float(scores.divergence.mean())
    elif scores.teacher_logp is not None:
        out["kl"] = float((scores.learner_logp - scores.teacher_logp).mean())
    if scores.teacher_gap is not None:  # of teachers that know log-probs alone: the reverse KL's estimate
        out["kl"] = out.get("kl", 0.0) - float(scores.teacher_gap.mean())
    gap = (scores.learner_logp - scores.actor_logp).abs()
    sampled = ~gap.isnan()
    gap = gap[sampled]
    if not len(gap):
        return out
    out["sampling/sampling_logp_difference/mean"] = float(gap.mean())
    out["sampling/sampling_logp_difference/max"] = float(gap.max())
    if importance_cap is not None:
        ratio = truncated_importance(scores.learner_logp[sampled], scores.actor_logp[sampled], importance_cap)
        out |= {f"sampling/importance_sampling_ratio/{name}": float(value)
                for name, value in (("min", ratio.min()), ("mean", ratio.mean()), ("max", ratio.max()))}
    return out


def teacher_metrics(scores: Scores) -> dict[str, float]:
    """Of each teacher: its KL or the gap of what it says, per token; what it knew, kept, or could not read.

    Nothing where one teacher compares every token: that is `kl`.
    """
    if len(scores.facts) == 1:
        return {}
    return {name: total / count for name, (total, count) in scores.facts.items() if count}


def completion_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Lengths in tokens and the truncated share, of what was sampled."""
    sampled = [r for r in rollouts if r.author != "dataset"]
    if not sampled:
        return {}
    lengths = [len(r.response_ids) for r in sampled]
    ended = [len(r.response_ids) for r in sampled if r.finish == "stop"]
    out = {"completions/mean_length": fmean(lengths), "completions/min_length": float(min(lengths)),
           "completions/max_length": float(max(lengths)),
           "completions/clipped_ratio": 1 - len(ended) / len(sampled)}
    if ended:
        out["completions/mean_terminated_length"] = fmean(ended)
    return out


def reward_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Rewards, their parts, the share of groups with equal rewards, and the share of rollouts that failed."""
    out: dict[str, float] = {}
    rewards = [r.reward for r in rollouts if r.reward is not None]
    if rewards:
        out |= {"reward": fmean(rewards), "reward_std": stdev(rewards) if len(rewards) > 1 else 0.0}
        groups = defaultdict(list)
        for r in rollouts:
            if r.reward is not None:
                groups[r.group, r.author].append(r.reward)
        several = [g for g in groups.values() if len(g) > 1]
        if several:
            out["frac_reward_zero_std"] = sum(len(set(g)) == 1 for g in several) / len(several)
    for name in dict.fromkeys(n for r in rollouts for n in r.reward_parts):
        part = [r.reward_parts[name] for r in rollouts if r.reward_parts.get(name) is not None]
        if part:
            out |= {f"rewards/{name}/mean": fmean(part), f"rewards/{name}/std": stdev(part) if len(part) > 1 else 0.0}
    if rollouts:
        out["rollouts/errored_ratio"] = sum(r.error is not None for r in rollouts) / len(rollouts)
    return out
