"""From problems to rollouts: their order, what is noted of each, and that its randomness is its own."""

from dataclasses import replace

import pytest
import torch

from tests.rollouts.reference import decode as slow_decode
from tests.train.tiny import qwen3
from tinyr2.core.errors import DataError, RunError
from tinyr2.core.rng import derive
from tinyr2.core.types import Message, Problem
from tinyr2.models.load import LoraConfig, add_lora
from tinyr2.rollouts import sample as sample_module
from tinyr2.rollouts.engine import decode_all
from tinyr2.rollouts.request import Request
from tinyr2.rollouts.sample import Policy, sample
from tinyr2.rollouts.sampling import SamplingConfig
from tinyr2.tokens.build import train_tokenizer
from tinyr2.tokens.chat import decode, render_prompt

TOKENIZER = train_tokenizer(["1+2=3", "4+5=9", "6+7=13", "80"], vocab_size=18, alphabet="corpus")
PROBLEMS = [Problem(id=f"p{i}", task="t", messages=(Message("user", text),)) for i, text in
            enumerate(["1+2=", "4=", "6+7+8="])]
SAMPLING = SamplingConfig(max_completion_length=9)


def policy(**changes) -> Policy:
    end = TOKENIZER.eos_token_id
    return Policy(**{"model": qwen3(), "tokenizer": TOKENIZER, "stop": (end,), "vocab": len(TOKENIZER), "context": 64,
                     "version": 7} | changes)


def texts(rollouts) -> list[tuple[int, ...]]:
    return [r.response_ids for r in rollouts]


class Cropped:
    """A model without the ids that the tokenizer lacks."""

    def __init__(self, model):
        self.model = model

    def __call__(self, ids, use_cache):
        out = self.model(ids, use_cache=use_cache)
        out.logits = out.logits[..., :len(TOKENIZER)]
        return out


def test_rollouts_come_problem_by_problem_with_group_and_sample():
    found = sample(policy(), PROBLEMS, n=2, sampling=SAMPLING, seed=0)
    assert [(r.problem.id, r.group, r.sample) for r in found] == [
        ("p0", 0, 0), ("p0", 0, 1), ("p1", 1, 0), ("p1", 1, 1), ("p2", 2, 0), ("p2", 2, 1)]
    assert [r.prompt_ids for r in found[::2]] == [render_prompt(TOKENIZER, p.messages) for p in PROBLEMS]


def test_every_rollout_is_what_the_slow_decoder_writes_from_its_derived_seed():
    found = sample(policy(), PROBLEMS, n=3, sampling=SamplingConfig(temperature=0.7, max_completion_length=9), seed=5,
                   step=4)
    for r in found:
        seed = derive(5, "student", 4, r.problem.id, 0, r.sample)  # no problem comes twice
        answer = slow_decode(Cropped(qwen3()), Request(r.prompt_ids, seed, 9), 0.7, {TOKENIZER.eos_token_id})
        assert (r.response_ids, r.finish) == (answer.response_ids, answer.finish)
        assert r.actor_logp == pytest.approx(answer.logp, abs=2e-5)
        assert (r.temperature, r.author, r.policy_version) == (0.7, "student", 7)
        assert r.text == decode(TOKENIZER, r.response_ids)
    assert {r.finish for r in found} == {"stop", "length"}


def test_a_teacher_writes_with_randomness_of_its_own_and_leaves_no_log_probs_of_a_policy():
    own = sample(policy(), PROBLEMS, n=2, sampling=SAMPLING, seed=0)
    taught = sample(policy(), PROBLEMS, n=2, sampling=SAMPLING, seed=0, author="teacher")
    assert texts(own) != texts(taught)
    assert {r.author for r in taught} == {"teacher"}
    assert [r.actor_logp for r in taught] == [None] * 6
    assert [r.policy_version for r in taught] == [None] * 6


def test_a_rollout_is_drawn_again_alone_and_not_by_another_seed_step_or_sample():
    found = sample(policy(), PROBLEMS, n=4, sampling=SAMPLING, seed=0, step=3)
    assert texts(sample(policy(), PROBLEMS[:1], n=1, sampling=SAMPLING, seed=0, step=3)) == texts(found[:1])
    assert texts(sample(policy(), PROBLEMS, n=4, sampling=SAMPLING, seed=0, step=3, max_rows=2)) == texts(found)
    for change in ({"seed": 1}, {"step": 4}):
        again = sample(policy(), PROBLEMS, n=4, sampling=SAMPLING, **{"seed": 0, "step": 3} | change)
        assert texts(again) != texts(found)
    assert len(set(texts(found[:4]))) > 1


def test_a_problem_that_stands_twice_gets_two_answers():
    found = sample(policy(), [PROBLEMS[0]] * 6, n=1, sampling=SAMPLING, seed=0)
    assert len(set(texts(found))) > 1


def test_an_answer_never_passes_the_context():
    room = 12 - len(render_prompt(TOKENIZER, PROBLEMS[2].messages))
    found = sample(policy(stop=(), context=12), PROBLEMS, n=2, sampling=SAMPLING, seed=0)
    assert [len(r.prompt_ids) + len(r.response_ids) for r in found][4:] == [12, 12]
    assert 0 < room < 9
    unlimited = sample(policy(stop=(), context=None), PROBLEMS, n=2, sampling=SAMPLING, seed=0)
    assert [len(r.response_ids) for r in unlimited] == [9] * 6
    assert {r.finish for r in found + unlimited} == {"length"}


def test_a_prompt_that_fills_the_context_is_an_error_that_names_it():
    long = replace(PROBLEMS[0], id="long", messages=(Message("user", "1+2=" * 5),))
    with pytest.raises(DataError, match="problem long: its prompt has 22 tokens, the model's context 22; drop it"):
        sample(policy(context=22), [*PROBLEMS, long], n=1, sampling=SAMPLING, seed=0)


def test_decoding_leaves_every_module_in_the_mode_that_it_had():
    model = add_lora(qwen3(), LoraConfig(r=2, lora_dropout=0.5), 0)  # adapters that train on a body that does not
    modes = [m.training for m in model.modules()]
    assert set(modes) == {True, False}
    decode_all(model, [Request((3, 4), 0, 3)], SAMPLING, stop=(2,))
    assert [m.training for m in model.modules()] == modes


def test_a_problem_gets_the_same_answers_whatever_stands_beside_it_and_others_when_it_comes_again():
    alone = sample(policy(), PROBLEMS[1:2], n=2, sampling=SAMPLING, seed=5)
    among = sample(policy(), [PROBLEMS[0], PROBLEMS[1], PROBLEMS[1]], n=2, sampling=SAMPLING, seed=5)
    assert [r.response_ids for r in alone] == [r.response_ids for r in among[2:4]]
    assert [r.response_ids for r in among[2:4]] != [r.response_ids for r in among[4:6]]


def test_a_policy_without_a_decode_copy_knows_its_weights_too(monkeypatch):
    monkeypatch.setattr(sample_module, "supports_decoding", lambda _: False)
    writer = policy()
    before = sample(writer, PROBLEMS, n=1, sampling=SAMPLING, seed=0)
    assert texts(sample(writer, PROBLEMS, n=1, sampling=SAMPLING, seed=0)) == texts(before)
    with torch.no_grad():
        writer.model.lm_head.weight.add_(0.1)
    with pytest.raises(RunError, match="stale.*version 7"):
        sample(writer, PROBLEMS, n=1, sampling=SAMPLING, seed=0)


def test_equal_problems_with_one_seed_draw_what_the_exact_distribution_says():
    writer, n = policy(model=qwen3()), 20_000
    sampling = SamplingConfig(max_completion_length=1)
    drawn = [r.response_ids[0] for r in sample(writer, PROBLEMS[:1], n=n, sampling=sampling, seed=3, max_rows=n)]
    ids = torch.tensor([render_prompt(TOKENIZER, PROBLEMS[0].messages)])
    with torch.no_grad():
        expected = n * writer.model(ids).logits[0, -1, :len(TOKENIZER)].double().softmax(-1)
    counts = torch.tensor(drawn).bincount(minlength=len(TOKENIZER)).double()
    kept = expected >= 5
    seen, awaited = (torch.cat([x[kept], x[~kept].sum()[None]]) for x in (counts, expected))
    seen, awaited = (x[awaited > 0] for x in (seen, awaited))
    statistic = ((seen - awaited) ** 2 / awaited).sum()
    chance = torch.special.gammaincc(torch.tensor((len(seen) - 1) / 2, dtype=torch.float64), statistic / 2)
    assert 0.001 < float(chance) < 0.999
