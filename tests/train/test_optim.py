import pytest
import torch

from tests.train.tiny import qwen3
from tinyr2.train import state as checkpoint
from tinyr2.train.optim import Offloaded, OptimConfig, clip, learning_rate, make_optimizer

KINDS = ["adamw", "muon"]


def learn(model, optimizer, steps: int = 1) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
        optimizer.step()


@pytest.mark.parametrize(("kind", "expected"), [
    ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]), ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
    ("cosine", [0.5, 1.0, 1.0, 0.853553, 0.5, 0.146447])])
def test_rates_by_hand(kind, expected):
    config = OptimConfig(learning_rate=1.0, warmup_steps=2, lr_scheduler_type=kind)
    assert [learning_rate(config, t, 6) for t in range(6)] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_every_trained_parameter_is_in_one_group_and_only_matrices_decay(kind):
    model = qwen3()
    model.model.layers[0].requires_grad_(False)
    optimizer = make_optimizer(model, OptimConfig(optim=kind, weight_decay=0.1))
    held = [p for g in optimizer.param_groups for p in g["params"]]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in held} == {id(p) for p in trained} and len(held) == len(trained)
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    inner = {id(p) for n, p in model.model.layers[1].named_parameters() if p.ndim == 2}
    assert decayed == inner


def test_joined_optimizers_do_what_each_would_do_alone():
    one, two = qwen3(), qwen3()
    joint = make_optimizer(one, OptimConfig(optim="muon", learning_rate=0.01))
    embedding = two.model.embed_tokens.weight
    matrices = [p for p in two.parameters() if p.ndim == 2 and p is not embedding]
    others = [p for p in two.parameters() if p.ndim != 2 or p is embedding]
    parts = [torch.optim.Muon(matrices, lr=0.01, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
             torch.optim.AdamW(others, lr=0.01, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]
    for _ in range(3):
        for model in (one, two):
            model.zero_grad()
            model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
        joint.step()
        for part in parts:
            part.step()
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q)
    assert len(joint.state) == len(list(one.parameters()))


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_step_moves_the_version_of_every_parameter_so_that_stale_copies_are_found(kind, offload):
    model = qwen3()
    optimizer = make_optimizer(model, OptimConfig(optim=kind, optim_offload=offload))
    for _ in range(2):
        before = {name: p._version for name, p in model.named_parameters()}
        learn(model, optimizer)
        assert all(p._version > before[name] for name, p in model.named_parameters())


def test_one_fused_step_is_adams_by_hand():
    model = qwen3(dtype=torch.float64)
    p = model.model.layers[0].mlp.up_proj.weight
    optimizer = make_optimizer(model, OptimConfig(learning_rate=0.1, weight_decay=0.5))
    old, grad = p.detach().clone(), torch.linspace(-1, 1, p.numel(), dtype=torch.float64).view_as(p)
    p.grad = grad.clone()
    optimizer.step()
    # at the first step the two moments, freed of their bias, are the gradient and its square
    expected = old * (1 - 0.1 * 0.5) - 0.1 * grad / (grad.abs() + 1e-8)
    torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-12)


# --- on another device than the model


@pytest.mark.parametrize("kind", KINDS)
def test_an_offloaded_optimizer_takes_the_steps_of_one_beside_its_model(kind):
    one, two = qwen3(), qwen3()
    config = OptimConfig(optim=kind, learning_rate=0.01, weight_decay=0.1)
    here, there = make_optimizer(one, config), make_optimizer(two, config.model_copy(update={"optim_offload": True}))
    assert isinstance(there, Offloaded)
    for rate in (0.01, 0.005, 0.02):
        for model, optimizer in ((one, here), (two, there)):
            for group in optimizer.param_groups:
                group["lr"] = rate
            learn(model, optimizer)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


def test_masters_keep_what_a_bfloat16_model_rounds_away():
    model = qwen3(dtype=torch.bfloat16)
    p = model.model.norm.weight  # ones, whose neighbors in bfloat16 are 2^-8 and 2^-7 away
    optimizer = make_optimizer(model, OptimConfig(learning_rate=1e-4, optim_offload=True))
    seen = []
    for _ in range(30):
        p.grad = torch.ones_like(p)
        optimizer.step()
        seen.append(float(p[0].detach()))
    assert seen[10] == 1.0 and seen[-1] == 1 - 2**-8
    master = optimizer.state[p]["master"]
    assert (master.dtype, float(master[0])) == (torch.float32, pytest.approx(1 - 30e-4, abs=1e-5))
    assert all(slot.dtype == torch.float32 for slot in optimizer.state[p].values())


def test_a_parameter_without_a_gradient_stays_where_it_is():
    model = qwen3()
    optimizer = make_optimizer(model, OptimConfig(learning_rate=0.1, optim_offload=True))
    moved, kept = model.model.norm.weight, model.model.layers[0].mlp.up_proj.weight
    before, version = kept.detach().clone(), kept._version
    moved.grad = torch.ones_like(moved)
    optimizer.step()
    assert torch.equal(kept, before) and kept._version == version
    assert set(map(id, optimizer.state)) == {id(moved)} and len(optimizer.state) == 1
    optimizer.zero_grad()
    assert moved.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_an_offloaded_run_that_was_resumed_ends_as_the_undisturbed_one(kind, dtype, tmp_path):
    def fresh(seed: int) -> checkpoint.TrainState:
        model = qwen3(seed=seed, dtype=dtype)
        config = OptimConfig(optim=kind, learning_rate=1e-3, optim_offload=True)
        return checkpoint.TrainState(model=model, optimizer=make_optimizer(model, config))

    whole = fresh(0)
    checkpoint.save(tmp_path / "start", whole)
    learn(whole.model, whole.optimizer, 3)
    checkpoint.save(tmp_path / "middle", whole)
    learn(whole.model, whole.optimizer, 3)
    for folder, left in (("start", 6), ("middle", 3)):
        again = fresh(1)
        learn(again.model, again.optimizer, 2)  # masters of its own, which must be forgotten
        checkpoint.load(tmp_path / folder, again, say=pytest.fail)
        learn(again.model, again.optimizer, left)
        for p, q in zip(whole.model.parameters(), again.model.parameters(), strict=True):
            assert torch.equal(p, q)
            slots, others = whole.optimizer.state[p], again.optimizer.state[q]
            assert slots.keys() == others.keys() and all(torch.equal(slots[name], others[name]) for name in slots)


# --- clipping


@pytest.mark.parametrize(("limit", "expected"), [(1.0, [0.6, 0.8]), (10.0, [3.0, 4.0])])
def test_gradients_are_cut_to_their_joint_norm_and_short_ones_left_alone(limit, expected):
    params = [torch.zeros(1, requires_grad=True), torch.zeros(2, requires_grad=True), torch.zeros(1)]
    params[0].grad, params[1].grad = torch.tensor([3.0]), torch.tensor([0.0, 4.0])
    versions = [p.grad._version for p in params[:2]]
    assert clip(params, limit) == 5.0
    assert [float(params[0].grad[0]), float(params[1].grad[1])] == pytest.approx(expected, rel=1e-5)
    assert ([p.grad._version for p in params[:2]] == versions) == (limit == 10.0)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_clipping_gives_the_bits_of_torchs_own(scale):
    torch.manual_seed(0)
    grads = [torch.randn(5, 3) * scale, torch.randn(7) * scale]
    mine, theirs = ([torch.zeros_like(g, requires_grad=True) for g in grads] for _ in range(2))
    for params in (mine, theirs):
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
    assert clip(mine, 1.0) == float(torch.nn.utils.clip_grad_norm_(theirs, 1.0))
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(mine, theirs, strict=True))


def test_no_gradient_has_norm_0_and_one_that_is_not_finite_says_so():
    p = torch.zeros(2, requires_grad=True)
    assert clip([p], 1.0) == 0.0
    p.grad = torch.tensor([1.0, float("nan")])
    assert clip([p], 1.0) != clip([p], 1.0)
    p.grad = torch.tensor([1.0, float("inf")])
    assert clip([p], 1.0) == float("inf")
