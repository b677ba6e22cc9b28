"""What a reinforcement run trains and remembers: policy, critic, pass rates. All of it is in a checkpoint.

In: modules. Out: one module, whose trained parameters and buffers `train/state.py` saves and restores.
"""

import torch
from torch import Tensor, nn

from tinyr2.train.critic import ValueConfig
from tinyr2.train.optim import Joint, Offloaded, OptimConfig, Optimizer, make_optimizer


class Agent(nn.Module):
    """A policy, its critic where there is one, and what earlier steps found out."""

    pass_rate: Tensor  # (problems,) f32, a moving mean; NaN: never drawn
    num_generated: Tensor  # () int64, response tokens that were sampled so far, those of dropped groups too
    critic_ready: Tensor  # () bool, the critic's pretraining is over

    def __init__(self, policy: nn.Module, critic: nn.Module | None, problems: int):
        super().__init__()
        self.policy, self.critic = policy, critic
        device = next(policy.parameters()).device
        self.register_buffer("pass_rate", torch.full((problems,), float("nan")))
        self.register_buffer("num_generated", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("critic_ready", torch.tensor(critic is None, device=device))


def optimizer_of(agent: Agent, config: OptimConfig, value: ValueConfig | None) -> Optimizer | Offloaded | Joint:
    """One optimizer for policy and critic; the critic's groups are clipped apart and have a rate of their own."""
    policy = make_optimizer(agent.policy, config)
    if agent.critic is None or value is None:
        return policy
    critic = make_optimizer(agent.critic, config)
    for group in critic.param_groups:
        group |= {"part": "value", "rate_factor": value.learning_rate_factor}
    return Joint([policy, critic])
