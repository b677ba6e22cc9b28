import dataclasses

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.models.test_packed import CLASSES, SHAPE, make
from tests.rollouts.reference import decode
from tinyr2.core.errors import RunError
from tinyr2.models.decode import Decoder
from tinyr2.rollouts import engine
from tinyr2.rollouts.engine import decode_all
from tinyr2.rollouts.request import Ending, Request
from tinyr2.rollouts.sampling import SamplingConfig

PROMPTS = [(3, 1, 4), (1, 5), (9, 2, 6, 5, 3, 5, 8), (9, 2, 6, 5, 3, 5, 8), (9, 7), (2,), (3, 1, 4),
           (9, 2, 6, 5, 3, 5, 8)]
REQUESTS = [Request(p, seed=100 + i, max_new=6 + 5 * (i % 4)) for i, p in enumerate(PROMPTS)]
STOP = (4, 11)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.3])
@pytest.mark.parametrize("max_rows", [1, 3, 64])
def test_the_engine_writes_what_the_slow_decoder_writes(name, temperature, max_rows):
    model = make(name)
    found = decode_all(model, REQUESTS, SamplingConfig(temperature=temperature), stop=STOP, max_rows=max_rows)
    for request, answer in zip(REQUESTS, found, strict=True):
        expected = decode(model, request, temperature, set(STOP))
        assert answer.response_ids == expected.response_ids
        assert answer.finish == expected.finish
        assert answer.logp == pytest.approx(expected.logp, abs=2e-5)


def test_both_endings_occur_in_what_is_compared():
    model = make("qwen3")
    found = decode_all(model, REQUESTS, SamplingConfig(), stop=STOP)
    assert {a.finish for a in found} == {"stop", "length"}


def test_the_padded_decoder_writes_the_same(monkeypatch):
    model = make("qwen3")
    fast = decode_all(model, REQUESTS, SamplingConfig(), stop=STOP)
    monkeypatch.setattr(engine, "supports_decoding", lambda _: False)
    with pytest.warns(UserWarning, match="slower"):
        slow = decode_all(model, REQUESTS, SamplingConfig(), stop=STOP, max_rows=3)
    assert [(a.response_ids, a.finish) for a in slow] == [(a.response_ids, a.finish) for a in fast]


@pytest.mark.parametrize("padded", [False, True])
def test_an_answer_is_over_when_its_ending_says_so(monkeypatch, padded):
    monkeypatch.setattr(engine, "supports_decoding", lambda _: not padded)
    model, limit = make("qwen3"), [dataclasses.replace(r, max_new=30) for r in REQUESTS]
    whole = decode_all(model, limit, SamplingConfig(), stop=())
    ending = Ending(ids=frozenset(STOP), finished=lambda ids: sum(ids) > 100)
    for full, cut in zip(whole, decode_all(model, limit, SamplingConfig(), stop=ending), strict=True):
        over = [n for n in range(1, 31) if full.response_ids[n - 1] in STOP or sum(full.response_ids[:n]) > 100]
        assert cut.response_ids == full.response_ids[:over[0]]
        assert cut.finish == "stop"


def dynamic(seed: int = 0):
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SHAPE | {"max_position_embeddings": 12}, rope_parameters=rope)).eval()


@pytest.mark.filterwarnings("ignore:.*slower")
def test_rows_whose_positions_depend_on_the_longest_one_are_decoded_one_by_one():
    model = dynamic()
    with pytest.warns(UserWarning, match="one request at a time"):
        together = decode_all(model, REQUESTS, SamplingConfig(temperature=0.0), stop=STOP)
    assert together == [decode_all(model, [r], SamplingConfig(temperature=0.0), stop=STOP)[0] for r in REQUESTS]


@pytest.mark.parametrize("training", [False, True])
def test_the_padded_decoder_leaves_the_model_in_its_mode(monkeypatch, training):
    monkeypatch.setattr(engine, "supports_decoding", lambda _: False)
    model = make("qwen3").train(training)
    model.model.norm.train(not training)
    with pytest.warns(UserWarning, match="slower"):
        decode_all(model, REQUESTS[:1], SamplingConfig(), stop=STOP)
    assert model.training == training and model.model.norm.training != training


def test_a_decoder_of_another_vocabulary_is_refused():
    with pytest.raises(AssertionError, match="vocab 13"):
        decode_all(Decoder(make("qwen3")), REQUESTS, SamplingConfig(), stop=STOP, vocab=13)


def test_a_stale_copy_of_the_weights_is_refused():
    model = make("qwen3")
    decoder = Decoder(model, version=3)
    fresh = decode_all(decoder, REQUESTS, SamplingConfig(), stop=STOP)
    assert fresh == decode_all(model, REQUESTS, SamplingConfig(), stop=STOP)
    with torch.no_grad():
        model.model.norm.weight.mul_(2.0)
    with pytest.raises(RunError, match="stale"):
        decode_all(decoder, REQUESTS, SamplingConfig(), stop=STOP)


@pytest.mark.parametrize("name", CLASSES)
def test_an_exact_copy_gives_every_answer_the_same_bits_in_any_company(name):
    decoder = Decoder(make(name), exact=True)
    together = decode_all(decoder, REQUESTS * 9, SamplingConfig(), stop=STOP)
    assert together[:8] == together[-8:]
    for max_rows in (1, 3, 7):
        assert decode_all(decoder, REQUESTS, SamplingConfig(), stop=STOP, max_rows=max_rows) == together[:8]


def test_a_seed_gives_the_same_text_whatever_it_travels_with():
    model = make("qwen3")
    alone = [decode_all(model, [r], SamplingConfig(), stop=STOP)[0] for r in REQUESTS]
    together = decode_all(model, REQUESTS[::-1], SamplingConfig(), stop=STOP)[::-1]
    assert [a.response_ids for a in alone] == [a.response_ids for a in together]


def test_equal_prompts_with_other_seeds_get_other_answers():
    model = make("qwen3")
    requests = [Request((3, 1, 4), seed=s, max_new=12) for s in range(6)]
    assert len({a.response_ids for a in decode_all(model, requests, SamplingConfig(), stop=())}) == 6


def test_a_cropped_vocabulary_is_never_left():
    model = make("qwen3")
    requests = [dataclasses.replace(r, max_new=40) for r in REQUESTS]
    found = decode_all(model, requests, SamplingConfig(temperature=5.0), stop=(), vocab=13)
    ids = {t for a in found for t in a.response_ids}
    assert ids == set(range(13))


def test_decoding_leaves_the_model_in_its_mode():
    model = make("qwen3").train()
    decode_all(model, REQUESTS[:1], SamplingConfig(), stop=STOP)
    assert model.training
    assert not any(isinstance(p, torch.Tensor) and p.grad is not None for p in model.parameters())


def test_decoding_under_autocast_gives_log_probs_near_those_in_float32():
    model = make("qwen3")
    exact = decode_all(model, REQUESTS, SamplingConfig(), stop=())
    with torch.autocast("cpu", torch.bfloat16):
        coarse = decode_all(model, REQUESTS, SamplingConfig(), stop=())
    pairs = zip(exact, coarse, strict=True)
    first = [(a.logp[0], b.logp[0]) for a, b in pairs if a.response_ids[0] == b.response_ids[0]]
    assert len(first) >= 6
    assert all(abs(a - b) < 0.05 for a, b in first)
