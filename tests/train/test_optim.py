import pytest
import torch

from tests.train.tiny import qwen3
from tinyr2.train.optim import OptimConfig, learning_rate, make_optimizer


@pytest.mark.parametrize(("kind", "expected"), [
    ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]), ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
    ("cosine", [0.5, 1.0, 1.0, 0.853553, 0.5, 0.146447])])
def test_rates_by_hand(kind, expected):
    config = OptimConfig(learning_rate=1.0, warmup_steps=2, lr_scheduler_type=kind)
    assert [learning_rate(config, t, 6) for t in range(6)] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
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
             torch.optim.AdamW(others, lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)]
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
