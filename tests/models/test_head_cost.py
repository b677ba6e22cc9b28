"""What a pass over the head costs: memory by the chunk, each product once, nothing that nobody asked for."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models.full_logits import KINDS, N, V, make_case, run_case
from tinyr2.models.head import Head, run
from tinyr2.objectives.policy import weighted_nll


class Spy(TorchDispatchMode):
    """Watches operations: how often each ran, the largest (…, vocab) tensor, the most bytes alive after any of them."""

    def __init__(self, vocab):
        super().__init__()
        self.vocab, self.calls, self.largest, self.peak, self.alive = vocab, {}, 0, 0, {}

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
        if name != "t" and x.ndim and x.shape[-1] == self.vocab:  # a transposed weight is no logits
            self.largest = max(self.largest, x.numel())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [64, 1000, 3001])
def test_no_tensor_over_the_vocabulary_is_larger_than_a_chunk(kind, chunk):
    vocab = 64
    case = make_case(n=200, d=4, v=vocab)
    with Spy(vocab) as spy:
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


def test_one_pass_makes_the_logits_of_each_model_once_and_no_gradient_that_nobody_wants():
    case = make_case()
    whole = {"chunk_elements": 2**23}
    products = {}
    for name, frozen in (("all", ()), ("frozen head", ("weight", "bias")), ("frozen body", ("hidden",))):
        for x in case.learned:
            x.requires_grad_(True)
        for x in frozen:
            getattr(case, x).requires_grad_(False)
        with Spy(V) as spy:
            result = run_case(case, KINDS["reverse_kl"], **whole)
        products[name] = spy.calls.get("mm", 0), spy.calls.get("addmm", 0)
        result.loss.backward()
        for x in ("hidden", "weight", "bias"):
            assert (getattr(case, x).grad is None) == (x in frozen)
            getattr(case, x).grad = None
    assert products == {"all": (3, 1), "frozen head": (3, 0), "frozen body": (2, 1)}


def test_without_grad_mode_nothing_is_differentiated_and_the_values_stay():
    case = make_case()
    with torch.no_grad(), Spy(V) as spy:
        quiet = run_case(case, KINDS["jsd"])
    assert not quiet.loss.requires_grad
    assert (spy.calls.get("mm", 0), spy.calls.get("addmm", 0)) == (2, 0)
    loud = run_case(case, KINDS["jsd"])
    assert torch.equal(quiet.loss, loud.loss.detach()) and torch.equal(quiet.divergence, loud.divergence)


def test_without_a_teacher_there_is_one_softmax_and_with_one_there_are_two():
    case, head = make_case(), Head(torch.randn(V, 3, dtype=torch.float64))
    with Spy(V) as alone:
        nothing = run_case(case)
    with Spy(V) as taught:
        result = run(case.hidden, Head(case.weight), case.targets, lambda s: weighted_nll(s.learner_logp, denom=1),
                     teacher_hidden=torch.randn(N, 3, dtype=torch.float64), teacher_head=head)
    assert (alone.calls["_log_softmax"], taught.calls["_log_softmax"]) == (1, 2)
    assert nothing.teacher_logp is None and nothing.divergence is None
    assert result.divergence is None and len(result.teacher_logp) == N
