"""`algorithm: dpo`: the loss and its gradient beside slow references, and what a run learns."""

import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.recipes import paired
from tests.train.tiny import EOS, VOCAB, qwen3, qwen3_f64, rollout
from tinyr2.core.types import Message, Problem
from tinyr2.data.pairs import Pair, PairsConfig, load_pairs
from tinyr2.recipes.dpo import pair_metrics, preference
from tinyr2.recipes.preference import answers
from tinyr2.train.step import Learner, Reading, accumulate, score

# two answers each, of unlike lengths; the reference's log-probs are exact in float32
PAIRS = [
    rollout((3, 4, 5), (6, 7, EOS), reference_logp=(-1.5, -3.25, -2.0), group=0),
    rollout((3, 4, 5), (8, EOS), reference_logp=(-4.0, -2.5), group=0, sample=1),
    rollout((9,), (14,), reference_logp=(-3.0,), group=1),
    rollout((9,), (10, 11, 12, 13, EOS), reference_logp=(-3.0, -2.75, -4.0, -3.5, -1.0), group=1, sample=1),
    rollout((15, 16, 17, 18), (21, EOS), reference_logp=(-3.5, -3.0), group=2),
    rollout((15, 16, 17, 18), (22, 3, 4, EOS), reference_logp=(-2.0, -3.0, -3.0, -3.5), group=2, sample=1),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return paired.make_world(tmp_path_factory.mktemp("world"))


def learn(rollouts, model, *, budget=1000, beta=0.5, label_smoothing=0.0):
    """(scores, gradient by name) of whole pairs."""
    model.zero_grad()
    scores = accumulate(
        Learner(model=model, vocab=VOCAB, tokens_per_micro_batch=budget), rollouts,
        lambda b: preference(b, beta=beta, label_smoothing=label_smoothing, denom=len(rollouts) // 2),
        Reading(score_first=True, keep_groups=True))
    return scores, {n: p.grad.clone() for n, p in model.named_parameters()}


def loop(rollouts, model, beta, label_smoothing):
    """The same by loops over pairs, answers and tokens, on full float64 logits, with autograd."""
    model.zero_grad()
    total = 0.0
    for chosen, rejected in zip(rollouts[::2], rollouts[1::2], strict=True):
        ratio = []
        for r in (chosen, rejected):
            logp = torch.log_softmax(model(torch.tensor([[*r.prompt_ids, *r.response_ids]])).logits[0], -1)
            at = len(r.prompt_ids) - 1
            ratio.append(sum(logp[at + j, token] - r.reference_logp[j] for j, token in enumerate(r.response_ids)))
        margin = beta * (ratio[0] - ratio[1])
        total = total - (1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)
    loss = total / (len(rollouts) // 2)
    loss.backward()
    return loss, {n: p.grad.clone() for n, p in model.named_parameters()}


def test_two_pairs_by_hand():
    model, uniform = qwen3(), -math.log(VOCAB)
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()  # every token has probability 1/23, whatever stands before it

    def answer(group, sample, excess, n):
        """n tokens, on each of which the model is `excess` nats above the reference."""
        return rollout((3, 4, 5), tuple(range(6, 5 + n)) + (EOS,), reference_logp=(uniform - excess,) * n,
                       group=group, sample=sample)

    rollouts = [answer(0, 0, 1.0, 3), answer(0, 1, 2.0, 1), answer(1, 0, 0.0, 2), answer(1, 1, 1.0, 4)]
    scores, _ = learn(rollouts, model, beta=0.1)
    # log-ratios 3 and 2, 0 and 4: margins 0.1 and -0.4; -log sigmoid gives 0.644397 and 0.913015
    assert scores.loss == pytest.approx(0.778706, abs=2e-6)
    assert pair_metrics(scores, 0.1) == pytest.approx({
        "rewards/chosen": 0.15, "rewards/rejected": 0.3, "rewards/margins": -0.15, "rewards/accuracies": 0.5,
        "logps/chosen": 2.5 * uniform, "logps/rejected": 2.5 * uniform}, abs=1e-6)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_value_and_gradient_are_those_of_autograd_through_full_logits(label_smoothing):
    scores, found = learn(PAIRS, qwen3(dtype=torch.float64), label_smoothing=label_smoothing)
    loss, expected = loop(PAIRS, qwen3_f64(), 0.5, label_smoothing)
    assert scores.loss == pytest.approx(float(loss.detach()), rel=1e-9)
    scale = max(float(g.abs().max()) for g in expected.values())
    assert scale > 1e-2
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-8 * scale)


def test_micro_batches_keep_pairs_whole_and_change_neither_loss_nor_gradient():
    whole, expected = learn(PAIRS, qwen3(dtype=torch.float64))
    for budget in (1, 14, 20):
        scores, found = learn(PAIRS, qwen3(dtype=torch.float64), budget=budget)
        assert [(r.group, r.sample) for r in scores.rollouts[::2]] == [(r.group, 0) for r in scores.rollouts[1::2]]
        assert scores.loss == pytest.approx(whole.loss, rel=1e-12)
        assert pair_metrics(scores, 0.5) == pytest.approx(pair_metrics(whole, 0.5), rel=1e-9)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-12)


def test_the_order_of_the_pairs_does_not_matter():
    _, expected = learn(PAIRS, qwen3(dtype=torch.float64))
    _, found = learn([*PAIRS[4:], *PAIRS[:4]], qwen3(dtype=torch.float64))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)


def test_an_answer_is_its_text_and_its_end_and_no_prompt_token_nor_bos(world):
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    tokenizer.chat_template = "<bos>" + tokenizer.chat_template
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    pair = Pair(problem=Problem(id="p:0", task="p", messages=(Message("user", "1+2"),)),
                chosen=(Message("assistant", "37"),), rejected=(Message("assistant", "4"),))
    chosen, rejected = answers([pair], tokenizer)
    digits = {c: tokenizer.convert_tokens_to_ids(c) for c in "12347"}
    assert chosen.response_ids == (digits["3"], digits["7"], tokenizer.eos_token_id)
    assert rejected.response_ids == (digits["4"], tokenizer.eos_token_id)
    assert chosen.prompt_ids == rejected.prompt_ids
    assert chosen.prompt_ids.count(tokenizer.bos_token_id) == 1 and chosen.prompt_ids[0] == tokenizer.bos_token_id
    assert (chosen.group, chosen.sample, rejected.group, rejected.sample) == (0, 0, 0, 1)
    assert chosen.learned == 3  # the token that ends it too, although it is the padding token


# --- runs


def test_the_first_loss_is_log_2_and_the_first_log_probs_are_the_stock_models(world, tmp_path):
    config = paired.settings("dpo", world, tmp_path / "run", "pairs_per_step=120", "train.max_steps=1",
                             "eval_data=null")
    paired.go(config)
    (row,) = paired.rows_of(config)
    rollouts = answers(load_pairs(config.data), AutoTokenizer.from_pretrained(world / "model"))
    stock = Learner(model=AutoModelForCausalLM.from_pretrained(world / "model"), vocab=VOCAB,
                    tokens_per_micro_batch=1000)
    sums = [sum(logp) for logp in score(stock, rollouts)]
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert row["logps/chosen"] == pytest.approx(sum(sums[::2]) / 120, rel=1e-5)
    assert row["logps/rejected"] == pytest.approx(sum(sums[1::2]) / 120, rel=1e-5)
    assert row["rewards/accuracies"] == pytest.approx(0.5, abs=0.1)


def test_thirty_steps_put_the_preferred_answer_first(world, tmp_path):
    config = paired.settings("dpo", world, tmp_path / "run", "train.max_steps=30", "train.learning_rate=3e-2",
                             "train.eval_on_start=true", "pairs_per_step=16", "beta=0.5")
    paired.go(config)
    first, *_, last = paired.rows_of(config)
    assert first["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert last["eval_accuracy"] > 0.9 and last["eval_accuracy_n"] == 60
    assert last["eval_loss"] < 0.3 and last["rewards/accuracies"] > 0.9
    assert last["eval_accuracy_low"] < last["eval_accuracy"] <= last["eval_accuracy_high"]


def test_the_finished_model_has_the_held_out_margin_that_was_reported(world, tmp_path):
    config = paired.settings("dpo", world, tmp_path / "run", "reference={path: {world}/model}")
    paired.go(config)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/final")
    rollouts = answers(load_pairs(PairsConfig(path=str(world / "held_out.jsonl"))), tokenizer)
    sums = []
    for folder in (tmp_path / "run/final", world / "model"):
        stock = Learner(model=AutoModelForCausalLM.from_pretrained(folder), vocab=VOCAB, tokens_per_micro_batch=1000)
        sums.append(torch.tensor([sum(logp) for logp in score(stock, rollouts)]))
    ratio = sums[0] - sums[1]
    expected = 0.1 * float((ratio[::2] - ratio[1::2]).mean())
    assert paired.rows_of(config)[-1]["eval_margin"] == pytest.approx(expected, abs=1e-5)


def test_adapters_alone_can_be_trained(world, tmp_path):
    config = paired.settings("dpo", world, tmp_path / "run", "model.lora={r: 4}", "train.learning_rate=3e-2",
                             "train.max_steps=15", "pairs_per_step=16", "beta=0.5")
    paired.go(config)
    first, *_, last = paired.rows_of(config)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)  # adapters begin as nothing
    assert last["eval_loss"] < 0.65 and last["eval_accuracy"] > 0.6
    before, after = (AutoModelForCausalLM.from_pretrained(p) for p in (world / "model", tmp_path / "run/final"))
    assert torch.equal(before.model.embed_tokens.weight, after.model.embed_tokens.weight)
    assert not torch.equal(before.model.layers[0].mlp.up_proj.weight, after.model.layers[0].mlp.up_proj.weight)
