"""The slot cache: prefill and steps give the states of the whole forward, whatever came, went and moved in between."""

import pytest
import torch

from tests.models.test_packed import CLASSES, make
from tinyr2.models import decode
from tinyr2.models.load import LoraConfig, add_lora

PROMPTS = [(3, 1, 4), (1, 5), (9, 2, 6, 5, 3, 5, 8, 9, 7, 9)]


@torch.no_grad()
def last_state(model, ids: list[int]) -> torch.Tensor:
    """The slow way: the whole forward, stock attention, no cache."""
    body = model.get_base_model().model if hasattr(model, "peft_config") else model.model
    return body(torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1]


class Slots:
    """A cache, and beside it the tokens that each slot should hold."""

    def __init__(self, model):
        self.model, self.cache, self.rows = model, decode.SlotCache(torch.device("cpu")), []

    def enter(self, prompts, copies) -> torch.Tensor:
        self.rows += [list(p) for p, c in zip(prompts, copies, strict=True) for _ in range(c)]
        with torch.no_grad():
            return decode.prefill(self.model, self.cache, prompts, copies)

    def step(self, tokens: list[int]) -> None:
        with torch.no_grad():
            states = decode.step(self.model, self.cache, torch.tensor(tokens))
        for row, token in zip(self.rows, tokens, strict=True):
            row.append(token)
        self.compare(states, self.rows)

    def drop(self, gone: set[int]) -> list[int]:
        order = self.cache.drop(gone)
        self.rows = [self.rows[s] for s in order]
        return order

    def compare(self, states: torch.Tensor, rows: list[list[int]]) -> None:
        assert len(self.cache) == len(self.rows)
        assert self.cache.lengths.tolist() == [len(r) for r in self.rows]
        expected = torch.stack([last_state(self.model, r) for r in rows])
        torch.testing.assert_close(states, expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", CLASSES)
def test_rows_that_enter_leave_and_move_keep_the_states_of_the_whole_forward(name):
    slots = Slots(make(name))
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
