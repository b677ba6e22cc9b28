"""Captured steps: the states of plain ones, at few shapes and fixed addresses, also when the weights have moved on."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models import test_mla, test_packed
from tests.rollouts.test_sample import PROBLEMS, SAMPLING, policy
from tinyr2.core.errors import RunError
from tinyr2.models import products
from tinyr2.models.decode import Decoder
from tinyr2.models.load import LoraConfig, add_lora
from tinyr2.models.products import Packed
from tinyr2.models.replay import CudaGraphs, Replay
from tinyr2.models.slots import Group, Step, seats
from tinyr2.rollouts.engine import decode_all
from tinyr2.rollouts.request import Request
from tinyr2.rollouts.sample import Resident, sample
from tinyr2.rollouts.sampling import SamplingConfig

TOLERANCE = [1e-6, 5e-6]  # the latent models of the tests have large weights
PACKED, LATENT = ["qwen3", "llama", "mistral"], ["v3", "v3 short queries, biases", "v2 yarn, biases"]
REQUESTS = [Request(tuple(range(1, 2 + i % 4)), seed=i, max_new=3 + 5 * (i % 4)) for i in range(12)]


def make(name: str) -> torch.nn.Module:
    return (test_mla if name in test_mla.MODELS else test_packed).make(name)


class Tape(TorchDispatchMode):
    """What a graph of a device holds: operations with their very operands and results, nothing of the host's."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, found))
        return found

    def play(self) -> None:
        for func, args, kwargs, then in self.calls:
            now = func(*args, **kwargs)
            pairs = zip(now, then, strict=True) if isinstance(now, (tuple, list)) else [(now, then)]
            for new, old in pairs:
                if new.data_ptr() != old.data_ptr():
                    old.copy_(new)


class Tapes:
    """Captures on tapes, and counts them."""

    def __init__(self):
        self.count = 0

    def __call__(self, body: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        self.count += 1
        body()  # to warm up
        with Tape() as tape:
            out = body()

        def play() -> torch.Tensor:
            out.fill_(float("nan"))
            tape.play()
            return out

        return play


@pytest.fixture
def as_on_cuda(monkeypatch):
    """Weights are laid out as they are off the CPU: plainly, so that they have addresses to keep."""
    monkeypatch.setattr(products, "available", lambda: False)


def travel(decoder: Decoder) -> list[torch.Tensor]:
    """States of rows that enter, leave and move, over a border between column counts and several between row counts."""
    cache, states = decoder.new_cache(150), []

    def steps(count: int) -> None:
        for t in range(count):
            states.append(decoder.step(cache, torch.tensor([(5 * t + 7 * i) % 31 for i in range(len(cache))])))

    states.append(decoder.prefill(cache, [(3, 1, 4), (1, 5), tuple(i * i % 31 for i in range(123))], [2, 1, 2]))
    steps(3)
    assert cache.drop({0, 3}) == [4, 1, 2]
    steps(4)  # the longest row passes 128 columns
    states.append(decoder.prefill(cache, [(4, 4)], [8]))
    steps(2)
    cache.drop(set(range(1, 11)))
    steps(2)
    return states


@pytest.mark.parametrize("name", PACKED + LATENT)
def test_captured_steps_give_the_states_of_plain_ones(as_on_cuda, name):
    model = make(name)
    found = travel(Decoder(model, capture=Tapes()))
    for ours, plain in zip(found, travel(Decoder(model)), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=TOLERANCE[name in LATENT])
    again = travel(Decoder(model, capture=lambda body: body))
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("name", ["qwen3", "v3"])
def test_the_padded_steps_of_packed_weights_give_the_states_of_plain_ones(name):
    model = make(name)
    for ours, plain in zip(travel(Decoder(model, capture=lambda body: body)), travel(Decoder(model)), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=TOLERANCE[name in LATENT])


def test_a_step_is_captured_once_for_each_shape_and_place(as_on_cuda):
    tapes = Tapes()
    decoder = Decoder(make("qwen3"), capture=tapes)
    travel(decoder)  # 8 slots; 4 slots; 4 slots of 256 columns; 16 of them; 1 of them
    assert tapes.count == 5


def test_the_next_cache_has_the_stores_and_the_captured_steps_of_one_that_was_given_back(as_on_cuda):
    tapes, model = Tapes(), make("qwen3")
    decoder = Decoder(model, capture=tapes)
    expected = decode_all(model, REQUESTS, SamplingConfig(), stop=(4, 11), max_rows=5)
    for _ in range(3):
        before = tapes.count
        found = decode_all(decoder, REQUESTS, SamplingConfig(), stop=(4, 11), max_rows=5)
        assert [(a.response_ids, a.finish) for a in found] == [(a.response_ids, a.finish) for a in expected]
    assert before > 0 and tapes.count == before
    cache, other = decoder.new_cache(), decoder.new_cache()  # two at a time share nothing
    assert not {id(s) for stores in cache.layers for s in stores} & {id(s) for stores in other.layers for s in stores}


def test_inputs_lie_where_they_lay_and_captured_steps_are_forgotten_when_anything_moves():
    seen, captured = [], []

    def capture(body):
        captured.append(body)
        return body

    def run(tokens: torch.Tensor, step: Step) -> torch.Tensor:
        seen.append([tokens.data_ptr(), step.column.data_ptr(), step.slot.data_ptr()])
        assert step.groups[0].mask(1).shape == (4, 1, 128)
        return torch.stack([tokens, step.column, step.slot], 1).float()

    def at(*column: int) -> Step:
        padded = torch.tensor([*column, *[0] * (4 - len(column))])
        return Step(torch.arange(4), padded, 128, (Group(128, None, padded),))

    replay = Replay(capture)
    first = replay(run, torch.tensor([7, 8, 9]), at(5, 6, 0), ("here",))
    second = replay(run, torch.tensor([3, 4, 5, 6]), at(8, 9, 2, 1), ("here",))
    assert first.tolist() == [[7, 5, 0], [8, 6, 1], [9, 0, 2]]  # not overwritten by the second
    assert second.tolist() == [[3, 8, 0], [4, 9, 1], [5, 2, 2], [6, 1, 3]]
    assert len(captured) == 1
    assert replay(run, torch.tensor([1, 2, 3]), at(4, 4, 4), ("there",)).tolist() == [[1, 4, 0], [2, 4, 1], [3, 4, 2]]
    assert len(captured) == 2
    assert seen[0] == seen[1] == seen[2]


def test_rows_are_rounded_up_to_few_counts():
    assert [seats(n) for n in (1, 2, 3, 4, 5, 33, 64, 65, 128, 129, 256)] == [1, 2, 4, 4, 8, 64, 64, 128, 128, 192, 256]


def addresses(of: object) -> dict[str, int]:
    """Of every tensor that a part of a decoder holds."""
    if isinstance(of, torch.Tensor):
        return {"": of.data_ptr()}
    named = enumerate(of) if isinstance(of, (list, tuple)) else (
        vars(of).items() if type(of).__module__.startswith("tinyr2.models") else ())
    return {f"{name}.{rest}": at for name, part in named for rest, at in addresses(part).items()}


def move(model: torch.nn.Module) -> None:
    """Other weights, and another bias of a router, as an optimizer leaves them."""
    with torch.no_grad():
        for i, (name, t) in enumerate([*model.named_parameters(), *model.named_buffers()]):
            if "inv_freq" not in name:
                t.add_(0.05 * torch.randn(t.shape, generator=torch.Generator().manual_seed(i)))


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize(("name", "options"), [
    *((name, {}) for name in [*PACKED, *LATENT, "v3 experts", "v2 experts in groups"]),
    ("qwen3", {"dtype": torch.bfloat16}), ("qwen3", {"exact": True}), ("v3 experts", {"exact": True}),
    ("qwen3", {"lora": True}), ("v3 experts", {"lora": True})])
def test_a_refreshed_copy_is_a_fresh_one(monkeypatch, name, options, plain):
    if plain:
        monkeypatch.setattr(products, "available", lambda: False)
    model, options = make(name), dict(options)
    if options.pop("lora", False):
        model = add_lora(model, LoraConfig(r=2), 0)
    decoder = Decoder(model, version=1, **options)
    parts = [decoder._layers, decoder._norm, decoder._head, decoder._floor]
    before, old = addresses(parts) if plain else {}, travel(decoder)[-1]
    move(model)
    with pytest.raises(RunError, match="stale.*version 1"):
        decoder.check()
    decoder.refresh(2)
    decoder.check()
    assert decoder.version == 2
    fresh = Decoder(model, **options)
    assert all(torch.equal(a, b) for a, b in zip(travel(decoder), travel(fresh), strict=True))
    assert torch.equal(decoder.logits(old), fresh.logits(old)) and not torch.equal(travel(decoder)[-1], old)
    if plain:
        assert len(before) > 12
        assert addresses([decoder._layers, decoder._norm, decoder._head, decoder._floor]) == before


@pytest.mark.parametrize("name", ["qwen3", "v3"])
def test_captured_steps_outlive_a_refresh(as_on_cuda, name):
    model, tapes = make(name), Tapes()
    decoder = Decoder(model, capture=tapes)
    for version in range(3):
        found, before = decode_all(decoder, REQUESTS, SamplingConfig(), stop=(), max_rows=5), tapes.count
        expected = decode_all(model, REQUESTS, SamplingConfig(), stop=(), max_rows=5)
        assert [a.response_ids for a in found] == [a.response_ids for a in expected]
        move(model)
        with pytest.raises(RunError, match="stale"):
            decode_all(decoder, REQUESTS, SamplingConfig(), stop=())
        decoder.refresh(version + 1)
    decode_all(decoder, REQUESTS, SamplingConfig(), stop=(), max_rows=5)
    assert tapes.count == before > 0


def test_a_refreshed_copy_never_writes_into_the_model(as_on_cuda):
    model = add_lora(make("qwen3"), LoraConfig(r=2), 0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.fill_(0.3)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with model.disable_adapter():
        decoder = Decoder(model)  # of the base weights alone
    decoder.refresh(1)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(travel(decoder), travel(Decoder(model)), strict=True))


def test_adapters_are_merged_in_float32_where_the_learner_has_autocast_on():
    model = add_lora(make("qwen3"), LoraConfig(r=2), 0)
    move(model)
    plain = Decoder(model, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = Decoder(model, dtype=torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(travel(found), travel(plain), strict=True))


@pytest.mark.parametrize(("name", "exact", "why"), [("v3 experts", False, "experts"), ("qwen3", True, "company")])
def test_what_cannot_be_captured_is_run_and_says_so(name, exact, why):
    model, tapes = make(name), Tapes()
    with pytest.warns(UserWarning, match=f"without captured steps.*{why}"):
        decoder = Decoder(model, exact=exact, capture=tapes)
    plain = Decoder(model, exact=exact)
    assert all(torch.equal(a, b) for a, b in zip(travel(decoder), travel(plain), strict=True))
    assert tapes.count == 0


def test_policies_of_one_resident_copy_write_with_the_weights_of_their_own_version(as_on_cuda):
    first = policy(resident=Resident())
    written = sample(first, PROBLEMS, n=2, sampling=SAMPLING, seed=0)
    assert written == sample(policy(), PROBLEMS, n=2, sampling=SAMPLING, seed=0)
    move(first.model)
    with pytest.raises(RunError, match="stale.*version 7"):
        sample(first, PROBLEMS, n=2, sampling=SAMPLING, seed=0)
    second = replace(first, version=8)
    later = sample(second, PROBLEMS, n=2, sampling=SAMPLING, seed=0)
    assert later == sample(replace(second, resident=None), PROBLEMS, n=2, sampling=SAMPLING, seed=0) != written
    assert second.writer is replace(first, version=8).writer
    with pytest.raises(RunError, match="version 8 by now, not of version 7"):
        sample(first, PROBLEMS, n=2, sampling=SAMPLING, seed=0)


def test_wide_products_are_float32():
    x, weight, bias = (torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
                       for shape in ((5, 16), (40, 16), (40,)))
    found = Packed(weight, bias).wide(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, x.float() @ weight.float().t() + bias.float(), rtol=0, atol=0.05)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PACKED + LATENT)
def test_graphs_give_the_states_of_the_steps_that_they_hold(name, dtype):
    model = make(name).cuda()
    graphs, runs = Decoder(model, dtype=dtype), Decoder(model, dtype=dtype, capture=lambda body: body)
    for version in range(3):
        requests = [replace(r, max_new=r.max_new + 120) for r in REQUESTS]
        found, expected = (decode_all(d, requests, SamplingConfig(), stop=(4,), max_rows=5) for d in (graphs, runs))
        assert [a.response_ids for a in found] == [a.response_ids for a in expected]
        assert [a.logp for a in found] == [a.logp for a in expected]
        move_on(model)
        graphs.refresh(version + 1)
        runs.refresh(version + 1)


def move_on(model: torch.nn.Module) -> None:
    """A small change to all weights, wherever they are."""
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.01)


@pytest.mark.gpu
@needs_cuda
def test_a_pool_of_graphs_is_taken_up_anew_when_all_are_gone():
    graphs, x = CudaGraphs(torch.device("cuda")), torch.ones(4, device="cuda")
    for _ in range(3):
        runs = [graphs(lambda n=n: x * n) for n in range(3)]
        assert [run().tolist() for run in runs] == [[float(n)] * 4 for n in range(3)]
        del runs


@pytest.mark.gpu
@needs_cuda
def test_wide_products_on_cuda_are_not_rounded():
    rng = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=rng).bfloat16() for shape in ((5, 256), (40, 256)))
    found = Packed(weight.cuda()).wide(x.cuda()).cpu()
    torch.testing.assert_close(found, x.float() @ weight.float().t(), rtol=0, atol=1e-4)
