"""The decode copy: prefill and steps give the states of the whole forward, whatever came, went and moved in between."""

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.models.test_packed import CLASSES, SHAPE, make
from tinyr2.core.errors import ConfigError, RunError
from tinyr2.models import decode
from tinyr2.models.load import LoraConfig, add_lora
from tinyr2.models.stamp import Stamp

PROMPTS = [(3, 1, 4), (1, 5), (9, 2, 6, 5, 3, 5, 8, 9, 7, 9)]


@torch.no_grad()
def last_state(model, ids: list[int]) -> torch.Tensor:
    """The slow way: the whole forward, stock attention, no cache."""
    body = model.get_base_model().model if hasattr(model, "peft_config") else model.model
    return body(torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1]


class Slots:
    """A decoder and its cache, and beside it the tokens that each slot should hold."""

    def __init__(self, model, atol: float = 5e-6, **options):
        self.model, self.atol = model, atol
        self.decoder = decode.Decoder(model, **options)
        self.cache, self.rows = self.decoder.new_cache(), []

    def enter(self, prompts, copies) -> torch.Tensor:
        self.rows += [list(p) for p, c in zip(prompts, copies, strict=True) for _ in range(c)]
        return self.decoder.prefill(self.cache, prompts, copies)

    def step(self, tokens: list[int]) -> torch.Tensor:
        states = self.decoder.step(self.cache, torch.tensor(tokens))
        for row, token in zip(self.rows, tokens, strict=True):
            row.append(token)
        self.compare(states, self.rows)
        return states

    def drop(self, gone: set[int]) -> list[int]:
        order = self.cache.drop(gone)
        self.rows = [self.rows[s] for s in order]
        return order

    def compare(self, states: torch.Tensor, rows: list[list[int]]) -> None:
        assert len(self.cache) == len(self.rows)
        assert self.cache.lengths == [len(r) for r in self.rows]
        expected = torch.stack([last_state(self.model, r) for r in rows])
        torch.testing.assert_close(states, expected, rtol=0, atol=self.atol)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", CLASSES)
def test_rows_that_enter_leave_and_move_keep_the_states_of_the_whole_forward(name, exact):
    slots = Slots(make(name), exact=exact)
    states = slots.enter(PROMPTS, [2, 1, 2])
    slots.compare(states, slots.rows)
    for t in range(3):
        slots.step([(5 * t + 7 * i) % 31 for i in range(5)])
    assert slots.drop({0, 3}) == [4, 1, 2]  # the last row moves into the first hole, the other hole was at the end
    slots.step([1, 2, 3])
    states = slots.enter([(4, 4)], [3])
    slots.compare(states, slots.rows[3:])
    for t in range(3):
        slots.step([(t + 3 * i) % 31 for i in range(6)])


def test_a_prompt_is_computed_once_for_all_its_copies():
    model = make("qwen3")
    seen = []
    hook = model.model.embed_tokens.register_forward_pre_hook(lambda _, args: seen.append(args[0].numel()))
    slots = Slots(model)
    slots.enter(PROMPTS, [5, 1, 7])
    hook.remove()
    assert seen == [3 + 2 + 10]


def test_columns_grow_as_rows_do_and_a_new_row_finds_no_trace_of_the_one_before():
    slots = Slots(make("mistral"))  # its window of 7 is shorter than what is written
    slots.enter([(2,), (3,)], [1, 1])
    for t in range(40):
        slots.step([t % 31, (2 * t) % 31])
    assert slots.drop({0, 1}) == []
    states = slots.enter([(8, 8, 8)], [2])
    slots.compare(states, slots.rows)
    slots.step([1, 2])


@pytest.mark.parametrize(("rows", "gone", "order"), [
    (4, {3}, [0, 1, 2]), (4, {0}, [3, 1, 2]), (5, {1, 2}, [0, 3, 4]), (3, {0, 1, 2}, []), (4, {0, 1, 3}, [2])])
def test_the_last_rows_move_into_the_holes(rows, gone, order):
    slots = Slots(make("llama"))
    slots.enter([(i + 1, i) for i in range(rows)], [1] * rows)
    kept = [slots.rows[i] for i in order]
    assert slots.drop(gone) == order
    assert slots.rows == kept
    if kept:
        slots.step([5] * len(kept))


def test_an_adapted_model_decodes_through_its_adapters():
    model = add_lora(make("qwen3"), LoraConfig(r=2), 0)
    plain = last_state(model, [*PROMPTS[0], 7])
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    assert float((last_state(model, [*PROMPTS[0], 7]) - plain).abs().max()) > 1e-3
    slots = Slots(model)
    slots.enter(PROMPTS, [1, 1, 1])
    slots.step([7, 7, 7])


def test_a_switched_off_adapter_is_not_merged():
    model = add_lora(make("qwen3"), LoraConfig(r=2), 0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.fill_(0.3)
    with model.disable_adapter():
        slots = Slots(model)
        slots.compare(slots.enter(PROMPTS, [1, 1, 1]), slots.rows)


def test_a_copy_notices_that_the_weights_have_changed_since():
    model = make("llama")
    decoder = decode.Decoder(model, version=7)
    decoder.check()
    torch.optim.SGD(model.parameters(), lr=0.1).step()  # no gradient: nothing changes
    decoder.check()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with pytest.raises(RunError, match="stale.*version 7"):
        decoder.check()


def scaled(model):
    for p in model.parameters():
        p.mul_(2.0)


@pytest.mark.parametrize("change", [
    scaled, lambda m: m.to(torch.bfloat16), lambda m: m.disable_adapter_layers(), lambda m: m.merge_adapter(),
    lambda m: m.load_state_dict({k: v.clone() for k, v in m.state_dict().items()}, assign=True),
    lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()})])
@torch.no_grad()
def test_a_stamp_sees_new_moved_and_written_weights_and_switched_adapters(change):
    model = add_lora(make("qwen3"), LoraConfig(r=2), 0)
    stamp = Stamp(model)
    stamp.require(model, 3)
    change(model)
    with pytest.raises(RunError, match="stale.*version 3"):
        stamp.require(model, 3)


@pytest.mark.parametrize("option", [{"use_dora": True}, {"lora_bias": True, "bias": "none"}])
def test_adapters_that_do_more_than_add_to_a_weight_are_refused(option):
    model = peft.get_peft_model(LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True)),
                                peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], **option))
    with pytest.raises(ConfigError, match="cannot be merged"):
        decode.Decoder(model)


@pytest.mark.parametrize("tied", [False, True])
def test_tied_heads_and_biases_everywhere_are_copied(tied):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True, tie_word_embeddings=tied)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(generator=torch.Generator().manual_seed(len(name)))
    slots = Slots(model)
    states = slots.enter(PROMPTS, [1, 1, 1])
    slots.compare(states, slots.rows)
    slots.step([3, 4, 5])
    expected = torch.stack([model(torch.tensor([p]), use_cache=False).logits[0, -1] for p in PROMPTS])
    torch.testing.assert_close(slots.decoder.logits(states), expected.detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CLASSES)
def test_an_exact_row_has_the_same_bits_alone_and_in_company(name):
    decoder = decode.Decoder(make(name), exact=True)
    company = [*PROMPTS, *((i % 31, 3, (7 * i) % 31) for i in range(70)), tuple(range(30))]
    written = [[(5 * t + i) % 31 for i in range(len(company))] for t in range(40)]
    cache = decoder.new_cache()
    together = [decoder.prefill(cache, company, [1] * len(company))]
    together += [decoder.step(cache, torch.tensor(tokens)) for tokens in written]
    logits = decoder.logits(together[-1])
    for row in (0, 1, 2, 40):
        cache = decoder.new_cache()
        alone = [decoder.prefill(cache, [company[row]], [1])]
        alone += [decoder.step(cache, torch.tensor([tokens[row]])) for tokens in written]
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, together, strict=True))
        assert torch.equal(decoder.logits(alone[-1])[0], logits[row])


def test_logits_are_scaled_capped_and_cropped():
    model = make("llama")
    model.config.logit_scale, model.config.final_logit_softcapping = 0.5, 3.0
    decoder = decode.Decoder(model, vocab=20)
    states = decoder.prefill(decoder.new_cache(), PROMPTS, [1, 1, 1])
    raw = states @ model.lm_head.weight[:20].detach().t()
    torch.testing.assert_close(decoder.logits(states), 3 * torch.tanh(raw * 0.5 / 3), rtol=0, atol=1e-6)


def test_a_copy_in_bfloat16_is_near_one_in_float32():
    copies = [decode.Decoder(make("qwen3"), dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    wide, narrow = (copy.prefill(copy.new_cache(), PROMPTS, [1, 1, 1]) for copy in copies)
    assert narrow.dtype == torch.bfloat16
    assert 0 < float((wide - narrow.float()).abs().max()) < 0.1


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_scaled_rotary_positions_are_those_of_the_stock_forward(kind):
    rope = {"rope_type": kind, "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 32}
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    torch.manual_seed(0)
    slots = Slots(LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=rope)).eval())
    slots.compare(slots.enter(PROMPTS, [1, 1, 1]), slots.rows)
    slots.step([3, 4, 5])


def test_rotary_positions_that_depend_on_the_longest_row_are_not_decoded_by_a_copy():
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=rope))
    assert not decode.supports_decoding(model)
    assert decode.supports_decoding(make("llama"))
