"""What a pass over the head costs: memory by the chunk, each product once, nothing that nobody asked for."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models.full_logits import KINDS, N, V, make_case, run_case
from tinyr2.models import sweep
from tinyr2.models.head import Head, run
from tinyr2.objectives.policy import weighted_nll


class Spy(TorchDispatchMode):
    """Watches operations: how often each ran and over how many elements, the largest block of logits, the most bytes.

    A block of logits has the vocabulary on one side and tokens on the other, or is a flat multiple of the vocabulary;
    `widths` are the sides of weights, which are no logits.
    """

    def __init__(self, vocab, widths=()):
        super().__init__()
        self.vocab, self.widths = vocab, widths
        self.calls, self.elements, self.largest, self.peak, self.alive = {}, {}, 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.calls[name] = self.calls.get(name, 0) + 1
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.see(x, name)
        self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out

    def see(self, x, name):
        storage = x.untyped_storage()
        self.alive[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self.elements[name] = self.elements.get(name, 0) + x.numel()
        flat = x.ndim == 1 and x.numel() % self.vocab == 0
        if flat or (x.ndim == 2 and self.vocab in x.shape and not set(self.widths) & set(x.shape)):
            self.largest = max(self.largest, x.numel())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [64, 1000, 2100])
@pytest.mark.parametrize("block", [300, 2**19])
def test_no_tensor_over_the_vocabulary_is_larger_than_a_chunk(kind, chunk, block, monkeypatch):
    monkeypatch.setattr(sweep, "CPU_BLOCK", block)
    vocab = 64
    case = make_case(n=200, d=4, v=vocab)
    with Spy(vocab, widths=(4, 6)) as spy:
        run_case(case, KINDS[kind], chunk_elements=chunk).loss.backward()
    assert chunk - vocab < spy.largest <= chunk


def test_live_memory_grows_with_the_chunk_and_not_with_the_tokens():
    vocab, peaks = 512, []
    for n in (64, 512):
        case = make_case(n=n, d=2, v=vocab)
        with Spy(vocab) as spy:
            run_case(case, KINDS["reverse_kl"], chunk_elements=16 * vocab)
        peaks.append(spy.peak)
    chunk = 16 * vocab * 8
    assert 2 * chunk <= peaks[0] < 8 * chunk
    assert peaks[1] < peaks[0] + chunk < 512 * vocab * 8


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl"])
def test_a_wide_vocabulary_needs_two_chunks_of_memory_and_a_few_blocks(kind, monkeypatch):
    vocab, rows = 4096, 16
    monkeypatch.setattr(sweep, "CPU_BLOCK", rows * vocab // 32)
    case = make_case(n=64, d=2, v=vocab)
    with Spy(vocab) as spy:
        run_case(case, KINDS[kind], chunk_elements=rows * vocab)
    chunk, weight = rows * vocab * 8, vocab * 2 * 8
    assert 2 * chunk <= spy.peak < 2.5 * chunk + 2 * weight


def test_without_a_gradient_a_wide_vocabulary_needs_a_few_blocks_alone(monkeypatch):
    vocab, rows = 4096, 16
    monkeypatch.setattr(sweep, "CPU_BLOCK", rows * vocab // 32)
    case = make_case(n=64, d=2, v=vocab)
    with torch.no_grad(), Spy(vocab) as spy:
        run_case(case, KINDS["reverse_kl"], chunk_elements=rows * vocab)
    chunk, weights = rows * vocab * 8, vocab * (2 + 4) * 8
    assert spy.peak < weights + chunk / 4


@pytest.mark.parametrize("blocks", [1, V])
def test_one_pass_makes_the_logits_of_each_model_once_and_no_gradient_that_nobody_wants(blocks, monkeypatch):
    monkeypatch.setattr(sweep, "CPU_BLOCK", 2**19 if blocks == 1 else N)
    case = make_case()
    products = {}
    for name, frozen in (("all", ()), ("frozen head", ("weight", "bias")), ("frozen body", ("hidden",))):
        for x in case.learned:
            x.requires_grad_(True)
        for x in frozen:
            getattr(case, x).requires_grad_(False)
        with Spy(V) as spy:
            result = run_case(case, KINDS["reverse_kl"])
        products[name] = spy.calls.get("mm", 0) + spy.calls.get("addmm", 0)
        result.loss.backward()
        for x in ("hidden", "weight", "bias"):
            assert (getattr(case, x).grad is None) == (x in frozen)
            getattr(case, x).grad = None
    assert products == {"all": 4 * blocks, "frozen head": 3 * blocks, "frozen body": 3 * blocks}


def test_without_grad_mode_nothing_is_differentiated_and_the_values_stay():
    case = make_case()
    with torch.no_grad(), Spy(V) as spy:
        quiet = run_case(case, KINDS["jsd"])
    assert not quiet.loss.requires_grad
    assert (spy.calls.get("mm", 0), spy.calls.get("addmm", 0)) == (2, 0)
    loud = run_case(case, KINDS["jsd"])
    assert torch.equal(quiet.loss, loud.loss.detach()) and torch.equal(quiet.divergence, loud.divergence)


def test_each_logit_of_each_model_is_raised_once():
    case, head = make_case(), Head(torch.randn(V, 3, dtype=torch.float64))
    teacher = {"teacher_hidden": torch.randn(N, 3, dtype=torch.float64), "teacher_head": head}

    def raised(**kwargs):
        with Spy(V) as spy:
            result = run(case.hidden, Head(case.weight), case.targets, lambda s: weighted_nll(s.learner_logp, denom=1),
                         **kwargs)
        return result, spy.elements.get("exp2", 0) + spy.elements.get("exp2_", 0)

    nothing, alone = raised()
    result, taught = raised(**teacher)
    _, compared = raised(**teacher, divergence=KINDS["reverse_kl"])
    assert (alone, taught, compared) == (N * V, 2 * N * V, 2 * N * V)
    assert nothing.teacher_logp is None and nothing.divergence is None
    assert result.divergence is None and len(result.teacher_logp) == N
