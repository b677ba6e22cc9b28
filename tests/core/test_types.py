"""The value that flows: what it refuses to hold."""

from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch

from tinyr2.core.errors import ConfigError, DataError, RunError, UserError
from tinyr2.core.types import Batch, Message, Problem, Rollout

PROBLEM = Problem(id="train:17", task="gsm8k", messages=(Message("user", "2+2?"),), answer="4")
ROLLOUT = Rollout(problem=PROBLEM, group=0, sample=2, author="student", prompt_ids=(5, 9), response_ids=(7, 1),
                  finish="stop", actor_logp=(-0.1, -0.7), policy_version=12)


def batch(**changes) -> Batch:
    """Packed "q a e" and "q e", as the docstring has it."""
    row = {"tokens": torch.tensor([11, 12, 13, 21, 23]), "position": torch.tensor([0, 1, 2, 0, 1]), "lengths": (3, 2),
           "learn": torch.tensor([1, 2, 4]), "row": torch.tensor([0, 0, 1]),
           "on_policy": torch.tensor([True, True, False]),
           "right": torch.tensor([True, True, False])}
    return Batch(**row | changes)


def test_targets_are_the_learned_tokens_themselves():
    assert batch().targets.tolist() == [12, 13, 23]


STREAMS = ["row", "on_policy", "right", "actor_logp", "advantage", "reward", "old_logp", "reference_logp", "values",
           "returns", "learner_logp", "teacher_gap", "teacher_entropy"]


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_has_one_value_for_each_learned_token(name):
    value = torch.zeros(3)
    assert getattr(batch(**{name: value}), name) is value
    with pytest.raises(DataError, match=f"{name}: 4 values, 3 learned tokens"):
        batch(**{name: torch.zeros(4)})


def test_every_stream_is_among_those_that_are_checked():
    streams = {f.name for f in fields(Batch)} - {"tokens", "position", "lengths", "learn", "divergence_weight"}
    assert streams == set(STREAMS)


def test_some_of_the_learned_tokens_keep_their_streams_and_their_pack():
    whole = batch(advantage=torch.tensor([1.0, 2.0, 3.0]), divergence_weight=0.5)
    some = whole.select(torch.tensor([2, 0]))
    assert some.targets.tolist() == [23, 12] and some.row.tolist() == [1, 0] and some.advantage.tolist() == [3.0, 1.0]
    assert some.tokens is whole.tokens and some.lengths == (3, 2) and some.divergence_weight == 0.5
    assert some.reward is None


@pytest.mark.parametrize("change", [{"lengths": (3, 3)}, {"position": torch.arange(4)}])
def test_lengths_and_positions_fit_the_tokens(change):
    with pytest.raises(DataError, match="lengths add up to"):
        batch(**change)


@pytest.mark.parametrize(("name", "value"), [("learn_mask", (True,)), ("actor_logp", (-0.1, -0.7, -0.2))])
def test_a_rollout_has_one_value_for_each_response_token(name, value):
    with pytest.raises(DataError, match=f"{name}: {len(value)} values, 2 response tokens"):
        replace(ROLLOUT, **{name: value})


def test_what_was_not_measured_is_none_and_never_zero():
    bare = Rollout(problem=PROBLEM, group=0, sample=0, author="dataset", prompt_ids=(5,), response_ids=(1,),
                   finish="stop")
    absent = ("learn_mask", "actor_logp", "policy_version", "text", "reward", "advantage", "error")
    assert [getattr(bare, name) for name in absent] == [None] * len(absent)


@pytest.mark.parametrize("value", [PROBLEM, ROLLOUT, batch(), PROBLEM.messages[0]], ids=lambda v: type(v).__name__)
def test_values_are_frozen(value):
    with pytest.raises(FrozenInstanceError):
        setattr(value, fields(value)[0].name, None)


@pytest.mark.parametrize("kind", [Problem, Rollout, Batch])
def test_values_are_made_by_keyword(kind):
    with pytest.raises(TypeError, match="positional"):
        kind("train:17")


def test_a_users_faults_are_told_from_ours_by_their_class():
    assert all(issubclass(kind, UserError) for kind in (ConfigError, DataError, RunError))
    assert not issubclass(AssertionError, UserError)
