"""Latent attention: the decode copy, which never expands its cache, gives the states of the stock forward."""

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

from tests.models.test_decode import PROMPTS, Slots, last_state
from tests.rollouts.reference import decode as slow_decode
from tinyr2.core.errors import RunError
from tinyr2.models.decode import Decoder, supports_decoding
from tinyr2.models.load import LoraConfig, add_lora
from tinyr2.models.packed import hidden_states
from tinyr2.rollouts.engine import decode_all
from tinyr2.rollouts.request import Request
from tinyr2.rollouts.sampling import SamplingConfig

SHAPE = dict(vocab_size=31, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=12, qk_rope_head_dim=6, qk_nope_head_dim=10,
             v_head_dim=8, n_routed_experts=8, num_experts_per_tok=3, max_position_embeddings=256)
DENSE = dict(q_lora_rank=None, first_k_dense_replace=2, n_group=1, topk_group=1)
LORA = dict(DENSE, q_lora_rank=9)
ROUTED = dict(LORA, first_k_dense_replace=1)
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.9,
        "original_max_position_embeddings": 32}
V2, V3 = (DeepseekV2Config, DeepseekV2ForCausalLM), (DeepseekV3Config, DeepseekV3ForCausalLM)
MODELS = {
    "v3": (V3, DENSE),
    "v3 short queries, biases": (V3, dict(LORA, attention_bias=True)),
    "v3 halves": (V3, dict(LORA, rope_interleave=False)),
    "v3 biases, halves": (V3, dict(DENSE, rope_interleave=False, attention_bias=True)),
    "v3 yarn": (V3, dict(DENSE, rope_parameters=YARN)),
    "v3 wide values, odd latent": (V3, dict(DENSE, v_head_dim=24, kv_lora_rank=13)),
    "v3 experts": (V3, dict(ROUTED, n_group=4, topk_group=2, routed_scaling_factor=2.5)),
    "v3 experts, one group, raw weights": (V3, dict(ROUTED, norm_topk_prob=False, n_shared_experts=2)),
    "v2": (V2, DENSE),
    "v2 yarn, biases": (V2, dict(LORA, rope_parameters=YARN, attention_bias=True, mlp_bias=True)),
    "v2 experts": (V2, dict(ROUTED, topk_method="greedy", n_group=None, topk_group=None, routed_scaling_factor=1.5)),
    "v2 experts in groups": (V2, dict(ROUTED, topk_method="group_limited_greedy", n_group=4, topk_group=2)),
}


def make(name: str, **changes) -> torch.nn.Module:
    """A stock model with weights so large that attention and routing matter, and with no norm or bias left trivial."""
    (config, stock), options = MODELS[name]
    torch.manual_seed(0)
    model = stock(config(**SHAPE | options | changes | {"initializer_range": 0.2})).eval()
    for key, tensor in model.state_dict().items():
        if key.endswith(("norm.weight", "bias")):
            tensor.copy_(torch.rand_like(tensor) + (0.5 if key.endswith("weight") else -0.5))
    return model


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_rows_that_enter_leave_and_move_keep_the_states_of_the_stock_forward(name, exact):
    slots = Slots(make(name), atol=1e-5, exact=exact)
    slots.compare(slots.enter(PROMPTS, [2, 1, 2]), slots.rows)
    for t in range(3):
        slots.step([(5 * t + 7 * i) % 31 for i in range(5)])
    assert slots.drop({0, 3}) == [4, 1, 2]
    slots.step([1, 2, 3])
    states = slots.enter([(4, 4)], [3])
    slots.compare(states, slots.rows[3:])
    for t in range(3):
        slots.step([(t + 3 * i) % 31 for i in range(6)])


@pytest.mark.parametrize("name", ["v3", "v3 wide values, odd latent", "v2 yarn, biases"])
def test_long_prompts_of_unequal_lengths_give_the_states_of_the_stock_forward(name):
    slots = Slots(make(name), atol=1e-5)
    prompts = [[(i * i + n) % 31 for i in range(n)] for n in (190, 140, 170)]
    slots.compare(slots.enter(prompts, [1, 1, 1]), slots.rows)
    slots.step([3, 4, 5])


def test_a_cached_token_takes_one_latent_and_one_key():
    decoder = Decoder(make("v3"))
    cache = decoder.new_cache(columns=10)
    decoder.prefill(cache, PROMPTS, [1, 1, 1])
    assert [[tuple(s.data.shape) for s in stores] for stores in cache.layers] == [[(3, 10, 12 + 6)]] * 2


@pytest.mark.parametrize("name", ["v3", "v3 halves", "v3 experts", "v2 yarn, biases", "v2 experts in groups"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_engine_writes_what_the_slow_decoder_writes(name, temperature):
    model = make(name)
    requests = [Request(p, seed=100 + i, max_new=5 + 4 * (i % 3)) for i, p in enumerate((*PROMPTS, *PROMPTS))]
    found = decode_all(model, requests, SamplingConfig(temperature=temperature), stop=(4, 11), max_rows=4)
    for request, answer in zip(requests, found, strict=True):
        expected = slow_decode(model, request, temperature, {4, 11})
        assert (answer.response_ids, answer.finish) == (expected.response_ids, expected.finish)
        assert answer.logp == pytest.approx(expected.logp, abs=2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_an_exact_row_has_the_same_bits_alone_and_in_company(name):
    decoder = Decoder(make(name), exact=True)
    company = [*PROMPTS, *((i % 31, 3, (7 * i) % 31) for i in range(40)), tuple(range(30)), tuple(range(31)) * 3]
    written = [[(5 * t + i) % 31 for i in range(len(company))] for t in range(40)]
    cache = decoder.new_cache()
    together = [decoder.prefill(cache, company, [1] * len(company))]
    together += [decoder.step(cache, torch.tensor(tokens)) for tokens in written]
    for rows in ([0], [2, 30], [44]):
        cache = decoder.new_cache()
        alone = [decoder.prefill(cache, [company[r] for r in rows], [1] * len(rows))]
        alone += [decoder.step(cache, torch.tensor([tokens[r] for r in rows])) for tokens in written]
        assert all(torch.equal(a, b[rows]) for a, b in zip(alone, together, strict=True))


ADAPTED = [("v3 short queries, biases", "all-linear"), ("v3 experts", "all-linear"),
           ("v2 experts", ("q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj"))]


@pytest.mark.parametrize(("name", "modules"), ADAPTED)
def test_an_adapted_model_decodes_through_its_adapters(name, modules):
    model = add_lora(make(name), LoraConfig(r=2, target_modules=modules), 0)
    plain = last_state(model, [*PROMPTS[0], 7])
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "lora_B" in key:
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(key))))
    assert float((last_state(model, [*PROMPTS[0], 7]) - plain).abs().max()) > 0.1
    slots = Slots(model, atol=1e-5)
    slots.compare(slots.enter(PROMPTS, [1, 1, 1]), slots.rows)
    slots.step([7, 7, 7])
    with model.disable_adapter():
        slots = Slots(model, atol=1e-5)
        slots.compare(slots.enter(PROMPTS, [1, 1, 1]), slots.rows)


@pytest.mark.parametrize("name", ["v3", "v2 yarn, biases"])
def test_a_copy_in_bfloat16_is_near_one_in_float32(name):
    model = make(name, num_hidden_layers=1)
    copies = [Slots(model, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    prompted = [c.enter(PROMPTS, [1, 1, 1]) for c in copies]
    stepped = [c.decoder.step(c.cache, torch.tensor([1, 2, 3])) for c in copies]
    for wide, narrow in (prompted, stepped):
        assert narrow.dtype == torch.bfloat16
        assert 0 < float((wide - narrow.float()).abs().max()) < 0.1


def test_a_copy_notices_that_the_bias_of_a_router_has_moved():
    model = make("v3 experts")
    decoder = Decoder(model)
    decoder.check()
    model.model.layers[1].mlp.gate.e_score_correction_bias.add_(0.001)
    with pytest.raises(RunError, match="stale"):
        decoder.check()


def test_rotary_positions_that_depend_on_the_longest_row_are_not_decoded_by_a_copy():
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    assert supports_decoding(make("v3"))
    assert not supports_decoding(make("v3", rope_parameters=rope))


@pytest.mark.parametrize("name", MODELS)
def test_what_the_actor_sampled_is_what_the_learner_scores(name):
    model = make(name)
    requests = [Request(p, seed=i, max_new=20) for i, p in enumerate([(3, 1, 4), (1, 5), (9, 2, 6, 5, 3, 5, 8)] * 3)]
    answers = decode_all(model, requests, SamplingConfig(), stop=())
    rows = [torch.tensor([*r.prompt_ids, *a.response_ids]) for r, a in zip(requests, answers, strict=True)]
    tokens, lengths = torch.cat(rows), [len(r) for r in rows]
    with torch.no_grad():
        states = hidden_states(model, tokens, torch.cat([torch.arange(n) for n in lengths]), lengths)
        logp = model.lm_head(states).log_softmax(-1)[:-1].gather(1, tokens[1:, None])[:, 0]
    start, gaps = 0, []
    for row, request, answer in zip(rows, requests, answers, strict=True):
        first = start + len(request.prompt_ids) - 1
        gaps.append((logp[first:first + 20] - torch.tensor(answer.logp)).abs())
        start += len(row)
    assert float(torch.cat(gaps).max()) < 1e-4
    assert float(torch.cat(gaps).mean()) < 1e-6
