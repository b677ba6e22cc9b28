"""A dense layer on packed tokens against the stock forward of its class, in float64: values and every gradient."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
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

from tests.models.test_packed import SHAPE
from tinyr2.models import dense, packed

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LENGTHS = [5, 23, 1, 9, 22, 9]
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "llama with every bias": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True)),
    "llama with gelu": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, hidden_act="gelu")),
    "llama with scaled angles": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=YARN)),
    "mistral with a window": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=7)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "qwen2 with a window in one layer": lambda: Qwen2ForCausalLM(Qwen2Config(
        **SHAPE, use_sliding_window=True, sliding_window=5, max_window_layers=1)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=16)),
    "qwen3 with windows": lambda: Qwen3ForCausalLM(Qwen3Config(
        **SHAPE, head_dim=8, use_sliding_window=True, sliding_window=4, max_window_layers=0)),
}


@pytest.fixture(autouse=True)
def _exact_norms(monkeypatch):
    """The stock norms compute in float32 whatever they are given; ours keep float64."""
    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    for norm in dense.NORMS:
        monkeypatch.setattr(norm, "forward", forward)


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """Away from the start, at which norms are 1 and biases 0."""
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn(p.shape, generator=rng)
    return model.double().eval()


def rows() -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    return [torch.randint(0, 31, (n,), generator=rng) for n in LENGTHS]


def ours(model: torch.nn.Module, **options) -> torch.Tensor:
    position = torch.cat([torch.arange(n) for n in LENGTHS])
    return packed.hidden_states(model, torch.cat(rows()), position, LENGTHS, **options)


def stock(model: torch.nn.Module) -> torch.Tensor:
    body = packed.body_of(model)
    return torch.cat([body(r[None], use_cache=False).last_hidden_state[0] for r in rows()])


def gradients(model: torch.nn.Module, states: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    rng = torch.Generator().manual_seed(2)
    (states * torch.randn(states.shape, generator=rng, dtype=states.dtype)).sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(model: torch.nn.Module, **options) -> None:
    mine, true = gradients(model, ours(model, **options)), gradients(model, stock(model))
    assert mine.keys() == true.keys()
    for name in true:
        torch.testing.assert_close(mine[name], true[name], rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("short", [0, 128])  # through torch's attention and through ours
@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients_are_the_stock_ones(monkeypatch, name, short):
    monkeypatch.setattr(packed, "SHORT", short)
    torch.manual_seed(0)
    model = shaken(MODELS[name]())
    torch.testing.assert_close(ours(model), stock(model), rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(ours(model), stock(model), rtol=1e-10, atol=1e-10)
    assert_same_gradients(model)


def test_no_stock_layer_runs(monkeypatch):
    model = shaken(MODELS["qwen3"]())
    for layer in model.model.layers:
        monkeypatch.setattr(layer, "forward", lambda *_, **__: pytest.fail("the stock layer ran"))
    ours(model)


def test_checkpointed_gradients_are_the_same():
    assert_same_gradients(shaken(MODELS["qwen3"]()), gradient_checkpointing=True)


def test_checkpointing_keeps_only_the_layers_inputs():
    model = shaken(MODELS["qwen3"]())
    sizes = []
    for options in ({}, {"gradient_checkpointing": True}):
        kept: dict[int, int] = {}

        def pack(x: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            ours(model, **options)
        sizes.append(sum(kept.values()))
    assert sizes[1] < sizes[0] / 4


def test_a_frozen_parameter_gets_no_gradient_and_the_others_theirs():
    model = shaken(MODELS["qwen3"]())
    for name, p in model.named_parameters():
        p.requires_grad_("q_proj" in name or "norm" in name or "up_proj" in name)
    assert_same_gradients(model)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_adapters_train_as_in_the_stock_forward(targets):
    torch.manual_seed(0)
    model = get_peft_model(MODELS["qwen3"](), LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    shaken(model)
    torch.testing.assert_close(ours(model), stock(model), rtol=1e-10, atol=1e-10)
    assert_same_gradients(model)
    assert all("lora" in n for n in gradients(model, ours(model)))


def test_adapter_dropout_is_drawn_in_training():
    model = get_peft_model(MODELS["qwen3"](), LoraConfig(r=2, lora_dropout=0.5, task_type="CAUSAL_LM"))
    shaken(model)
    still = ours(model)
    model.train()
    assert torch.equal(ours(model.eval()), still)
    assert not torch.allclose(ours(model.train()), still)


def test_attention_dropout_is_drawn_in_training_alone():
    model = shaken(MODELS["llama"]())
    still = ours(model)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    assert torch.equal(ours(model), still)
    model.train()
    torch.manual_seed(4)
    drawn = ours(model)
    assert not torch.allclose(drawn, still)
    torch.manual_seed(4)
    assert torch.equal(ours(model), drawn)


@pytest.mark.parametrize("name", ["model.layers.1", "model.layers.0.mlp.up_proj", "model.layers.0.input_layernorm"])
def test_a_hook_on_a_module_is_called(name):
    model = shaken(MODELS["llama"]())
    calls = []
    model.get_submodule(name).register_forward_hook(lambda *_: calls.append(name))
    torch.testing.assert_close(ours(model), stock(model), rtol=1e-10, atol=1e-10)
    assert len(calls) == 1 + len(LENGTHS)
