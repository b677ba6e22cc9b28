"""Who gets the credit: graded rollouts become rollouts with an advantage for every learned token.

In: all rollouts of a step, graded, with what reference and critic say of them. Out: the same with `credit` (n,), and
with `returns` (n,) where there is a critic. Baseline × scale × discounts × KL in the reward are independent choices;
an algorithm is a point among them (`train/presets.py`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from tinyr2.core.config import Config
from tinyr2.core.types import Rollout
from tinyr2.objectives import kl as kls
from tinyr2.objectives.advantage import discounted_outcome, group_mean, leave_one_out, scaled, spread, whiten
from tinyr2.objectives.value import adaptive_lambda, discounted_sum, gae

Rewards = Mapping[str, tuple[float, float | None]]  # by name: weight and discount; None: that of the config


class AdvantageConfig(Config):
    """How rewards become advantages."""

    baseline: Literal["none", "group_mean", "leave_one_out", "value"] = "group_mean"
    # group_std, batch_std: of the answers' rewards; whiten: mean 0 and variance 1 over all tokens of the step
    scale: Literal["none", "group_std", "batch_std", "whiten"] = "none"
    eps: float = Field(1e-4, ge=0)  # added to the standard deviation; equal rewards give exactly 0 whatever it is
    gamma: float = Field(1.0, gt=0, le=1)  # discount a token
    lam: float = Field(1.0, ge=0, le=1)  # of the policy's GAE; read with a value baseline
    lam_alpha: float | None = Field(None, gt=0)  # length-adaptive lam = 1 - 1/(lam_alpha · length) in its place
    lam_floor: float = Field(0.0, ge=0, le=1)  # that lam is never lower: for short answers it would be negative
    bootstrap_truncated: bool = False  # an answer that was cut off goes on at the critic's value; else it ends there


class KlConfig(Config):
    """How far from the reference the policy may go; d = log π − log π_ref of a sampled token."""

    place: Literal["none", "loss", "token_reward", "sequence_reward"] = "none"
    estimator: Literal["k1", "k2", "k3"] = "k3"  # d, d²/2, e⁻ᵈ − 1 + d
    beta: float = Field(0.0, ge=0)
    ratio: bool = False  # in the loss, times π/π_old: unbiased when off-policy (DeepSeek-V3.2, 2512.02556)

    @field_validator("place", mode="before")
    @classmethod
    def _one_place(cls, place: Any) -> Any:
        if isinstance(place, list | tuple):
            raise ValueError(f"{' and '.join(map(str, place))}: a KL in several places counts several times; "
                             "choose one")
        return place


def assign_credit(rollouts: Sequence[Rollout], advantage: AdvantageConfig, kl: KlConfig, rewards: Rewards, *,
                  critic_lam: float = 1.0, last_values: Sequence[float] | None = None) -> list[Rollout]:
    """The rollouts that can be learned from, with their credit; those without a verdict or a baseline are left out.

    rollouts     of whole groups, graded; with `reference_logp` where the KL is in the reward, `values` with a critic
    critic_lam   λ of the critic's targets    last_values (B,) the critic's value after each rollout's last token
    """
    outcomes = [_outcome(r, kl) for r in rollouts]
    centered = _centered(rollouts, outcomes, outcomes, advantage)
    kept = [i for i, a in enumerate(centered) if a is not None]
    if not kept:
        return []
    chosen, lengths = [rollouts[i] for i in kept], [rollouts[i].learned for i in kept]
    shares = {g: torch.tensor([share[i] for i in kept], dtype=torch.float64)
              for g, share in _shares(rollouts, outcomes, rewards, advantage).items()}
    penalty = _penalty(chosen, kl)
    if advantage.baseline == "value":
        ends = None if last_values is None else [last_values[i] for i in kept]
        reward = _reward(shares, penalty, lengths, advantage.gamma)
        credit, returns = _by_critic(chosen, reward, advantage, critic_lam, ends)
    else:
        credit, returns = _by_outcome(shares, penalty, lengths, advantage.gamma), None
    if advantage.scale == "whiten":
        credit = whiten(credit)
    targets = [None] * len(chosen) if returns is None else [tuple(t.tolist()) for t in returns.split(lengths)]
    own = [None if advantage.baseline == "value" else centered[i] for i in kept]  # a critic centers tokens, not answers
    return [replace(r, advantage=a, credit=tuple(c.tolist()), returns=target)
            for a, r, c, target in zip(own, chosen, credit.split(lengths), targets, strict=True)]


def old_logp(rollout: Rollout) -> tuple[float, ...]:
    """(n,) nats of the learned tokens, by the policy before the step's first update."""
    if rollout.old_logp is not None:
        return rollout.old_logp
    assert rollout.actor_logp is not None, "a policy of ours wrote what is reinforced"
    mask = rollout.learn_mask or (True,) * len(rollout.response_ids)
    return tuple(v for v, m in zip(rollout.actor_logp, mask, strict=True) if m)


def _outcome(rollout: Rollout, kl: KlConfig) -> float | None:
    """The answer's reward, less β · Σ KL where that is a part of it; None without a verdict."""
    if rollout.reward is None or rollout.error is not None or not rollout.learned:
        return None
    if kl.place != "sequence_reward" or not kl.beta:
        return rollout.reward
    return rollout.reward - kl.beta * float(_estimate(rollout, kl).sum())


def _estimate(rollout: Rollout, kl: KlConfig) -> Tensor:
    assert rollout.reference_logp is not None, "the reference scores rollouts before credit is assigned"
    pair = (torch.tensor(v, dtype=torch.float64) for v in (old_logp(rollout), rollout.reference_logp))
    return kls.estimate(kl.estimator, *pair)


def _centered(rollouts: Sequence[Rollout], values: Sequence[float | None], outcomes: Sequence[float | None],
              config: AdvantageConfig) -> list[float | None]:
    """(B,) values less their baseline, over the scale of the outcomes; linear in the values."""
    out = list(values)
    if config.baseline in ("group_mean", "leave_one_out"):
        center = group_mean if config.baseline == "group_mean" else leave_one_out
        for members in groups_of(rollouts):
            found = center([values[i] for i in members])
            if config.scale == "group_std":
                found = scaled(found, spread([outcomes[i] for i in members]), eps=config.eps)
            for i, a in zip(members, found, strict=True):
                out[i] = a
    return scaled(out, spread(outcomes), eps=config.eps) if config.scale == "batch_std" else out


def groups_of(rollouts: Sequence[Rollout]) -> list[list[int]]:
    """Indices of the rollouts that answer the same problem, group by group."""
    groups: dict[int, list[int]] = {}
    for i, r in enumerate(rollouts):
        groups.setdefault(r.group, []).append(i)
    return list(groups.values())


def _shares(rollouts: Sequence[Rollout], outcomes: Sequence[float | None], rewards: Rewards,
            config: AdvantageConfig) -> dict[float, list[float | None]]:
    """By discount, the share (B,) of each outcome that is discounted so, centered like the outcome, which is their sum.

    Rewards with discounts of their own: Yeo et al. 2025, arXiv 2502.03373, Section 4.
    """
    shares: dict[float, list[float | None]] = {}
    rest = list(outcomes)
    for gamma in sorted({g for _, g in rewards.values() if g is not None} - {config.gamma}):
        part = [None if x is None else sum(w * (r.reward_parts.get(name) or 0.0) for name, (w, g) in rewards.items()
                                           if g == gamma) for x, r in zip(outcomes, rollouts, strict=True)]
        rest = [None if x is None else x - p for x, p in zip(rest, part, strict=True)]
        shares[gamma] = part
    shares[config.gamma] = rest
    if config.baseline == "value":
        return shares
    return {g: _centered(rollouts, share, outcomes, config) for g, share in shares.items()}


def _penalty(rollouts: Sequence[Rollout], kl: KlConfig) -> Tensor | None:
    """(N,) what each token pays for its distance from the reference; None where it pays nothing."""
    if kl.place != "token_reward" or not kl.beta:
        return None
    return torch.cat([-kl.beta * _estimate(r, kl) for r in rollouts])


def _by_outcome(shares: Mapping[float, Tensor], penalty: Tensor | None, lengths: list[int], gamma: float) -> Tensor:
    """(N,) the centered outcome, discounted back from the last token, and all penalties still to come."""
    credit = sum(discounted_outcome(share, lengths, gamma=g) for g, share in shares.items())
    return credit if penalty is None else credit + discounted_sum(penalty, lengths, gamma)


def _reward(shares: Mapping[float, Tensor], penalty: Tensor | None, lengths: list[int], gamma: float) -> Tensor:
    """(N,) rewards whose sum from a token on, discounted by `gamma`, is each share discounted by its own.

    For the share of discount gamma itself that is the outcome at the last token, and 0 before.
    """
    reward = torch.zeros(sum(lengths), dtype=torch.float64)
    last = torch.tensor(lengths).cumsum(0) - 1
    for g, share in shares.items():
        back = discounted_outcome(share, lengths, gamma=g)
        following = torch.cat([back[1:], back.new_zeros(1)])
        following[last] = 0.0
        reward += back - gamma * following
    return reward if penalty is None else reward + penalty


def _by_critic(rollouts: Sequence[Rollout], reward: Tensor, config: AdvantageConfig, critic_lam: float,
               ends: Sequence[float] | None) -> tuple[Tensor, Tensor]:
    """(N,) generalized advantages with the policy's λ, and the critic's targets with its own."""
    lengths = [r.learned for r in rollouts]
    value = torch.cat([torch.tensor(r.values, dtype=torch.float64) for r in rollouts])
    last = None
    if config.bootstrap_truncated:
        assert ends is not None, "the critic is asked what it expects after a cut"
        last = torch.tensor([v if r.finish == "length" else math.nan for r, v in zip(rollouts, ends, strict=True)],
                            dtype=torch.float64)
    lam: float | Tensor = config.lam
    if config.lam_alpha is not None:
        lam = adaptive_lambda(lengths, alpha=config.lam_alpha, floor=config.lam_floor)
    credit = gae(reward, value, lengths, gamma=config.gamma, lam=lam, last_value=last)
    return credit, value + gae(reward, value, lengths, gamma=config.gamma, lam=critic_lam, last_value=last)
