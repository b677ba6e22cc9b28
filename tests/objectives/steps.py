"""One optimizer step's loss of every policy preset, twice: through the objectives, and through loops in float64.

A combination names a point of the space; its numbers are those of the preset's paper, or larger where two tokens and
one step would leave them without effect.
"""

from dataclasses import dataclass

import torch

from tests.objectives import language, loops
from tinyr2.objectives.advantage import group_mean, leave_one_out, scaled, spread, whiten
from tinyr2.objectives.kl import estimate
from tinyr2.objectives.policy import clipped_surrogate, sequence_ratio, token_weight, weighted_nll
from tinyr2.objectives.value import adaptive_lambda, discounted_sum, gae, value_loss


@dataclass(frozen=True, kw_only=True)
class Combination:
    baseline: str = "group_mean"       # none, group_mean, leave_one_out, value
    scale: str = "none"                # none, group_std, whiten (all tokens of the step)
    aggregation: str = "token"
    constant: float = 1.0
    low: float = 0.2
    high: float = 0.2
    level: str = "token"
    kl: tuple[str, str, float] | None = None    # estimator, place, coefficient
    gamma: float = 1.0
    lam: float = 1.0
    alpha: float | None = None         # of a lambda that follows the length, for the policy alone
    nll: float = 0.0                   # weight of the likelihood of right answers, reward >= 0.5
    value_clip: float | None = None


PRESETS = {
    "ppo": Combination(baseline="value", scale="whiten", lam=0.95, value_clip=0.2, kl=("k1", "reward", 0.02)),
    "orz": Combination(baseline="value", scale="whiten"),
    "vapo": Combination(baseline="value", scale="whiten", high=0.28, alpha=0.8, nll=0.1),
    "grpo": Combination(scale="group_std", aggregation="sequence", kl=("k3", "loss", 0.04)),
    "r1_zero": Combination(scale="group_std", aggregation="sequence", low=10.0, high=10.0, kl=("k3", "loss", 0.001)),
    "dr_grpo": Combination(aggregation="constant", constant=2.0),
    "dapo": Combination(scale="group_std", high=0.28),
    "gspo": Combination(scale="group_std", aggregation="sequence", low=3e-4, high=4e-4, level="sequence_mean"),
    "rloo": Combination(baseline="leave_one_out", aggregation="sequence", level="sequence", kl=("k1", "reward", 0.03)),
    "reinforce_pp": Combination(baseline="none", scale="whiten", kl=("k1", "reward", 0.01)),
    "reinforce_pp_baseline": Combination(scale="whiten", kl=("k2", "loss", 0.01)),
}


@dataclass(frozen=True)
class Tables:
    """What the step reads in each state: logits of three policies, and the critic's values, new and old."""

    learner: torch.Tensor      # (3, 3), needs grad
    old: torch.Tensor          # (3, 3), of the policy that wrote
    reference: torch.Tensor    # (3, 3)
    value: torch.Tensor        # (3,), needs grad
    old_value: torch.Tensor    # (3,)


def vectorized(c, tables, answers):
    """The loss of a step of groups of two."""
    lengths = [len(a) for a in answers]
    places = torch.tensor([s for a in answers for s in language.states(a)])
    tokens = torch.tensor([y for a in answers for y in a])
    policies = (tables.learner, tables.old, tables.reference)
    learner, old, reference = (x.log_softmax(-1)[places, tokens] for x in policies)
    advantage, target = _credit(c, tables.old_value[places], old - reference, answers, lengths)
    if c.scale == "whiten":
        advantage = whiten(advantage)
    weight = token_weight(lengths, aggregation=c.aggregation, tokens=len(tokens), sequences=len(answers),
                          constant=c.constant, dtype=torch.float64)
    log_ratio = learner - old
    if c.level != "token":
        log_ratio = sequence_ratio(learner.detach(), old, lengths, level=c.level).log_ratio(learner, slice(None))
    terms = clipped_surrogate(log_ratio, advantage, low=c.low, high=c.high)
    if c.kl is not None and c.kl[1] == "loss":
        terms = terms + c.kl[2] * estimate(c.kl[0], learner, reference)
    loss = (weight * terms).sum()
    if c.nll:
        right = torch.tensor([float(language.REWARDS[a] >= 0.5) for a in answers for _ in a], dtype=torch.float64)
        loss = loss + c.nll * weighted_nll(learner, right, denom=max(right.sum().item(), 1.0))
    if c.baseline == "value":
        loss = loss + value_loss(tables.value[places], tables.old_value[places], target, weight, clip=c.value_clip)
    return loss


def _credit(c, old_value, gap, answers, lengths):
    """The advantage of each token, and the critic's target where there is one."""
    reward = torch.zeros(len(gap), dtype=torch.float64)
    coefficient = c.kl[2] if c.kl is not None and c.kl[1] == "reward" else 0.0
    if c.baseline in ("none", "value"):
        ends = torch.tensor(lengths).cumsum(0) - 1
        reward[ends] = torch.tensor([language.REWARDS[a] for a in answers], dtype=torch.float64)
        reward = reward - coefficient * gap
        if c.baseline == "none":
            return discounted_sum(reward, lengths, c.gamma), None
        lam = c.lam if c.alpha is None else adaptive_lambda(lengths, alpha=c.alpha, dtype=torch.float64)
        target = gae(reward, old_value, lengths, gamma=c.gamma, lam=c.lam) + old_value
        return gae(reward, old_value, lengths, gamma=c.gamma, lam=lam), target
    kl = [part.sum().item() for part in gap.split(lengths)]
    rewards = [language.REWARDS[a] - coefficient * k for a, k in zip(answers, kl, strict=True)]
    credit = []
    for group in (rewards[i:i + 2] for i in range(0, len(rewards), 2)):
        centered = {"group_mean": group_mean, "leave_one_out": leave_one_out}[c.baseline](group)
        credit += scaled(centered, spread(group), eps=1e-4) if c.scale == "group_std" else centered
    return torch.tensor(credit, dtype=torch.float64).repeat_interleave(torch.tensor(lengths)), None


def looped(c, tables, answers):
    """The same loss, number by number."""
    learner, old, reference = ([language.logps(x, a) for a in answers]
                               for x in (tables.learner, tables.old, tables.reference))
    old, reference = ([[x.item() for x in row] for row in rows] for rows in (old, reference))
    advantage, target = _looped_credit(c, tables.old_value.tolist(), old, reference, answers)
    if c.scale == "whiten":
        flat = loops.whiten([a for row in advantage for a in row], 1e-8)
        advantage = loops.split(flat, [len(a) for a in answers])
    tokens, loss = sum(len(a) for a in answers), 0.0
    right = sum(len(a) for a in answers if language.REWARDS[a] >= 0.5)
    for i, answer in enumerate(answers):
        if c.level != "token":
            s = loops.sequence_log_ratio(learner[i], old[i], c.level)
            loss = loss + loops.clipped_surrogate(s, advantage[i][0], c.low, c.high) / len(answers)
        for t, state in enumerate(language.states(answer)):
            weight = {"token": 1 / tokens, "sequence": 1 / (len(answers) * len(answer)),
                      "constant": 1 / (len(answers) * c.constant)}[c.aggregation]
            if c.level == "token":
                log_ratio = learner[i][t] - old[i][t]
                loss = loss + weight * loops.clipped_surrogate(log_ratio, advantage[i][t], c.low, c.high)
            if c.kl is not None and c.kl[1] == "loss":
                loss = loss + weight * c.kl[2] * loops.estimate(c.kl[0], learner[i][t], reference[i][t])
            if language.REWARDS[answer] >= 0.5:
                loss = loss - c.nll * learner[i][t] / right
            if c.baseline == "value":
                loss = loss + loops.value_loss([tables.value[state]], [tables.old_value[state].item()],
                                               [target[i][t]], [weight], c.value_clip)
    return loss


def _looped_credit(c, old_value, old, reference, answers):
    coefficient = c.kl[2] if c.kl is not None and c.kl[1] == "reward" else 0.0
    kl = [[p - q for p, q in zip(*row, strict=True)] for row in zip(old, reference, strict=True)]
    rewards = [language.REWARDS[a] for a in answers]
    advantage, target = [], []
    if c.baseline in ("none", "value"):
        for answer, outcome, gaps in zip(answers, rewards, kl, strict=True):
            reward = [-coefficient * k for k in gaps]
            reward[-1] += outcome
            if c.baseline == "none":
                advantage.append(loops.discounted_sum(reward, c.gamma))
                continue
            value = [old_value[s] for s in language.states(answer)]
            lam = c.lam if c.alpha is None else loops.adaptive_lambda(len(answer), c.alpha, 0.0)
            advantage.append(loops.gae(reward, value, c.gamma, lam, None))
            returns = loops.gae(reward, value, c.gamma, c.lam, None)
            target.append([a + v for a, v in zip(returns, value, strict=True)])
        return advantage, target
    shaped = [r - coefficient * sum(gaps) for r, gaps in zip(rewards, kl, strict=True)]
    for i in range(0, len(shaped), 2):
        group = shaped[i:i + 2]
        centered = (loops.leave_one_out if c.baseline == "leave_one_out" else loops.group_mean)(group)
        if c.scale == "group_std":
            centered = loops.scaled(centered, loops.spread(group), 1e-4)
        advantage += [[a] * len(answer) for a, answer in zip(centered, answers[i:i + 2], strict=True)]
    return advantage, target
