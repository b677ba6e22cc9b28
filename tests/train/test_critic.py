"""The critic: what it says of rollouts, and how it learns, against loops in float64."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from tests.train.reinforced import (
    assert_same,
    config_of,
    credited,
    head_of_values,
    looped,
    make_rollouts,
    ours,
)
from tests.train.tiny import VOCAB, qwen3_f64
from tinyr2.core.packing import pack
from tinyr2.train.critic import Critic, ValueConfig, ValueHead, accumulate_value, assess, fit
from tinyr2.train.step import Learner


def critic_of(model=None, head=None, budget=1000):
    body = Learner(model=model or qwen3_f64(), vocab=VOCAB, tokens_per_micro_batch=budget)
    return Critic(body=body, head=head or head_of_values())


def states_of(r):
    with torch.no_grad():
        return qwen3_f64().model(torch.tensor([[*r.prompt_ids, *r.response_ids]])).last_hidden_state[0]


@pytest.mark.parametrize("budget", [1, 16, 1000])
def test_a_value_is_said_before_its_token_and_the_last_one_after_the_answer(budget):
    rollouts, weight = make_rollouts(), head_of_values().score.weight[0]
    found, ends = assess(critic_of(budget=budget), rollouts)
    for r, after, before in zip(found, ends, rollouts, strict=True):
        said = (states_of(before) * weight.detach()).sum(-1)
        at = [len(r.prompt_ids) - 1 + t for t in range(len(r.response_ids)) if r.learn_mask is None or r.learn_mask[t]]
        assert r.values == pytest.approx(said[at].tolist(), rel=1e-9)
        assert after == pytest.approx(float(said[-1]), rel=1e-9)
        assert replace(r, values=before.values) == before


def test_a_new_critic_expects_nothing():
    found, ends = assess(critic_of(head=ValueHead(16).double()), make_rollouts())
    assert {v for r in found for v in r.values} == {0.0} and set(ends) == {0.0}


def test_no_rollouts_have_no_values():
    assert assess(critic_of(), []) == ([], [])


@pytest.mark.parametrize("budget", [1, 16, 1000])
@pytest.mark.parametrize("clip", [0.2, None])
@pytest.mark.parametrize("algorithm", ["ppo", "orz", "vapo"])
def test_a_critic_on_the_policys_body_has_the_gradient_of_the_loop_beside_the_policys(algorithm, clip, budget):
    value = {"trunk": "shared", "clip": clip, "num_iterations": 1, "num_mini_batches": 1, "pretrain_steps": 0}
    config, rollouts = config_of(algorithm, value=value), make_rollouts(spread=0.3)
    assert_same(ours(config, rollouts, head=head_of_values(), budget=budget),
                looped(config, rollouts, head=head_of_values()))


@pytest.mark.parametrize("budget", [1, 16, 1000])
@pytest.mark.parametrize("clip", [0.2, None])
def test_a_critic_of_its_own_has_the_gradient_of_the_mean_value_loss_over_tokens(clip, budget):
    config = config_of("ppo", value={"clip": clip, "weight": 0.7})
    done = credited(config, make_rollouts())
    model, head = qwen3_f64(), head_of_values()
    loss = accumulate_value(critic_of(model, head, budget), done, config.value)
    expected, score = qwen3_f64(), head_of_values().score.weight
    total = 0.0
    for r in done:
        states = expected.model(torch.tensor([[*r.prompt_ids, *r.response_ids]])).last_hidden_state[0]
        at = [len(r.prompt_ids) - 1 + t for t in range(len(r.response_ids)) if r.learn_mask is None or r.learn_mask[t]]
        for place, old, target in zip(at, r.values, r.returns, strict=True):
            v = (states[place] * score[0]).sum()
            error = (v - target) ** 2
            if clip is not None:
                error = torch.maximum(error, (v.clamp(old - clip, old + clip) - target) ** 2)
            total = total + 0.5 * error
    total = 0.7 * total / sum(r.learned for r in done)
    total.backward()
    assert loss == pytest.approx(float(total.detach()), rel=1e-6)
    torch.testing.assert_close(head.score.weight.grad, score.grad, rtol=1e-6, atol=1e-7)
    for (name, p), (_, q) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-7, msg=name)


def test_values_of_tokens_that_are_not_learned_are_neither_asked_nor_trained():
    r = make_rollouts()[2]
    assert r.learned == 3 < len(r.response_ids)
    found, _ = assess(critic_of(), [r])
    assert len(found[0].values) == 3
    done = credited(config_of("ppo"), make_rollouts())
    assert len(pack(done).returns) == sum(q.learned for q in done)


def test_the_fit_of_a_critic_is_over_the_tokens_of_the_step():
    r = make_rollouts()[0]
    one = replace(r, values=(0.0, 0.0, 0.0), returns=(1.0, 1.0, 0.0))
    other = replace(r, values=(1.0, 1.0, 1.0), returns=(1.0, 1.0, 1.0))
    assert fit([replace(one, values=one.returns), other]) == 1.0
    errors, targets = torch.tensor([1.0, 1, 0, 0, 0, 0]), torch.tensor([1.0, 1, 0, 1, 1, 1])
    assert fit([one, other]) == pytest.approx(float(1 - errors.var() / targets.var()), rel=1e-6)
    assert fit([other]) is None


def test_settings_that_make_no_critic_are_refused():
    for wrong in ({"trunk": "common"}, {"clip": 0.0}, {"weight": -1.0}, {"num_iterations": 0}, {"pretrain_until": 1.5}):
        with pytest.raises(ValidationError):
            ValueConfig(**wrong)
