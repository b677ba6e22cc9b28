"""Randomness by derivation: every random number is a function of (run seed, stream, step, sample, …).

Nothing here has state, so a run resumes by knowing its step, and any rollout can be drawn again alone.
"""

from hashlib import blake2b

import numpy as np


def derive(seed: int, *path: int | str) -> int:
    """A 63-bit seed for the place that `path` names, e.g. `derive(0, "rollout", step, "p17", 3)`.

    BLAKE2b over the parts with their types, so ("1",) and (1,) differ and no two paths run together.
    """
    digest = blake2b(digest_size=8)
    for part in (seed, *path):
        text = f"{type(part).__name__}:{part}".encode()
        digest.update(len(text).to_bytes(4, "little") + text)
    return int.from_bytes(digest.digest(), "little") >> 1


def generator(seed: int, *path: int | str) -> np.random.Generator:
    """A counter-based NumPy generator for the place that `path` names."""
    return np.random.Generator(np.random.Philox(key=derive(seed, *path)))


def permutation(n: int, seed: int, *path: int | str) -> np.ndarray:
    """The numbers 0 … n-1 in an order that depends on `seed` and `path` alone. (n,) int64."""
    return generator(seed, *path).permutation(n)
