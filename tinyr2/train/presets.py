"""Named points in the space of policy-gradient methods, each with its paper's equation and defaults.

A preset fills what a config leaves out; any key given there wins. Learning rates and batch sizes are not the papers':
those were chosen for models of 1 to 70 billion parameters.
"""

from typing import Any, Literal

from tinyr2.core.config import nearest

Algorithm = Literal["ppo", "orz", "vapo", "grpo", "r1_zero", "dr_grpo", "dapo", "gspo", "rloo", "reinforce_pp",
                    "reinforce_pp_baseline"]

ON_PAIRS = ("dpo", "rm")  # algorithms that learn from pairs, and have configs of their own

PRESETS: dict[str, dict[str, Any]] = {
    # Schulman et al. 2017, 1707.06347, eq. 7, with GAE (1506.02438, eq. 16) and, after Ouyang et al. 2022, 2203.02155,
    # Section 3.5, the KL to the reference as a token's reward: β 0.02. γ 1, λ 0.95, ε 0.2, four passes over a batch.
    "ppo": {
        "rollout": {"num_generations": 1},
        "advantage": {"baseline": "value", "scale": "whiten", "lam": 0.95},
        "kl": {"place": "token_reward", "estimator": "k1", "beta": 0.02},
        "loss": {"aggregation": "token", "epsilon": 0.2},
        "value": {"clip": 0.2, "num_iterations": 4}, "updates": {"num_iterations": 4},
    },
    # Hu et al. 2025, 2503.24290, Section 2: PPO with γ = λ = 1, so that A = R − V (eq. 4), a binary reward, no KL;
    # one policy step and twelve critic steps a batch, the critic at five times the policy's rate.
    "orz": {
        "rollout": {"num_generations": 16},
        "advantage": {"baseline": "value", "scale": "whiten", "lam": 1.0},
        "loss": {"aggregation": "token", "epsilon": 0.2},
        "value": {"clip": None, "num_mini_batches": 12, "learning_rate_factor": 5.0},
    },
    # Yue et al. 2025, 2504.05118, with VC-PPO (2503.01491): critic pretrained on Monte-Carlo returns for 50 steps, its
    # λ 1; policy's λ = 1 − 1/(0.05 l); token-level loss, clip 0.2/0.28, 0.1 · likelihood of right answers, 16 answers a
    # prompt, a batch in 16 mini-batches, critic at twice the policy's rate. λ's floor is ours: at 20 tokens the formula
    # gives 0, below it less.
    "vapo": {
        "rollout": {"num_generations": 16},
        "advantage": {"baseline": "value", "scale": "whiten", "lam_alpha": 0.05, "lam_floor": 0.95},
        "loss": {"aggregation": "token", "epsilon": 0.2, "epsilon_high": 0.28, "positive_nll": 0.1},
        "value": {"lam": 1.0, "pretrain_steps": 50, "learning_rate_factor": 2.0, "num_mini_batches": 16},
        "updates": {"num_mini_batches": 16},
    },
    # Shao et al. 2024, 2402.03300, eq. 3: group mean and standard deviation, mean over answers of their token means,
    # ε 0.2, β 0.04 on k3 in the loss (eq. 4); 64 answers a prompt there.
    "grpo": {
        "rollout": {"num_generations": 8},
        "advantage": {"baseline": "group_mean", "scale": "group_std"},
        "kl": {"place": "loss", "estimator": "k3", "beta": 0.04},
        "loss": {"aggregation": "sequence", "epsilon": 0.2},
    },
    # DeepSeek-AI 2025, 2501.12948, eq. 1 to 3, and its supplement: GRPO with ε 10, which hardly clips, β 0.001, 16
    # answers a prompt, a batch of answers in 16 mini-batches.
    "r1_zero": {
        "rollout": {"num_generations": 16},
        "advantage": {"baseline": "group_mean", "scale": "group_std"},
        "kl": {"place": "loss", "estimator": "k3", "beta": 0.001},
        "loss": {"aggregation": "sequence", "epsilon": 10.0},
        "updates": {"num_mini_batches": 16},
    },
    # Liu et al. 2025, 2503.20783, Section 3.2: no standard deviation, and a constant (the length limit) in place of
    # each answer's length; no KL.
    "dr_grpo": {
        "rollout": {"num_generations": 8},
        "advantage": {"baseline": "group_mean", "scale": "none"},
        "loss": {"aggregation": "constant", "epsilon": 0.2},
    },
    # Yu et al. 2025, 2503.14476, eq. 8: clip 0.2/0.28, mean over all tokens, groups of equal rewards sampled anew,
    # answers that were cut off left out, a batch in 16 mini-batches; no KL. Its soft overlong punishment (eq. 13) is
    # the reward `soft_overlong`.
    "dapo": {
        "rollout": {"num_generations": 16},
        "advantage": {"baseline": "group_mean", "scale": "group_std"},
        "loss": {"aggregation": "token", "epsilon": 0.2, "epsilon_high": 0.28, "mask_truncated_completions": True},
        "sampling": {"equal_groups": "refill"}, "updates": {"num_mini_batches": 16},
    },
    # Zheng et al. 2025, 2507.18071, eq. 5 to 7: the clip reads the geometric mean of an answer's ratios; 3e-4/4e-4,
    # four mini-batches a batch, no KL.
    "gspo": {
        "rollout": {"num_generations": 8},
        "advantage": {"baseline": "group_mean", "scale": "group_std"},
        "loss": {"ratio": "sequence_mean", "aggregation": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
        "updates": {"num_mini_batches": 4},
    },
    # Ahmadian et al. 2024, 2402.14740, Section 3.3: the answer is one action, its baseline the mean of the others'
    # rewards, β 0.03 on the answer's KL in the reward; 2 or 4 answers a prompt.
    "rloo": {
        "rollout": {"num_generations": 4},
        "advantage": {"baseline": "leave_one_out", "scale": "none"},
        "kl": {"place": "sequence_reward", "estimator": "k1", "beta": 0.03},
        "loss": {"ratio": "sequence", "aggregation": "sequence", "epsilon": 0.2},
    },
    # Hu et al. 2025, 2501.03262: one answer a prompt, no critic; A_t = R − β Σ_{i≥t} k1_i, normalized over all tokens
    # of the batch; PPO's clip, β 0.01.
    "reinforce_pp": {
        "rollout": {"num_generations": 1},
        "advantage": {"baseline": "none", "scale": "whiten"},
        "kl": {"place": "token_reward", "estimator": "k1", "beta": 0.01},
        "loss": {"aggregation": "token", "epsilon": 0.2},
    },
    # The same paper's variant with a baseline: R less the group's mean, normalized over the batch, k2 in the loss.
    "reinforce_pp_baseline": {
        "rollout": {"num_generations": 8},
        "advantage": {"baseline": "group_mean", "scale": "whiten"},
        "kl": {"place": "loss", "estimator": "k2", "beta": 0.01},
        "loss": {"aggregation": "token", "epsilon": 0.2},
    },
}


def with_preset(raw: dict[str, Any]) -> dict[str, Any]:
    """`raw` on top of the preset that its `algorithm` names; a key that is given wins, `value: null` too.

    ValueError where there is no such algorithm.
    """
    name = raw.get("algorithm")
    if name is not None and name not in PRESETS:
        known = (*PRESETS, *ON_PAIRS)
        hint = nearest(str(name), known)
        raise ValueError(f"algorithm {name!r}: unknown; {f'did you mean {hint!r}? ' if hint else ''}there are "
                         f"{', '.join(known)}, or null for choices of your own")
    return _merged(PRESETS.get(name, {}), raw)


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    out = dict(below)
    for key, value in above.items():
        under = out.get(key)
        out[key] = _merged(under, value) if isinstance(under, dict) and isinstance(value, dict) else value
    return out
