"""The head that is read from a model gives the model's own logits."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    HyperCLOVAXConfig,
    Qwen3Config,
)

from tinyr2.core.errors import ConfigError
from tinyr2.models.head import run
from tinyr2.models.logits import Head, head_of, logits_of

SMALL = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
         "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2}
CONFIGS = {
    "tied": Qwen3Config(**SMALL, tie_word_embeddings=True),
    "untied": Qwen3Config(**SMALL, tie_word_embeddings=False),
    "gpt2": GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2),
    "softcap": Gemma2Config(**SMALL, final_logit_softcapping=0.5),
    "multiplied": CohereConfig(**SMALL, logit_scale=4.0),
    "divided": GraniteConfig(**SMALL, logits_scaling=0.25),
    "scaling that multiplies": HyperCLOVAXConfig(**SMALL, logits_scaling=4.0),
}


def _model(name="untied"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    with torch.no_grad():  # fresh weights are so small that a cap or a scale would hardly show
        model.get_output_embeddings().weight.mul_(20)
    return model


def _states(model):
    tokens = torch.tensor([[3, 17, 39, 8, 5]])
    states = model.get_decoder()(tokens).last_hidden_state[0]
    return tokens[0, 1:], states[:-1], model(tokens).logits[0, :-1]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_head_gives_the_models_own_logits_and_log_probs(name):
    model = _model(name)
    targets, states, logits = _states(model)
    head = head_of(model)
    assert logits.std() > 0.1
    torch.testing.assert_close(logits_of(states, head), logits.detach(), rtol=0, atol=1e-5)
    expected = (logits / 0.7).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    found = run(states, head, targets, lambda s: s.learner_logp.sum(), temperature=0.7).learner_logp
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-5)


def test_the_gradient_through_a_tied_head_is_that_of_the_whole_model():
    model = _model("tied")
    targets, states, logits = _states(model)
    run(states, head_of(model), targets, lambda s: -s.learner_logp.sum()).loss.backward(retain_graph=True)
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    torch.nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-5, atol=1e-5)


def test_a_padded_vocabulary_is_cropped_to_its_first_rows_and_its_padding_gets_no_gradient():
    model = _model()
    targets, states, logits = _states(model)
    targets = targets % 33
    head = head_of(model, vocab=33)
    assert head.weight.shape == (33, 16)
    result = run(states, head, targets, lambda s: -s.learner_logp.sum())
    torch.testing.assert_close(logits_of(states, head), logits[:, :33].detach(), rtol=0, atol=1e-5)
    result.loss.backward()
    gradient = model.lm_head.weight.grad
    assert gradient.shape == (40, 16)
    assert torch.equal(gradient[33:], torch.zeros(7, 16)) and (gradient[:33] != 0).any()


def test_asking_for_the_whole_vocabulary_hands_out_the_parameter_itself():
    model = _model()
    assert head_of(model, vocab=40).weight is head_of(model).weight is model.lm_head.weight


def test_a_head_with_too_few_tokens_is_refused():
    with pytest.raises(ConfigError, match="41 tokens asked of a head with 40"):
        head_of(_model(), vocab=41)


def test_a_model_without_an_output_head_is_refused():
    with pytest.raises(ConfigError, match="no output head; give a causal language model"):
        head_of(_model().model)


def test_a_quantized_head_is_refused():
    model = _model()
    model.lm_head.weight = nn.Parameter(torch.zeros(40, 16, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ConfigError, match=r"quantized to torch\.uint8"):
        head_of(model)


def test_under_lora_the_head_is_frozen_and_the_adapters_still_learn():
    model = get_peft_model(_model(), LoraConfig(r=2, target_modules="all-linear"))
    head = head_of(model)
    assert not head.weight.requires_grad
    targets, states, _ = _states(model.base_model.model)
    run(states, head, targets, lambda s: -s.learner_logp.sum()).loss.backward()
    learned = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert learned and all("lora_" in name for name in learned)


def test_an_adapter_on_the_head_is_refused_and_a_head_trained_whole_is_read():
    adapted = get_peft_model(_model(), LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ConfigError, match="leave lm_head out of target_modules"):
        head_of(adapted)
    whole = get_peft_model(_model(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    head = head_of(whole)
    assert head.weight.requires_grad
    assert head.weight is whole.base_model.model.lm_head.modules_to_save["default"].weight


def test_logits_are_float32_without_gradient_also_in_inference_mode():
    rng = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(3, 4, generator=rng), torch.randn(6, 4, generator=rng).requires_grad_()
    head = Head(weight, bias=torch.arange(6.0), scale=0.5, softcap=2.0)
    expected = 2 * torch.tanh(0.5 * (hidden @ weight.T + head.bias) / 2)
    with torch.inference_mode():
        logits = logits_of(hidden.bfloat16().float(), head)
    assert logits.dtype == torch.float32 and not logits.requires_grad
    torch.testing.assert_close(logits_of(hidden, head), expected.detach(), rtol=0, atol=1e-6)
    assert logits_of(hidden.bfloat16(), head).dtype == torch.float32
    torch.testing.assert_close(logits_of(hidden.bfloat16(), head), logits, rtol=0, atol=1e-6)
