import dataclasses
import math

import pytest
import torch

from tests.train.tiny import EOS, ROLLOUTS, rollout
from tinyr2.core.errors import DataError
from tinyr2.core.packing import pack, split


def test_a_pack_of_two_is_what_the_docstring_of_batch_says():
    batch = pack([rollout((7,), (8, 9)), rollout((7,), (9,))])
    assert batch.tokens.tolist() == [7, 8, 9, 7, 9]
    assert batch.position.tolist() == [0, 1, 2, 0, 1]
    assert batch.lengths == (3, 2)
    assert batch.learn.tolist() == [1, 2, 4]
    assert batch.row.tolist() == [0, 0, 1]
    assert batch.targets.tolist() == [8, 9, 9]


def test_an_end_token_that_is_also_padding_is_learned():
    batch = pack([rollout((3, EOS), (EOS,))])
    assert batch.targets.tolist() == [EOS]


def test_masked_tokens_are_read_but_not_learned():
    batch = pack([rollout((7,), (8, 9, 10), learn_mask=(True, False, True), actor_logp=(-0.5, -1.0, -2.0))])
    assert batch.tokens.tolist() == [7, 8, 9, 10]
    assert batch.targets.tolist() == [8, 10]
    assert batch.actor_logp.tolist() == [-0.5, -2.0]


def test_what_a_rollout_lacks_is_nan_and_never_zero():
    batch = pack([rollout((7,), (8,), actor_logp=(-0.5,), reward=1.0), rollout((7,), (9,), author="dataset")])
    assert batch.actor_logp[0] == -0.5 and math.isnan(batch.actor_logp[1])
    assert batch.reward[0] == 1.0 and math.isnan(batch.reward[1])
    assert batch.advantage is None
    assert batch.on_policy.tolist() == [True, False]


def test_values_of_the_wrong_length_are_refused():
    batch = pack(ROLLOUTS)
    with pytest.raises(DataError, match="advantage: 1 values, 15 learned tokens"):
        dataclasses.replace(batch, advantage=torch.zeros(1))
    with pytest.raises(DataError, match="actor_logp: 1 values, 2 response tokens"):
        rollout((7,), (8, 9), actor_logp=(0.0,))


@pytest.mark.parametrize("budget", [1, 7, 10, 14, 1000])
def test_micro_batches_hold_each_rollout_once_and_keep_the_budget(budget):
    parts = split(ROLLOUTS, budget)
    assert sorted(map(id, (r for p in parts for r in p))) == sorted(map(id, ROLLOUTS))
    for part in parts:
        assert sum(len(r.prompt_ids) + len(r.response_ids) for r in part) <= budget or len(part) == 1


def test_micro_batches_are_balanced():
    parts = split([rollout((1,), (2,) * n) for n in (9, 1, 8, 2, 7, 3)], 19)
    assert sorted(sum(1 + len(r.response_ids) for r in p) for p in parts) == [17, 19]


def test_nothing_splits_into_nothing():
    assert split([], 10) == []
