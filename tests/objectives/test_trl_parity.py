"""The peer: TRL's chunked divergence on the same tensors."""

import importlib.util
import os

import pytest
import torch

from tinyr2.models.head import Head, run
from tinyr2.objectives.divergence import Divergence

MISSING = importlib.util.find_spec("trl") is None
# Where CI runs, a missing peer is a failure: the import below must then raise.
pytestmark = pytest.mark.skipif(MISSING and not os.environ.get("CI"), reason="trl is not installed")

SPECS = {"reverse_kl": (Divergence(kind="reverse_kl"), 1.0), "forward_kl": (Divergence(kind="forward_kl"), 0.0),
         "jsd": (Divergence(kind="jsd", beta=0.5), 0.5), "jsd-0.1": (Divergence(kind="jsd", beta=0.1), 0.1),
         "jsd-0.9": (Divergence(kind="jsd", beta=0.9), 0.9)}


@pytest.fixture(scope="module")
def peer():
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    return ChunkedDivergenceFunction.apply


def _tensors():
    rng = torch.Generator().manual_seed(5)

    def normal(*shape):
        return torch.randn(*shape, generator=rng)

    student = [x.requires_grad_() for x in (normal(50, 16), normal(101, 16) / 2, normal(101))]
    return student, (normal(50, 24), normal(101, 24) / 3, normal(101)), torch.rand(50, generator=rng)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(("temperature", "scale", "softcap"), [(1.0, 1.0, None), (0.7, 1.2, None), (1.3, 0.8, 4.0)])
def test_values_and_gradients_agree_with_trl(peer, name, temperature, scale, softcap):
    spec, beta = SPECS[name]
    student, teacher, share = _tensors()
    values, entropy = peer(*student, *teacher, beta, temperature, scale, softcap, scale, softcap)
    expected = torch.autograd.grad((share * values).sum(), student)
    result = run(
        student[0], Head(student[1], student[2], scale, softcap), torch.zeros(50, dtype=torch.int64),
        lambda s: (share[s.part] * s.divergence).sum(), temperature=temperature, divergence=spec,
        teacher_hidden=teacher[0], teacher_head=Head(teacher[1], teacher[2], scale, softcap), chunk_elements=101 * 8)
    torch.testing.assert_close(result.divergence, values.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.entropy, entropy, rtol=1e-5, atol=1e-5)
    for a, b in zip(torch.autograd.grad(result.loss, student), expected, strict=True):
        assert b.abs().max() > 1e-3  # or the tolerance would prove nothing
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
