"""The peer: TRL's own loss code on the same tensors, values and gradients. Its trainers are stubs around a method."""

import importlib.util
import math
import os
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from tinyr2.models.head import Head, run
from tinyr2.objectives import rows
from tinyr2.objectives.advantage import group_mean, leave_one_out, scaled, spread
from tinyr2.objectives.divergence import Divergence
from tinyr2.objectives.kl import estimate
from tinyr2.objectives.policy import clipped_surrogate, importance_weight, sequence_ratio, token_weight
from tinyr2.objectives.preference import bradley_terry, dpo_loss

MISSING = importlib.util.find_spec("trl") is None
# Where CI runs, a missing peer is a failure: the import below must then raise.
pytestmark = pytest.mark.skipif(MISSING and not os.environ.get("CI"), reason="trl is not installed")

SPECS = {"reverse_kl": (Divergence(kind="reverse_kl"), 1.0), "forward_kl": (Divergence(kind="forward_kl"), 0.0),
         "jsd": (Divergence(kind="jsd", beta=0.5), 0.5), "jsd-0.1": (Divergence(kind="jsd", beta=0.1), 0.1),
         "jsd-0.9": (Divergence(kind="jsd", beta=0.9), 0.9)}


@pytest.fixture(scope="module")
def peer():
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    return ChunkedDivergenceFunction.apply


def _tensors():
    rng = torch.Generator().manual_seed(5)

    def normal(*shape):
        return torch.randn(*shape, generator=rng)

    student = [x.requires_grad_() for x in (normal(50, 16), normal(101, 16) / 2, normal(101))]
    return student, (normal(50, 24), normal(101, 24) / 3, normal(101)), torch.rand(50, generator=rng)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(("temperature", "scale", "softcap"), [(1.0, 1.0, None), (0.7, 1.2, None), (1.3, 0.8, 4.0)])
def test_values_and_gradients_agree_with_trl(peer, name, temperature, scale, softcap):
    spec, beta = SPECS[name]
    student, teacher, share = _tensors()
    values, entropy = peer(*student, *teacher, beta, temperature, scale, softcap, scale, softcap)
    expected = torch.autograd.grad((share * values).sum(), student)
    result = run(
        student[0], Head(student[1], student[2], scale, softcap), torch.zeros(50, dtype=torch.int64),
        lambda s: (share[s.part] * s.divergence).sum(), temperature=temperature, divergence=spec,
        teacher_hidden=teacher[0], teacher_head=Head(teacher[1], teacher[2], scale, softcap), chunk_elements=101 * 8)
    torch.testing.assert_close(result.divergence, values.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.entropy, entropy, rtol=1e-5, atol=1e-5)
    for a, b in zip(torch.autograd.grad(result.loss, student), expected, strict=True):
        assert b.abs().max() > 1e-3  # or the tolerance would prove nothing
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


LENGTHS = [5, 2, 7, 1, 3, 6]
SHAPE = (6, 7)
MASK = torch.arange(7) < torch.tensor(LENGTHS)[:, None]


def _normal(seed, *shape, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _stub(**given):
    """What TRL's loss methods read of their trainer, on one process, in training."""
    def scores(model, *args, **kwargs):
        return given["logps"], torch.zeros(SHAPE, dtype=torch.float64), None

    alone = SimpleNamespace(num_processes=1, process_index=0, device="cpu", gather=lambda x: x,
                            gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x)
    model = SimpleNamespace(training=True, is_gradient_checkpointing=False)
    common = {
        "accelerator": alone, "model": model, "aux_loss_enabled": False, "_get_per_token_logps_and_entropies": scores,
        "_metrics": defaultdict(lambda: defaultdict(list)), "current_gradient_accumulation_steps": 1}
    return SimpleNamespace(**{**common, **given})


def _grpo(options, tensors):
    from trl.trainer.grpo_trainer import GRPOTrainer

    args = SimpleNamespace(delta=options.get("delta"), use_bias_correction_kl=options.get("bias", False),
                           steps_per_generation=1)
    stub = _stub(
        logps=tensors["learner"], args=args, loss_type=options["loss_type"], beta=options.get("beta", 0.0),
        importance_sampling_level=options.get("level", "token"), epsilon_low=0.2, epsilon_high=options.get("high", 0.2),
        max_completion_length=20, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        use_vllm="weight" in tensors, vllm_importance_sampling_correction=True, _entropy_bonus_enabled=False)
    ids = torch.zeros(SHAPE, dtype=torch.int64)
    return GRPOTrainer._compute_loss(stub, None, {
        "prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, "completion_mask": MASK.long(),
        "advantages": tensors["advantage"], "old_per_token_logps": tensors["old"],
        "ref_per_token_logps": tensors["reference"], "num_items_in_batch": MASK.sum(),
        "importance_sampling_ratio": tensors.get("weight")})


def _ours(options, tensors):
    learner, old, reference = (tensors[name][MASK] for name in ("learner", "old", "reference"))
    advantage = rows.repeat(tensors["advantage"], LENGTHS)
    log_ratio = learner - old
    if options.get("level") == "sequence":
        log_ratio = sequence_ratio(learner, old, LENGTHS, level="sequence_mean").log_ratio(learner, slice(None))
    terms = clipped_surrogate(log_ratio, advantage, low=0.2, high=options.get("high", 0.2), dual=options.get("delta"))
    if "weight" in tensors:
        terms = terms * tensors["weight"].expand(SHAPE)[MASK]
    if options.get("beta"):
        penalty = estimate("k3", learner, reference)
        terms = terms + options["beta"] * (log_ratio.exp() * penalty if options.get("bias") else penalty)
    aggregation = {"grpo": "sequence", "dr_grpo": "constant", "dapo": "token", "bnpo": "token"}[options["loss_type"]]
    weight = token_weight(LENGTHS, aggregation=aggregation, tokens=sum(LENGTHS), sequences=6, constant=20,
                          dtype=torch.float64)
    return (weight * terms).sum()


def _policies():
    old = _normal(0, *SHAPE)
    return {"learner": (old + _normal(1, *SHAPE, scale=0.4)).requires_grad_(), "old": old,
            "reference": old + _normal(2, *SHAPE, scale=0.3), "advantage": _normal(3, 6)}


def _assert_same(got, expected, leaf):
    assert got.item() == pytest.approx(expected.item(), rel=1e-9)
    slopes = [torch.autograd.grad(y, leaf)[0] for y in (got, expected)]
    assert slopes[1].abs().max() > 1e-3
    torch.testing.assert_close(*slopes, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("options", [
    {}, {"high": 0.28}, {"high": 0.28, "delta": 1.4}, {"beta": 0.04}, {"beta": 0.04, "bias": True, "high": 0.28},
    {"level": "sequence"}, {"level": "sequence", "high": 0.28, "delta": 1.3, "beta": 0.04}], ids=str)
def test_the_grpo_loss_agrees_with_trl(loss_type, options):
    options, tensors = {"loss_type": loss_type, **options}, _policies()
    _assert_same(_ours(options, tensors), _grpo(options, tensors), tensors["learner"])


@pytest.mark.parametrize("shape", [SHAPE, (6, 1)])
def test_the_grpo_loss_under_importance_weights_agrees_with_trl(shape):
    options, tensors = {"loss_type": "dapo", "beta": 0.04}, {**_policies(), "weight": _normal(4, *shape).abs()}
    _assert_same(_ours(options, tensors), _grpo(options, tensors), tensors["learner"])


def test_the_rloo_loss_agrees_with_trl():
    from trl.trainer.rloo_trainer import RLOOTrainer

    tensors = _policies()
    ids, learner = torch.zeros(SHAPE, dtype=torch.int64), tensors["learner"]
    theirs = RLOOTrainer._compute_loss(
        _stub(logps=learner, epsilon_low=0.2, epsilon_high=0.28), None,
        {"prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, "completion_mask": MASK.long(),
         "old_logps": (tensors["old"] * MASK).sum(1), "advantages": tensors["advantage"]})
    packed = learner[MASK]
    log_ratio = sequence_ratio(packed, tensors["old"][MASK], LENGTHS, level="sequence").log_ratio(packed, slice(None))
    weight = token_weight(LENGTHS, aggregation="sequence", tokens=24, sequences=6, dtype=torch.float64)
    terms = clipped_surrogate(log_ratio, rows.repeat(tensors["advantage"], LENGTHS), low=0.2, high=0.28)
    _assert_same((weight * terms).sum(), theirs, learner)


def _score(trainer, rewards, **options):
    """What TRL's trainer makes of the rewards (B, functions) of groups of three: its inputs to the loss."""
    logps = options.pop("logps", torch.zeros(SHAPE, dtype=torch.float64))
    args = SimpleNamespace(per_device_train_batch_size=6, steps_per_generation=1, gradient_accumulation_steps=1,
                           gradient_checkpointing_kwargs=None)
    sampled = options.pop("sampled", torch.zeros(SHAPE, dtype=torch.float64))
    written = [[1] * n for n in LENGTHS]
    seen = [row[:n].tolist() for row, n in zip(sampled, LENGTHS, strict=True)]
    defaults = {
        "logps": logps, "args": args, "environment_factories": None, "tools": None, "environments": None,
        "_tokenizer": SimpleNamespace(pad_token_id=0), "pad_to_multiple_of": None, "num_iterations": 1,
        "mask_truncated_completions": False, "use_vllm": False, "vllm_importance_sampling_correction": True,
        "beta": 0.0, "reward_weights": torch.ones(rewards.shape[1], dtype=torch.float64), "scale_rewards": "group",
        "multi_objective_aggregation": "sum_then_normalize", "num_generations": 3, "reward_clip_range": None,
        "reward_func_names": [str(i) for i in range(rewards.shape[1])], "log_multimodal": False,
        "normalize_advantages": False, "_pending_extra_logs": {}, "_pending_metrics": {},
        "_logs": defaultdict(list, rewards=defaultdict(list), extra=defaultdict(list)),
        "_calculate_rewards": lambda *args: rewards.clone(),
        "_generate": lambda prompts: (written, written, None, written, seen, {}, None, None)}
    prompts = [{"prompt": "p"}] * 6
    return trainer._generate_and_score_completions(_stub(**{**defaults, **options}), prompts)


REWARDS = [0.25, 1.0, 0.5, None, 2.0, -1.0]  # two groups of three


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_grpo_advantages_agree_with_trl(scale):
    from trl.trainer.grpo_trainer import GRPOTrainer

    given = torch.tensor([[math.nan if r is None else r] for r in REWARDS], dtype=torch.float64)
    theirs = _score(GRPOTrainer, given, scale_rewards=scale)["advantages"]
    ours = []
    for group in (REWARDS[:3], REWARDS[3:]):
        std = {"group": spread(group), "batch": spread(REWARDS), "none": None}[scale]
        ours += group_mean(group) if std is None else scaled(group_mean(group), std, eps=1e-4)
    assert ours[3] is None and theirs[3] == 0.0  # where they write 0, no verdict stays none
    assert [a or 0.0 for a in ours] == pytest.approx(theirs.tolist(), rel=1e-9)


def test_rloo_advantages_under_a_kl_in_the_reward_agree_with_trl():
    from trl.trainer.rloo_trainer import RLOOTrainer

    given = torch.tensor([[math.nan if r is None else r] for r in REWARDS], dtype=torch.float64)
    policy, reference = _normal(5, *SHAPE), _normal(6, *SHAPE)
    written = [[1] * n for n in LENGTHS]
    theirs = _score(
        RLOOTrainer, given, ref_model="reference", beta=0.05, _generate=lambda prompts: (written, written, written),
        _get_per_token_logps_and_entropies=lambda m, *a, **k: (reference if m == "reference" else policy, None, None))
    kl = rows.total(estimate("k1", policy[MASK], reference[MASK]), LENGTHS).tolist()
    shaped = [None if r is None else r - 0.05 * k for r, k in zip(REWARDS, kl, strict=True)]
    ours = leave_one_out(shaped[:3]) + leave_one_out(shaped[3:])
    assert [a or 0.0 for a in ours] == pytest.approx(theirs["advantages"].tolist(), rel=1e-9)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_importance_weights_agree_with_trl(level, mode):
    from trl.trainer.grpo_trainer import GRPOTrainer

    old, sampled = _normal(7, *SHAPE), _normal(7, *SHAPE) + _normal(8, *SHAPE, scale=0.3)
    theirs = _score(
        GRPOTrainer, torch.zeros(6, 1, dtype=torch.float64), logps=old, sampled=sampled.float(), use_vllm=True,
        vllm_importance_sampling_mode=f"{level}_{mode}", vllm_importance_sampling_clip_min=0.6,
        vllm_importance_sampling_clip_max=1.5)["importance_sampling_ratio"].expand(SHAPE)[MASK]
    ours = importance_weight((old - sampled.float())[MASK], LENGTHS, level=level, mode=mode, cap=1.5, floor=0.6)
    assert len(set(ours.tolist())) > 2
    torch.testing.assert_close(ours, theirs.double(), rtol=1e-9, atol=0)


def _dpo(learner, reference, **options):
    """TRL's DPO loss of pairs, log-probs (2P, T): the chosen ones, then the rejected ones."""
    from trl.trainer.dpo_trainer import DPOTrainer

    def model(**kwargs):
        zero = torch.zeros(learner.shape, dtype=torch.float64)
        return SimpleNamespace(log_probs=learner, entropy=zero, mean_logits=zero, is_top1=zero.bool())

    ids = torch.ones(len(learner), learner.shape[1] + 1, dtype=torch.int64)
    stub = _stub(logps=None, ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl",
                 loss_weights=[1.0], use_weighting=False, _total_train_tokens=0, _tp_size=1, **options)
    chosen, rejected = reference.sum(1).chunk(2)
    return DPOTrainer._compute_loss(stub, model, {
        "input_ids": ids, "attention_mask": ids, "completion_mask": ids, "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected}, False)


def test_the_dpo_loss_agrees_with_trl():
    learner, reference = _normal(0, *SHAPE).requires_grad_(), _normal(1, *SHAPE)
    theirs = _dpo(learner, reference, loss_types=["sigmoid"], beta=0.3)
    chosen, rejected = (learner - reference).sum(1).chunk(2)
    _assert_same(dpo_loss(chosen, rejected, beta=0.3, denom=3), theirs, learner)


def test_the_dpo_loss_with_label_smoothing_agrees_with_trl():
    """TRL smooths labels in `aot` alone, which for a single pair, where there is nothing to sort, is this loss."""
    learner, reference = _normal(0, 2, 7).requires_grad_(), _normal(1, 2, 7)
    theirs = _dpo(learner, reference, loss_types=["aot"], beta=0.3, label_smoothing=0.15)
    chosen, rejected = (learner - reference).sum(1).chunk(2)
    _assert_same(dpo_loss(chosen, rejected, beta=0.3, label_smoothing=0.15, denom=1), theirs, learner)


@pytest.mark.parametrize("margin", [None, [0.1, 0.0, 0.7]])
@pytest.mark.parametrize("center", [None, 0.01])
def test_the_reward_model_loss_agrees_with_trl(margin, center):
    from trl.trainer.reward_trainer import RewardTrainer

    scores = _normal(0, 6).requires_grad_()
    given = {"attention_mask": MASK.long()}
    if margin is not None:
        given["margin"] = torch.tensor(margin, dtype=torch.float64)
    stub = _stub(logps=None, args=SimpleNamespace(center_rewards_coefficient=center), _total_train_tokens=0, _tp_size=1)
    theirs = RewardTrainer.compute_loss(stub, lambda **kwargs: SimpleNamespace(logits=scores[:, None]), given)
    ours = bradley_terry(*scores.chunk(2), margin=given.get("margin", 0.0), center=center or 0.0, denom=3)
    _assert_same(ours, theirs, scores)
