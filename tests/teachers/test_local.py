"""A teacher in this process: what it says of a batch is its own stock forward, and nothing of it is trained."""

from dataclasses import replace

import pytest
import torch

from tests.train.tiny import ROLLOUTS, VOCAB, qwen3
from tinyr2.core.errors import ConfigError
from tinyr2.core.packing import pack
from tinyr2.models.head import logits_of
from tinyr2.teachers.local import hire, judge_of, states_of


def test_the_states_are_those_that_predict_the_learned_tokens():
    model = qwen3(hidden=24, seed=1)
    teacher, batch = hire(model, VOCAB), pack(ROLLOUTS)
    found = torch.log_softmax(logits_of(states_of(teacher, batch), teacher.head), -1)
    expected = []
    for r in ROLLOUTS:  # one row at a time, through the stock forward
        with torch.no_grad():
            logp = torch.log_softmax(model(torch.tensor([[*r.prompt_ids, *r.response_ids]])).logits[0], -1)
        expected.append(logp[len(r.prompt_ids) - 1:-1])
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=2e-6)


def test_masked_tokens_are_not_judged():
    teacher = hire(qwen3(hidden=24, seed=1), VOCAB)
    judged = states_of(teacher, pack([replace(ROLLOUTS[0], learn_mask=(True, False, True)), ROLLOUTS[1]]))
    assert judged.shape == (4, 24)
    whole = states_of(teacher, pack(ROLLOUTS[:2]))
    torch.testing.assert_close(judged, whole[[0, 2, 3, 4]], rtol=0, atol=1e-6)


def test_its_judge_speaks_of_every_token_with_weight_1():
    teacher, batch = hire(qwen3(hidden=24, seed=1), VOCAB), pack(ROLLOUTS)
    (opinion,) = judge_of(teacher)(ROLLOUTS, batch, None)
    assert opinion.complete and opinion.weight == 1.0 and opinion.whole.head is teacher.head
    assert torch.equal(opinion.whole.hidden, states_of(teacher, batch))


def test_a_teacher_is_frozen_in_eval_mode_and_leaves_no_graph():
    model = qwen3(hidden=24, seed=1).train()
    teacher = hire(model, VOCAB)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert not states_of(teacher, pack(ROLLOUTS)).requires_grad
    assert not teacher.head.weight.requires_grad


def test_a_longer_vocabulary_is_cropped_to_the_shared_ids_and_a_shorter_one_refused():
    teacher = hire(qwen3(seed=1), 20)
    assert torch.equal(teacher.head.weight, qwen3(seed=1).lm_head.weight[:20])
    with pytest.raises(ConfigError, match="24 tokens asked of a head with 23"):
        hire(qwen3(seed=1), 24)
