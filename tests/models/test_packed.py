import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tinyr2.models import packed

SHAPE = dict(vocab_size=31, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=128)
CLASSES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=7)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=8)),
}


def make(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return CLASSES[name]().eval()


def rows_of(lengths: list[int]) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    return [torch.randint(0, 31, (n,), generator=rng) for n in lengths]


def pack(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    return torch.cat(rows), torch.cat([torch.arange(len(r)) for r in rows]), [len(r) for r in rows]


def test_every_class_that_packs_is_tested():
    assert set(CLASSES) == packed.PACKED


@pytest.mark.parametrize("name", CLASSES)
def test_a_row_alone_and_packed_have_the_same_hidden_states(name):
    model, rows = make(name), rows_of([5, 23, 1, 9, 22, 9])
    with torch.no_grad():
        together = packed.hidden_states(model, *pack(rows))
        alone = torch.cat([model.model(r[None], use_cache=False).last_hidden_state[0] for r in rows])
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", CLASSES)
def test_a_row_alone_and_packed_have_the_same_gradients(name):
    model, rows = make(name), rows_of([5, 12, 3])
    weight = torch.randn(sum(map(len, rows)), 32, generator=torch.Generator().manual_seed(2))
    (packed.hidden_states(model, *pack(rows)) * weight).sum().backward()
    together = {n: p.grad.clone() for n, p in model.model.named_parameters()}
    model.zero_grad()
    for r, w in zip(rows, weight.split([5, 12, 3]), strict=True):
        (model.model(r[None], use_cache=False).last_hidden_state[0] * w).sum().backward()
    for n, p in model.model.named_parameters():
        torch.testing.assert_close(together[n], p.grad, rtol=1e-4, atol=1e-5)


def test_changing_one_row_leaves_the_others_bit_identical():
    model, rows = make("qwen3"), rows_of([7, 13, 11])
    with torch.no_grad():
        before = packed.hidden_states(model, *pack(rows))
        rows[1] = (rows[1] + 5) % 31
        after = packed.hidden_states(model, *pack(rows))
    assert torch.equal(before[:7], after[:7])
    assert torch.equal(before[20:], after[20:])
    assert not torch.equal(before[7:20], after[7:20])


def test_buckets_hold_every_token_once_and_little_padding():
    lengths = [3, 50, 48, 2, 47, 3, 20, 1]
    found = packed.layout(lengths, torch.device("cpu")).buckets
    assert sorted(torch.cat([b.packed for b in found]).tolist()) == list(range(sum(lengths)))
    for bucket in found:
        assert torch.equal(bucket.cells.flatten()[bucket.kept], bucket.packed)
        assert 1 - len(bucket.kept) / bucket.cells.numel() <= packed.MAX_PADDING


def test_a_class_without_an_exact_packed_path_runs_padded_and_says_so(monkeypatch):
    model, rows = make("qwen3"), rows_of([5, 9, 2])
    with torch.no_grad():
        together = packed.hidden_states(model, *pack(rows))
        monkeypatch.setattr(packed, "PACKED", frozenset())
        with pytest.warns(UserWarning, match="padded"):
            padded = packed.hidden_states(model, *pack(rows))
    torch.testing.assert_close(together, padded, rtol=0, atol=2e-6)


def test_the_model_keeps_the_attention_that_it_had():
    model = make("qwen3")
    before = model.config._attn_implementation
    packed.hidden_states(model, *pack(rows_of([3])))
    assert model.config._attn_implementation == before


def test_a_pack_runs_under_autocast_as_its_rows_do_alone():
    model, rows = make("qwen3"), rows_of([5, 9, 2])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        together = packed.hidden_states(model, *pack(rows)).float()
        alone = torch.cat([model.model(r[None], use_cache=False).last_hidden_state[0] for r in rows]).float()
    torch.testing.assert_close(together, alone, rtol=0, atol=0.05)
