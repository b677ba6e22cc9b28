"""Every policy preset's expected gradient, by enumeration: vectorized against loops, and against what it estimates."""

from dataclasses import replace

import pytest
import torch

from tests.objectives import language
from tests.objectives.steps import PRESETS, Combination, Tables, looped, vectorized

BESIDE = ((1, 0), (0, 2))  # a second group of the step, always the same, so that a batch is more than a group


def _tables(on_policy=False):
    old = language.table(0)
    learner = old if on_policy else old + language.table(1, 0.3)
    old_value = language.table(3, 0.5)[0]
    return Tables(learner.clone().requires_grad_(), old, language.table(2),
                  (old_value + language.table(4, 0.3)[0]).requires_grad_(), old_value)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("on_policy", [False, True])
def test_the_expected_gradient_of_a_preset_is_that_of_its_loops(name, on_policy):
    combination, tables = PRESETS[name], _tables(on_policy)
    leaves = [tables.learner, tables.value] if combination.baseline == "value" else [tables.learner]
    got, expected = (language.expected_gradient(lambda group, f=f: f(combination, tables, (*group, *BESIDE)),
                                                tables.old, leaves) for f in (vectorized, looped))
    for a, b in zip(got, expected, strict=True):
        assert b.abs().max() > 1e-3
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("combination", [
    replace(PRESETS["rloo"], kl=None),
    replace(PRESETS["ppo"], lam=1.0, aggregation="constant", scale="none", kl=None)], ids=["rloo", "ppo"])
def test_on_policy_the_expected_gradient_is_exactly_that_of_the_expected_reward(combination):
    tables = _tables(on_policy=True)
    (got,) = language.expected_gradient(lambda group: vectorized(combination, tables, group), tables.old,
                                        [tables.learner])
    torch.testing.assert_close(-got, language.true_gradient(tables.learner), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("name", ["grpo", "dapo", "vapo", "ppo", "reinforce_pp"])
def test_the_other_presets_estimate_something_else(name):
    tables = _tables(on_policy=True)
    combination = replace(PRESETS[name], kl=None)
    (got,) = language.expected_gradient(lambda group: vectorized(combination, tables, group), tables.old,
                                        [tables.learner])
    assert (got + language.true_gradient(tables.learner)).abs().max() > 1e-3


def _gradient(combination, tables, answers=((0, 1), (2,), *BESIDE)):
    return torch.autograd.grad(vectorized(combination, tables, answers), tables.learner)[0]


def test_rloo_is_g_over_g_minus_one_times_grpo_without_std():
    tables = _tables()
    grpo = Combination(aggregation="sequence")
    assert _gradient(grpo, tables).abs().max() > 1e-3
    torch.testing.assert_close(_gradient(replace(grpo, baseline="leave_one_out"), tables), 2 * _gradient(grpo, tables),
                               rtol=1e-12, atol=1e-15)


def test_gspo_on_policy_is_grpo_with_sequence_aggregation():
    tables = _tables(on_policy=True)
    grpo = replace(PRESETS["grpo"], kl=None)
    assert _gradient(grpo, tables).abs().max() > 1e-3
    torch.testing.assert_close(_gradient(PRESETS["gspo"], tables), _gradient(grpo, tables), rtol=1e-12, atol=1e-15)


def test_vapo_with_lambda_one_no_likelihood_term_and_a_symmetric_clip_is_orz_with_a_token_mean():
    tables = _tables()
    orz = replace(PRESETS["orz"], aggregation="token")
    vapo = replace(PRESETS["vapo"], alpha=float("inf"), nll=0.0, high=0.2)
    assert _gradient(orz, tables).abs().max() > 1e-3
    torch.testing.assert_close(_gradient(vapo, tables), _gradient(orz, tables), rtol=1e-12, atol=1e-15)
    assert (_gradient(PRESETS["vapo"], tables) - _gradient(orz, tables)).abs().max() > 1e-3
