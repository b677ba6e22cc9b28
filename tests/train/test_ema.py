"""A self-teacher's weights: the average, to the bit, and through a checkpoint."""

import pytest
import torch
from torch import nn

from tests.train.tiny import qwen3
from tinyr2.models.load import LoraConfig, add_lora
from tinyr2.train import state as checkpoint
from tinyr2.train.ema import Ema
from tinyr2.train.optim import OptimConfig, make_optimizer


class Pair(nn.Module):
    """A student and its slow self, as a run keeps them."""

    def __init__(self, decay, student=None):
        super().__init__()
        self.student = qwen3().requires_grad_(True) if student is None else student
        self.ema = Ema(self.student, decay)


def learn(student, optimizer, step):
    ids = torch.arange(3 + step, 11 + step)[None]
    student(ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_average_of_one_number_is_the_formulas():
    student = nn.Linear(1, 1, bias=False)
    nn.init.constant_(student.weight, 8.0)
    ema = Ema(student, 0.75)
    assert ema.model.weight.item() == 8.0
    for value, average in ((0.0, 6.0), (4.0, 5.5), (4.0, 5.125)):
        nn.init.constant_(student.weight, value)
        ema.update(student)
        assert ema.model.weight.item() == average


def test_every_weight_follows_and_the_student_is_left_alone():
    pair = Pair(0.5)
    start = weights(pair.student)
    with torch.no_grad():
        for p in pair.student.parameters():
            p.add_(1.0)
    moved = weights(pair.student)
    pair.ema.update(pair.student)
    shadow = weights(pair.ema.model)
    assert all(torch.equal(shadow[n], start[n] * 0.5 + moved[n] * 0.5) for n in start)
    assert equal(weights(pair.student), moved)


def test_tied_weights_stay_tied_and_move_once():
    pair = Pair(0.5)
    with torch.no_grad():
        pair.student.model.embed_tokens.weight.fill_(4.0)
    before = pair.ema.model.model.embed_tokens.weight.clone()
    pair.ema.update(pair.student)
    assert pair.ema.model.lm_head.weight is pair.ema.model.model.embed_tokens.weight
    assert torch.equal(pair.ema.model.lm_head.weight, before * 0.5 + 2.0)


def test_at_a_decay_of_one_it_is_the_start_forever_and_costs_a_checkpoint_nothing():
    pair = Pair(1.0)
    start = weights(pair.student)
    with torch.no_grad():
        pair.student.model.norm.weight.fill_(7.0)
    pair.ema.update(pair.student)
    assert equal(weights(pair.ema.model), start)
    assert not [name for name in pair.state_dict() if name.startswith("ema")]


def test_without_decay_there_is_nothing_to_keep():
    with pytest.raises(AssertionError, match="its own teacher"):
        Ema(nn.Linear(1, 1), 0.0)


def test_the_slow_self_is_not_trained_not_counted_and_never_in_training_mode():
    pair = Pair(0.9)
    pair.train()
    assert not pair.ema.model.training
    assert [n for n, _ in pair.named_parameters()] == [f"student.{n}" for n, _ in pair.student.named_parameters()]
    assert not any(p.requires_grad for p in pair.ema.model.parameters())


def test_a_resumed_average_is_the_undisturbed_one_bit_for_bit(tmp_path):
    def begin():
        pair = Pair(0.9)
        return pair, checkpoint.TrainState(model=pair, optimizer=make_optimizer(
            pair.student, OptimConfig(learning_rate=1e-2)), identity={})

    def go_on(pair, state, steps):
        for step in steps:
            learn(pair.student, state.optimizer, step)
            pair.ema.update(pair.student)
        state.step = steps[-1] + 1

    whole, state = begin()
    go_on(whole, state, range(6))
    first, state = begin()
    go_on(first, state, range(3))
    checkpoint.save(tmp_path, state, keep=2)
    second, state = begin()
    checkpoint.load(tmp_path, state, say=print)
    assert equal(weights(second.ema.model), weights(first.ema.model))
    go_on(second, state, range(3, 6))
    assert equal(weights(second.ema.model), weights(whole.ema.model))
    assert equal(weights(second.student), weights(whole.student))
    assert not equal(weights(second.ema.model), weights(second.student))


def test_of_adapters_only_the_factors_are_averaged_and_the_frozen_base_is_shared():
    student = add_lora(qwen3(), LoraConfig(r=2), seed=0)
    pair = Pair(0.5, student)
    start = weights(student)
    with torch.no_grad():
        for p in student.parameters():
            if p.requires_grad:
                p.add_(2.0)
    pair.ema.update(student)
    trained = {n for n, p in student.named_parameters() if p.requires_grad}
    shadow, moved = dict(pair.ema.model.named_parameters()), weights(student)
    assert trained and all(torch.equal(shadow[n], start[n] * 0.5 + moved[n] * 0.5) for n in trained)
    assert all(shadow[n] is p for n, p in student.named_parameters() if n not in trained)
    assert len([n for n in pair.state_dict() if n.startswith("ema.")]) == len(trained)
    ids = torch.arange(4, 9)[None]
    assert not torch.equal(pair.ema.model(ids).logits, student(ids).logits)


def test_the_average_of_a_bfloat16_student_is_kept_in_float32():
    student = qwen3(dtype=torch.bfloat16)
    ema = Ema(student.requires_grad_(True), 0.99)
    with torch.no_grad():
        student.model.norm.weight.fill_(2.0)
    for _ in range(3):
        ema.update(student)
    torch.testing.assert_close(ema.model.model.norm.weight, torch.full((16,), 2 - 0.99 ** 3), rtol=1e-6, atol=0)


def test_a_buffer_that_is_saved_is_taken_as_it_is():
    student = nn.BatchNorm1d(1)
    ema = Ema(student, 0.9)
    student.running_mean.fill_(3.0)
    student.num_batches_tracked.fill_(5)
    ema.update(student)
    assert ema.model.running_mean.item() == 3.0 and ema.model.num_batches_tracked.item() == 5
