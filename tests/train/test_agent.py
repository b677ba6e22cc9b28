"""What a run trains and remembers, and the optimizer over it."""

import pytest
import torch

from tests.train.tiny import qwen3
from tinyr2.train import state as checkpoint
from tinyr2.train.agent import Agent, optimizer_of
from tinyr2.train.critic import ValueConfig, ValueHead
from tinyr2.train.loop import update
from tinyr2.train.optim import OptimConfig

VALUE = ValueConfig(learning_rate_factor=3.0)


def agent_of(critic=True):
    return Agent(qwen3(), qwen3(seed=1).requires_grad_(True) if critic else None, problems=4)


def give_gradients(module, size=1.0):
    for p in module.parameters():
        p.grad = torch.full_like(p, size)


@pytest.mark.parametrize("optim", ["adamw", "muon"])
@pytest.mark.parametrize("critic", ["own", "shared"])
def test_every_parameter_is_trained_once_and_the_critics_at_a_rate_of_their_own(critic, optim):
    agent = agent_of(critic == "own")
    if critic == "shared":
        agent = Agent(qwen3(), ValueHead(16), problems=4)
    optimizer = optimizer_of(agent, OptimConfig(optim=optim), VALUE)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in agent.parameters())
    critics = {id(p) for p in agent.critic.parameters()}
    for group in optimizer.param_groups:
        of_critic = group.get("part") == "value"
        assert group.get("rate_factor", 1.0) == (3.0 if of_critic else 1.0)
        assert all((id(p) in critics) == of_critic for p in group["params"])


def test_without_a_critic_there_is_one_optimizer_of_the_policy():
    agent = agent_of(critic=False)
    groups = optimizer_of(agent, OptimConfig(), None).param_groups
    assert not any("part" in group for group in groups)
    assert bool(agent.critic_ready) and not bool(agent_of().critic_ready)


def test_policy_and_critic_are_clipped_apart():
    agent = agent_of()
    optimizer = optimizer_of(agent, OptimConfig(learning_rate=1e-3), VALUE)
    give_gradients(agent.policy, 1.0)
    give_gradients(agent.critic, 1e-4)
    norms = update(optimizer, 1e9, 0.0)
    count = sum(p.numel() for p in agent.policy.parameters())
    assert norms == {"grad_norm": pytest.approx(count ** 0.5), "value/grad_norm": pytest.approx(1e-4 * count ** 0.5)}


@pytest.mark.parametrize("learns", ["policy", "critic"])
def test_an_update_of_one_leaves_the_other_bit_for_bit_where_it_was(learns):
    agent = agent_of()
    optimizer = optimizer_of(agent, OptimConfig(weight_decay=0.5), VALUE)
    for module in (agent.policy, agent.critic):  # both have momentum
        give_gradients(module)
    update(optimizer, 1.0, 0.0)
    before = {n: p.clone() for n, p in agent.named_parameters()}
    give_gradients(getattr(agent, learns))
    norms = update(optimizer, 1.0, 0.0)
    moved = {n for n, p in agent.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if n.startswith(learns)}
    assert ("value/grad_norm" in norms) == (learns == "critic")  # what has no gradient has no norm


def test_all_that_a_run_remembers_is_in_its_checkpoint(tmp_path):
    def state_of(agent):
        return checkpoint.TrainState(model=agent, optimizer=optimizer_of(agent, OptimConfig(), VALUE), identity={})
    agent = agent_of()
    state = state_of(agent)
    give_gradients(agent)
    update(state.optimizer, 1.0, 0.0)
    agent.pass_rate.copy_(torch.tensor([0.25, float("nan"), 1.0, 0.0]))
    agent.num_generated += 2**40 + 1
    agent.critic_ready.fill_(True)
    checkpoint.save(tmp_path, state, keep=2)
    other = agent_of()
    checkpoint.load(tmp_path, state_of(other), say=print)
    torch.testing.assert_close(other.pass_rate, agent.pass_rate, rtol=0, atol=0, equal_nan=True)
    assert int(other.num_generated) == 2**40 + 1 and bool(other.critic_ready)
    for a, b in zip(agent.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
