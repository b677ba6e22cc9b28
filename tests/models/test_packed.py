import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tinyr2.core.errors import ConfigError
from tinyr2.models import packed
from tinyr2.models.presets import PRESETS

SHAPE = dict(vocab_size=31, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=128)
CLASSES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=7)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=8)),
}
# Keys of width 12 and values of width 6; the second layer routes each token to 2 of 4 experts.
MLA = dict(kv_lora_rank=8, q_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6, n_routed_experts=4,
           n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=16, first_k_dense_replace=1, n_group=1,
           topk_group=1)
STOCK_CLASSES = {
    "deepseek_v2": lambda: DeepseekV2ForCausalLM(DeepseekV2Config(**SHAPE | {"num_key_value_heads": 4}, **MLA)),
    "deepseek_v3": lambda: DeepseekV3ForCausalLM(DeepseekV3Config(**SHAPE | {"num_key_value_heads": 4}, **MLA)),
}


def make(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return (CLASSES | STOCK_CLASSES)[name]().eval()


def rows_of(lengths: list[int]) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    return [torch.randint(0, 31, (n,), generator=rng) for n in lengths]


def pack(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    return torch.cat(rows), torch.cat([torch.arange(len(r)) for r in rows]), [len(r) for r in rows]


def test_every_class_that_packs_is_tested():
    assert set(CLASSES) == packed.PACKED
    assert set(STOCK_CLASSES) == packed.STOCK_PACKED


@pytest.mark.parametrize("name", [*CLASSES, *STOCK_CLASSES])
def test_a_row_alone_and_packed_have_the_same_hidden_states(name):
    model, rows = make(name), rows_of([5, 23, 1, 9, 22, 9])
    with torch.no_grad():
        together = packed.hidden_states(model, *pack(rows))
        alone = torch.cat([model.model(r[None], use_cache=False).last_hidden_state[0] for r in rows])
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-6)


def gradients(model: torch.nn.Module, rows: list[torch.Tensor], together: bool, **options) -> dict[str, torch.Tensor]:
    """Of a weighted sum of the hidden states, which the rows give together or one after another."""
    model.zero_grad()
    dtype = next(model.parameters()).dtype
    weight = torch.randn(sum(map(len, rows)), 32, generator=torch.Generator().manual_seed(2)).to(dtype)
    if together:
        (packed.hidden_states(model, *pack(rows), **options) * weight).sum().backward()
    else:
        for r, w in zip(rows, weight.split([len(r) for r in rows]), strict=True):
            (model.model(r[None], use_cache=False).last_hidden_state[0] * w).sum().backward()
    return {n: p.grad.double() for n, p in model.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", CLASSES)
def test_packed_gradients_are_as_precise_as_those_of_rows_alone(name):
    model, rows = make(name), rows_of([5, 12, 3])
    together, alone = gradients(model, rows, True), gradients(model, rows, False)
    true = gradients(copy.deepcopy(model).double(), rows, True)  # what tests/models/test_dense.py compares
    worst = [max(float((found[n] - true[n]).abs().max()) for n in true) for found in (together, alone)]
    assert worst[0] < 1.5 * worst[1]
    assert worst[0] < 1e-6 * max(float(g.abs().max()) for g in true.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", STOCK_CLASSES)
def test_latent_attention_and_experts_have_the_gradients_of_rows_alone(name, checkpointing):
    model, rows = make(name), rows_of([5, 12, 3])
    together = gradients(model, rows, True, gradient_checkpointing=checkpointing)
    alone = gradients(model, rows, False)
    assert together.keys() == alone.keys()
    assert any("experts" in n for n in together)
    for n in alone:
        torch.testing.assert_close(together[n], alone[n], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("asked, runs", [("batched_mm", "grouped_mm"), ("eager", "eager")])
def test_experts_never_run_as_batched_mm(asked, runs):
    model, seen = make("deepseek_v3"), []
    model.config._experts_implementation = asked
    experts = model.model.layers[1].mlp.experts
    experts.register_forward_hook(lambda module, *_: seen.append(module.config._experts_implementation))
    packed.hidden_states(model, *pack(rows_of([5, 3])))
    assert seen == [runs]
    assert model.config._experts_implementation == asked


@pytest.mark.parametrize("name", [*CLASSES, "qwen3-1m"])
@pytest.mark.parametrize("lengths", [[7, 13, 11], [150, 260, 140]])  # rows for our attention and for torch's
def test_changing_one_row_leaves_the_others_bit_identical(name, lengths):
    # the preset is wide enough for the products that models.products hands to oneDNN
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=31, **PRESETS[name])) if name in PRESETS else make(name)
    rows = rows_of(lengths)
    with torch.no_grad():
        before = packed.hidden_states(model, *pack(rows)).split(lengths)
        rows[1] = (rows[1] + 5) % 31
        after = packed.hidden_states(model, *pack(rows)).split(lengths)
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, False, True]


def test_buckets_hold_every_token_once_and_little_padding():
    lengths = [3, 50, 48, 2, 47, 3, 20, 1]
    found = packed.layout(lengths, torch.device("cpu"))
    assert [found.order.tolist().index(i) for i in range(sum(lengths))] == found.back.tolist()
    assert sum(b.tokens for b in found.buckets) == sum(lengths)
    ordered = sorted(lengths, reverse=True)
    for bucket in found.buckets:
        mine, ordered = ordered[:bucket.rows], ordered[bucket.rows:]
        assert (bucket.width, bucket.tokens) == (max(mine), sum(mine))
        assert 1 - bucket.tokens / (bucket.rows * bucket.width) <= packed.MAX_PADDING
        if bucket.cells is None:
            assert len(set(mine)) == 1
        else:
            assert bucket.cells[bucket.kept].tolist() == list(range(bucket.tokens))


def test_without_padding_a_bucket_holds_equal_lengths_alone():
    found = packed.layout([9, 10, 9, 3], torch.device("cpu"), padding=0.0)
    assert [(b.rows, b.width, b.cells) for b in found.buckets] == [(1, 10, None), (2, 9, None), (1, 3, None)]


def test_rows_that_are_adjacent_after_ordering_keep_their_own_tokens():
    found = packed.layout([2, 3, 2], torch.device("cpu"))
    assert found.order.tolist() == [2, 3, 4, 0, 1, 5, 6]
    assert [(b.rows, b.width, b.tokens) for b in found.buckets] == [(1, 3, 3), (2, 2, 4)]


@pytest.mark.parametrize("short", [0, 128])  # through torch's attention and through ours
@pytest.mark.parametrize("width", [4, 6])
@pytest.mark.parametrize("window", [None, 3])
def test_attention_in_the_order_of_the_pack_is_attention_row_by_row(monkeypatch, window, width, short):
    monkeypatch.setattr(packed, "SHORT", short)
    lengths, rng = [4, 9, 1, 8], torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 22, d, generator=rng, dtype=torch.float64) for h, d in ((4, 6), (2, 6), (2, width)))
    found = packed.attend(q, k, v, packed.layout(lengths, q.device), scaling=None, window=window)
    parts = []
    for q1, k1, v1 in zip(*(x.split(lengths, 2) for x in (q, k, v)), strict=True):
        near = torch.ones(q1.shape[2], q1.shape[2]).tril().triu(1 - (window or 99)).bool()
        parts.append(F.scaled_dot_product_attention(q1, k1, v1, attn_mask=near, enable_gqa=True).transpose(1, 2))
    torch.testing.assert_close(found, torch.cat(parts, 1), rtol=1e-12, atol=1e-12)


def test_a_class_without_an_exact_packed_path_runs_padded_and_says_so(monkeypatch):
    model, rows = make("qwen3"), rows_of([5, 9, 2])
    with torch.no_grad():
        together = packed.hidden_states(model, *pack(rows))
        monkeypatch.setattr(packed, "PACKED", frozenset())
        with pytest.warns(UserWarning, match="padded"):
            padded = packed.hidden_states(model, *pack(rows))
    torch.testing.assert_close(together, padded, rtol=0, atol=2e-6)


def stock_layers(model: torch.nn.Module, rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the first of two layers puts out, and the second after the last norm, row by row."""
    found = [model.model(r[None], use_cache=False, output_hidden_states=True).hidden_states for r in rows]
    return tuple(torch.cat([states[i][0] for states in found]) for i in (1, 2))


@pytest.mark.filterwarnings("ignore:.*runs padded")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", [*CLASSES, *STOCK_CLASSES])
def test_inner_layers_put_out_what_the_stock_layers_do_in_the_order_of_the_pack(name, padded, monkeypatch):
    model, rows = make(name), rows_of([5, 23, 1, 9, 22, 9])
    if padded:
        monkeypatch.setattr(packed, "PACKED", frozenset())
        monkeypatch.setattr(packed, "STOCK_PACKED", frozenset())
    with torch.no_grad():
        last, inner = packed.layer_states(model, *pack(rows), (0, 1))
        assert inner.keys() == {0, 1} and not model.model.layers[0]._forward_hooks
        assert torch.equal(last, packed.hidden_states(model, *pack(rows)))
        for found, expected in zip((inner[0], model.model.norm(inner[1])), stock_layers(model, rows), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["qwen3", "deepseek_v3"])
def test_gradients_of_inner_layers_are_the_same_where_layers_are_computed_again(name):
    model, rows = make(name), rows_of([5, 12, 3])
    found = []
    for checkpointing in (False, True):
        model.zero_grad()
        last, inner = packed.layer_states(model, *pack(rows), (0,), gradient_checkpointing=checkpointing)
        (last.sin().sum() + inner[0].cos().sum()).backward()
        found.append({n: p.grad.clone() for n, p in model.model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for n in found[0]:
        torch.testing.assert_close(found[1][n], found[0][n], rtol=1e-5, atol=1e-6)


def test_a_class_whose_layers_have_another_name_is_refused_where_they_are_asked_for():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=31, n_embd=16, n_layer=1, n_head=2))
    with pytest.warns(UserWarning, match="padded"), pytest.raises(ConfigError, match="GPT2Model: .*no list `layers`"):
        packed.layer_states(model, *pack(rows_of([3])), (0,))


@pytest.mark.parametrize("name", ["qwen3", "deepseek_v3"])
def test_the_model_keeps_the_attention_that_it_had(name):
    model = make(name)
    before = model.config._attn_implementation
    packed.hidden_states(model, *pack(rows_of([3])))
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pack_runs_in_half_precision_as_its_rows_do_alone(dtype):
    model, rows = make("qwen3").to(dtype), rows_of([5, 9, 2])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        together = packed.hidden_states(model, *pack(rows)).float()
        alone = torch.cat([model.model(r[None], use_cache=False).last_hidden_state[0] for r in rows]).float()
    torch.testing.assert_close(together, alone, rtol=0, atol=0.05)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_under_autocast_are_near_those_in_full_precision(checkpointing):
    model, rows = make("qwen3"), rows_of([5, 9, 2])
    full = gradients(model, rows, True)
    with torch.autocast("cpu", torch.bfloat16):
        half = gradients(model, rows, True, gradient_checkpointing=checkpointing)
    assert half.keys() == full.keys()
    for n in full:
        assert F.cosine_similarity(half[n].flatten(), full[n].flatten(), 0) > 0.99


@pytest.mark.parametrize("rope", [
    {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0},
    {"rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
     "original_max_position_embeddings": 16}])
def test_rotary_positions_that_depend_on_the_longest_row_are_refused(rope):
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=rope))
    with pytest.raises(ConfigError, match="rope_type"):
        packed.hidden_states(model, *pack(rows_of([5, 40])))


def test_hooks_inside_a_layer_are_called():
    model, called = make("qwen3"), []
    layer = model.model.layers[0]
    layer.mlp.register_forward_hook(lambda *_: called.append("mlp"))
    layer.self_attn.q_proj.register_full_backward_hook(lambda *_: called.append("q_proj"))
    packed.hidden_states(model, *pack(rows_of([5, 3]))).sum().backward()
    assert called == ["mlp", "q_proj"]
