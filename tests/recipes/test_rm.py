"""`algorithm: rm`: what is scored, the loss beside a slow reference, and what a run learns."""

import copy
import io
import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.recipes import paired
from tests.train.tiny import Norm
from tinyr2.core.errors import ConfigError
from tinyr2.core.packing import pack
from tinyr2.data.pairs import PairsConfig, load_pairs
from tinyr2.models.load import ModelConfig
from tinyr2.models.scalar import load_scalar
from tinyr2.recipes import rm
from tinyr2.recipes.preference import accuracy, answers, checked, read
from tinyr2.report.console import Console
from tinyr2.train.step import Learner

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return paired.make_world(tmp_path_factory.mktemp("world"))


def work_of(world, out, *overrides, budget=1000) -> rm.RewardTuning:
    """The steps of a run, of a float64 model whose scores tell answers apart."""
    config = paired.settings("rm", world, out, *overrides)
    inputs = checked(read(config), Console(plain=True, stream=io.StringIO()))
    model = load_scalar(ModelConfig(path=str(world / "model")), CPU).double()
    torch.manual_seed(5)
    torch.nn.init.normal_(model.score.weight)
    return rm.RewardTuning(config, inputs, Learner(model=model, vocab=inputs.vocab, tokens_per_micro_batch=budget))


def gradients(work: rm.RewardTuning) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in work.learner.model.named_parameters()}


def exact(model: torch.nn.Module) -> torch.nn.Module:
    """A copy whose norms, unlike transformers' own, do not pass through float32."""
    model = copy.deepcopy(model)
    model.zero_grad()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__ == "Qwen3RMSNorm":
                setattr(module, name, Norm(child))
    return model


def loop(model, tokenizer, pairs, *, center=0.0, margins=None) -> torch.Tensor:
    """The loss, pair by pair through the stock forward, each answer alone."""
    rollouts = answers(pairs, tokenizer)
    total = 0.0
    for i in range(len(pairs)):
        c, r = (model(torch.tensor([[*a.prompt_ids, *a.response_ids]])).logits[0, 0]
                for a in rollouts[2 * i:2 * i + 2])
        total = total - logsigmoid(c - r - (margins[i] if margins else 0.0)) + center * (c + r) ** 2
    return total / len(pairs)


@pytest.mark.parametrize("overrides", [(), ("center_rewards_coefficient=0.1",), ("use_margin=true",)])
def test_loss_and_gradient_are_those_of_single_answers_through_the_stock_forward(overrides, world, tmp_path):
    work = work_of(world, tmp_path / "run", *overrides, "pairs_per_step=30", "data.limit=30")
    result, pairs, tokenizer = work.step(0), work.inputs.pairs, work.inputs.tokenizer  # a step reads every pair once
    model = exact(work.learner.model)
    loss = loop(model, tokenizer, pairs, center=0.1 if "center" in str(overrides) else 0.0,
                margins=[p.margin for p in pairs] if "use_margin" in str(overrides) else None)
    loss.backward()
    assert result.metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-9)
    expected = {n: p.grad for n, p in model.named_parameters()}
    scale = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in gradients(work).items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-9 * scale)
    assert result.num_tokens == sum(len(a.prompt_ids) + len(a.response_ids) for a in answers(pairs, tokenizer))


def test_micro_batches_keep_pairs_whole_and_change_neither_loss_nor_gradient(world, tmp_path):
    settings = ("use_margin=true", "center_rewards_coefficient=0.1")
    whole = work_of(world, tmp_path / "run", *settings)
    expected_metrics, expected = whole.step(0).metrics, gradients(whole)
    for budget in (1, 50, 90):
        work = work_of(world, tmp_path / "run", *settings, budget=budget)
        assert work.step(0).metrics == pytest.approx(expected_metrics, rel=1e-9)
        for name, gradient in expected.items():
            torch.testing.assert_close(gradients(work)[name], gradient, rtol=1e-6, atol=1e-12)


def test_the_score_is_read_at_the_token_that_ends_the_answer_although_it_is_the_padding_token(world, tmp_path):
    work = work_of(world, tmp_path / "run")
    tokenizer = work.inputs.tokenizer
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    rollouts = answers(work.inputs.pairs[:4], tokenizer)
    with torch.no_grad():
        found = rm.last_scores(work.learner, pack(rollouts))
        for r, value in zip(rollouts, found, strict=True):
            ids = torch.tensor([[*r.prompt_ids, *r.response_ids]])
            states = work.learner.model.model(ids).last_hidden_state[0] @ work.learner.model.score.weight[0]
            assert ids[0, -1] == tokenizer.eos_token_id
            assert float(value) == pytest.approx(float(states[-1]), abs=1e-5)
            assert abs(float(states[-2] - states[-1])) > 1e-3  # the token before would give another score


def test_a_tie_counts_half():
    assert accuracy(torch.tensor([1.0, 2.0, 0.0, 3.0]), torch.tensor([0.0, 2.0, 1.0, 3.0])) == 0.5
    assert accuracy(torch.tensor([1.0, 2.0, 5.0, 3.0]), torch.tensor([0.0, 2.0, 1.0, 2.0])) == 0.875


# --- runs


def test_thirty_steps_put_the_preferred_answer_first(world, tmp_path):
    config = paired.settings("rm", world, tmp_path / "run", "train.max_steps=30", "train.learning_rate=2e-2",
                             "train.eval_on_start=true", "pairs_per_step=16")
    paired.go(config)
    start, first, *_, last = paired.rows_of(config)
    assert start["eval_accuracy"] == 0.5 and start["eval_margin"] == 0.0  # a zero score: every pair is a tie
    assert start["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert last["eval_accuracy"] > 0.9 and last["eval_accuracy_n"] == 60
    assert last["accuracy"] > 0.9 and last["eval_margin"] > 1.0 and last["eval_loss"] < 0.3
    assert first.keys() == {"step", "loss", "accuracy", "margin", "min_reward", "mean_reward", "max_reward",
                            "grad_norm", "learning_rate", "num_tokens"}


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_finished_folder_gives_stock_code_the_scores_that_were_reported(side, world, tmp_path):
    config = paired.settings("rm", world, tmp_path / "run", "train.learning_rate=2e-2", "pairs_per_step=30")
    result = paired.go(config)
    stock = AutoModelForSequenceClassification.from_pretrained(result["model"])
    tokenizer = AutoTokenizer.from_pretrained(result["model"], padding_side=side)
    rollouts = answers(load_pairs(PairsConfig(path=str(world / "held_out.jsonl"))), tokenizer)
    batch = tokenizer.pad({"input_ids": [[*r.prompt_ids, *r.response_ids] for r in rollouts]}, return_tensors="pt")
    with torch.no_grad():
        scores = stock(**batch).logits[:, 0]
    row = paired.rows_of(config)[-1]
    assert row["eval_margin"] == pytest.approx(float((scores[::2] - scores[1::2]).mean()), abs=1e-5)
    assert row["eval_accuracy"] == pytest.approx(accuracy(*scores.view(-1, 2).unbind(1)))
    assert abs(row["eval_margin"]) > 1e-3


def test_a_finished_reward_model_can_be_trained_on(world, tmp_path):
    paired.go(paired.settings("rm", world, tmp_path / "a", "train.learning_rate=2e-2"))
    config = paired.settings("rm", world, tmp_path / "b", f"model.path={tmp_path}/a/final",
                             "train.eval_on_start=true")
    paired.go(config)
    before = paired.rows_of(paired.settings("rm", world, tmp_path / "a"))[-1]
    assert paired.rows_of(config)[0]["eval_margin"] == pytest.approx(before["eval_margin"], rel=1e-5)


def test_adapters_are_refused(world, tmp_path):
    with pytest.raises(ConfigError, match="model.lora: a reward model is trained whole; set it to null"):
        paired.settings("rm", world, tmp_path / "run", "model.lora={r: 4}")


def test_margins_that_are_asked_for_and_not_there_are_a_fault_with_a_count(world, tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "1+1", "chosen": "2", "rejected": "3", "margin": 1}\n'
                                          '{"prompt": "1+2", "chosen": "3", "rejected": "4"}\n')
    config = paired.settings("rm", world, tmp_path / "run", "use_margin=true", f"data.path={tmp_path}/pairs.jsonl")
    with pytest.raises(ConfigError, match="data.margin: use_margin, and 1 of 2 pairs have no margin; fill in"):
        paired.go(config)
