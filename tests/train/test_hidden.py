"""Hidden-state distillation: its value, whom its gradient reaches, its map of layers, and where projections stay."""

import pytest
import torch
from safetensors.torch import load_file

from tests.train.tiny import ROLLOUTS, qwen3, qwen3_f64
from tinyr2.core.config import build
from tinyr2.core.errors import ConfigError
from tinyr2.core.packing import pack
from tinyr2.models.packed import hidden_states
from tinyr2.train import state as checkpoint
from tinyr2.train.hidden import (
    Apprentice,
    HiddenConfig,
    Projections,
    hire_layers,
    layer_map,
    optimizer_of,
)
from tinyr2.train.loop import update
from tinyr2.train.optim import OptimConfig

BATCH = pack(ROLLOUTS, torch.device("cpu"))
N = len(BATCH.learn)


def term_of(student, teacher, **settings):
    return hire_layers(student, teacher, HiddenConfig(**settings), seed=0)


def loss_of(term, student, denom=N, **options):
    return term.loss(term.read(student, BATCH, **options)[1], term.consult(BATCH), denom=denom)


def stock_states(model, layer: int) -> torch.Tensor:
    """(N, D): what a layer puts out one token before each learned one, from stock forwards of single rows."""
    found = []
    for r in ROLLOUTS:
        ids = torch.tensor([[*r.prompt_ids, *r.response_ids]])
        states = model.model(ids, use_cache=False, output_hidden_states=True).hidden_states[layer + 1][0]
        found.append(states[len(r.prompt_ids) - 1:-1])
    return torch.cat(found)


# --- the value


@pytest.mark.parametrize("normalize", [False, True])
def test_the_loss_is_the_mean_squared_error_of_stock_states_after_the_projection(normalize):
    student, teacher = qwen3_f64(), qwen3_f64(hidden=32, seed=1)
    term = term_of(student, teacher, layers={0: 0}, normalize=normalize, weight=0.5)
    term.projections.double()
    ours = stock_states(student, 0) @ term.projections.by_layer["0"].weight.T
    theirs = stock_states(teacher, 0)
    if normalize:
        ours, theirs = (x / x.norm(dim=1, keepdim=True) * 32 ** 0.5 for x in (ours, theirs))
    expected = 0.5 * ((ours - theirs) ** 2).mean(1).sum() / 100
    torch.testing.assert_close(loss_of(term, student, denom=100), expected, rtol=1e-6, atol=0)


def test_the_cosine_distance_is_one_minus_the_cosine_and_layers_are_averaged():
    student, teacher = qwen3_f64(), qwen3_f64(seed=1)
    found = [loss_of(term_of(student, teacher, layers=layers, distance="cosine", normalize=False), student)
             for layers in ({0: 0}, {1: 0}, {0: 0, 1: 0})]
    ours, theirs = stock_states(student, 0), stock_states(teacher, 0)
    expected = (1 - torch.cosine_similarity(ours, theirs)).sum() / N
    torch.testing.assert_close(found[0], expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(found[2], (found[0] + found[1]) / 2, rtol=1e-9, atol=0)


def test_a_teacher_that_is_the_student_asks_for_nothing():
    student = qwen3()
    assert float(loss_of(term_of(student, qwen3(), layers="uniform"), student).detach()) == 0.0


def test_micro_batches_add_up_to_the_step():
    student, teacher = qwen3_f64(), qwen3_f64(hidden=32, seed=1)
    term, whole = term_of(student, teacher), None
    term.projections.double()
    whole, parts = loss_of(term, student), 0.0
    for some in (ROLLOUTS[:2], ROLLOUTS[2:]):
        batch = pack(some, torch.device("cpu"))
        parts = parts + term.loss(term.read(student, batch)[1], term.consult(batch), denom=N)
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=0)


def test_reading_inner_layers_leaves_the_last_states_bit_for_bit():
    student = qwen3()
    last, _ = term_of(student, qwen3(seed=1)).read(student, BATCH)
    plain = hidden_states(student, BATCH.tokens, BATCH.position, BATCH.lengths)
    assert torch.equal(last, plain[BATCH.learn - 1])


# --- the gradient


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_reaches_student_and_projections_and_never_the_teacher(checkpointing):
    student, teacher = qwen3(), qwen3(hidden=32, seed=1)
    term = term_of(student, teacher, layers={0: 1})
    loss_of(term, student, gradient_checkpointing=checkpointing).backward()
    layers = student.model.layers
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in layers[0].parameters())
    assert all(p.grad is None for p in layers[1].parameters())  # above the layer that is compared
    assert float(term.projections.by_layer["0"].weight.grad.abs().sum()) > 0
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_following_the_gradient_draws_the_student_to_its_teacher():
    student, teacher = qwen3().train(), qwen3(hidden=32, seed=1)
    config = HiddenConfig(learning_rate_factor=3.0)
    term = hire_layers(student, teacher, config, seed=0)
    optimizer = optimizer_of(Apprentice(student, term.projections), OptimConfig(learning_rate=1e-2), config)
    losses = []
    for _ in range(20):
        loss = loss_of(term, student)
        loss.backward()
        update(optimizer, 1.0, float(loss.detach()))
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]


# --- the map of layers


@pytest.mark.parametrize(("student", "teacher", "expected"), [
    (2, 4, {0: 1, 1: 3}), (3, 3, {0: 0, 1: 1, 2: 2}), (3, 4, {0: 1, 1: 2, 2: 3}), (4, 2, {0: 0, 1: 0, 2: 1, 3: 1}),
    (1, 7, {0: 6})])
def test_uniform_spreads_the_students_layers_and_last_goes_with_last(student, teacher, expected):
    assert layer_map("uniform", student, teacher) == expected
    assert layer_map("last", student, teacher) == {student - 1: teacher - 1}


@pytest.mark.parametrize(("layers", "message"), [
    ({0: 1, 2: 1}, "hidden.layers: 2: 1: the student has no layer 2; its layers are 0 to 1"),
    ({1: 4}, "hidden.layers: 1: 4: the teacher has no layer 4; its layers are 0 to 3"),
    ({-1: 0}, "the student has no layer -1; its layers are 0 to 1")])
def test_a_layer_that_is_not_there_is_refused_and_the_range_named(layers, message):
    with pytest.raises(ConfigError, match=message):
        layer_map(layers, 2, 4)


@pytest.mark.parametrize("layers", [{}, "first", {0: "x"}])
def test_a_map_that_says_nothing_is_refused(layers):
    with pytest.raises(ConfigError, match="layers"):
        build(HiddenConfig, {"layers": layers}, "test")


def test_a_map_survives_the_run_folder():
    config = HiddenConfig(layers={0: 3, 1: 5})
    assert HiddenConfig.model_validate(config.model_dump(mode="json")) == config


# --- the projections


def test_projections_stand_where_widths_differ_or_are_asked_for_and_follow_from_the_seed():
    def weights(*sizes, **options):
        return [p.detach().clone() for p in Projections({0: 0, 2: 1}, *sizes, **options).parameters()]

    assert weights(16, 16, seed=0) == []
    assert [tuple(p.shape) for p in weights(16, 16, seed=0, always=True)] == [(16, 16)] * 2
    torch.manual_seed(1)
    drawn = torch.rand(3)
    torch.manual_seed(1)
    first, second = weights(16, 32, seed=0)
    assert torch.equal(torch.rand(3), drawn)  # nobody else's random numbers move
    assert torch.equal(first, weights(16, 32, seed=0)[0]) and not torch.equal(first, second)
    assert not torch.equal(first, weights(16, 32, seed=1)[0])


def test_without_projections_the_optimizer_is_the_students_alone():
    student = qwen3()
    term = term_of(student, qwen3(seed=1))
    groups = optimizer_of(Apprentice(student, term.projections), OptimConfig(), term.config).param_groups
    assert not any("part" in group for group in groups)


def test_projections_come_back_from_a_checkpoint_and_are_no_part_of_the_student(tmp_path):
    def state_of(seed):
        student = qwen3(seed=seed)
        config = HiddenConfig(learning_rate_factor=2.0)
        term = hire_layers(student, qwen3(hidden=32, seed=9), config, seed)
        apprentice = Apprentice(student, term.projections)
        return term, checkpoint.TrainState(model=apprentice, optimizer=optimizer_of(apprentice, OptimConfig(), config))

    term, state = state_of(0)
    loss_of(term, state.model.student).backward()
    norms = update(state.optimizer, 1.0, 0.0)
    assert norms.keys() == {"grad_norm", "projections/grad_norm"}
    assert [g.get("rate_factor", 1.0) for g in state.optimizer.param_groups] == [1.0, 1.0, 2.0]
    checkpoint.save(tmp_path, state)
    other, again = state_of(1)
    checkpoint.load(tmp_path, again, say=print)
    for a, b in zip(state.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    bridge = other.projections.by_layer["0"].weight  # the term reads what was restored
    assert torch.equal(bridge, term.projections.by_layer["0"].weight)
    assert torch.equal(again.optimizer.state[bridge]["exp_avg"],
                       state.optimizer.state[term.projections.by_layer["0"].weight]["exp_avg"])
    again.model.student.save_pretrained(tmp_path / "final")
    saved = load_file(tmp_path / "final/model.safetensors")
    assert saved.keys() == dict(qwen3().named_parameters()).keys()
