"""Rollouts to batches: lists become tensors, once.

In: rollouts of one optimizer step. Out: micro-batches of at most a token budget each, packed without padding. How a
step is split changes nothing but memory: losses are divided by counts over the whole step.
"""

import heapq
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from tinyr2.core.types import Batch, Rollout


def split(rollouts: Sequence[Rollout], max_tokens: int, *, keep_groups: bool = False,
          apart: Callable[[Rollout], Hashable] | None = None) -> list[list[Rollout]]:
    """As few micro-batches of about equal size as hold the rollouts; longest first into the emptiest.

    A rollout longer than `max_tokens` travels alone. With keep_groups, rollouts of one group travel together. Those
    that differ in `apart` never do; they come in the order in which each kind first appears.
    """
    if not rollouts:
        return []
    if apart is not None:
        kinds: dict[Hashable, list[Rollout]] = {}
        for r in rollouts:
            kinds.setdefault(apart(r), []).append(r)
        return [part for some in kinds.values() for part in split(some, max_tokens, keep_groups=keep_groups)]
    groups: dict[int, list[Rollout]] = {}
    for i, r in enumerate(rollouts):
        groups.setdefault(r.group if keep_groups else i, []).append(r)
    units = list(groups.values())
    sizes = [sum(len(r.prompt_ids) + len(r.response_ids) for r in unit) for unit in units]
    parts = max(1, -(-sum(sizes) // max_tokens))
    while True:
        bins = _balance(sizes, parts)
        if all(sum(sizes[i] for i in b) <= max_tokens or len(b) == 1 for b in bins):
            return [[r for i in b for r in units[i]] for b in bins if b]
        parts += 1


def _balance(sizes: Sequence[int], parts: int) -> list[list[int]]:
    """Longest-processing-time-first: indices in `parts` bins; ties go to the first."""
    heap = [(0, i) for i in range(parts)]
    bins: list[list[int]] = [[] for _ in range(parts)]
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        total, b = heapq.heappop(heap)
        bins[b].append(i)
        heapq.heappush(heap, (total + sizes[i], b))
    return bins


def pack(rollouts: Sequence[Rollout], device: torch.device | str = "cpu") -> Batch:
    """One batch of all `rollouts`, their prompts and responses end to end."""
    tokens: list[int] = []
    position: list[int] = []
    lengths: list[int] = []
    learn: list[int] = []
    row: list[int] = []
    for i, r in enumerate(rollouts):
        first = len(tokens) + len(r.prompt_ids)
        n = len(r.prompt_ids) + len(r.response_ids)
        tokens += [*r.prompt_ids, *r.response_ids]
        position += range(n)
        lengths.append(n)
        learned = [j for j in range(len(r.response_ids)) if r.learn_mask is None or r.learn_mask[j]]
        learn += [first + j for j in learned]
        row += [i] * len(learned)
    return Batch(
        tokens=torch.tensor(tokens, dtype=torch.long, device=device),
        position=torch.tensor(position, dtype=torch.long, device=device), lengths=tuple(lengths),
        learn=torch.tensor(learn, dtype=torch.long, device=device),
        row=torch.tensor(row, dtype=torch.long, device=device),
        on_policy=_per_token([r.author == "student" for r in rollouts], row, device, torch.bool),
        right=_per_token([r.right is True for r in rollouts], row, device, torch.bool),
        actor_logp=_actor_logp(rollouts, device),
        advantage=(_optional([r.advantage for r in rollouts], row, device)
                   if all(r.credit is None for r in rollouts) else _stream(rollouts, "credit", device)),
        reward=_optional([r.reward for r in rollouts], row, device),
        **{name: _stream(rollouts, name, device) for name in ("old_logp", "reference_logp", "values", "returns")},
    )


def _stream(rollouts: Sequence[Rollout], name: str, device: torch.device | str) -> Tensor | None:
    """(N,) f32 of what each rollout has for its learned tokens; None where none has, NaN where one lacks it."""
    streams = [getattr(r, name) for r in rollouts]
    if all(s is None for s in streams):
        return None
    values = [v for r, s in zip(rollouts, streams, strict=True) for v in s or (float("nan"),) * r.learned]
    return torch.tensor(values, dtype=torch.float32, device=device)


def _actor_logp(rollouts: Sequence[Rollout], device: torch.device | str) -> Tensor | None:
    if all(r.actor_logp is None for r in rollouts):
        return None
    values: list[float] = []
    for r in rollouts:
        mask = r.learn_mask or (True,) * len(r.response_ids)
        logp = r.actor_logp or (float("nan"),) * len(r.response_ids)
        values += [v for v, m in zip(logp, mask, strict=True) if m]
    return torch.tensor(values, dtype=torch.float32, device=device)


def _optional(values: list[float | None], row: list[int], device: torch.device | str) -> Tensor | None:
    """(N,) f32; None where no rollout has the value, NaN for the rollouts that lack it."""
    if all(v is None for v in values):
        return None
    return _per_token([float("nan") if v is None else v for v in values], row, device, torch.float32)


def _per_token(values: list, row: list[int], device: torch.device | str, dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype)[torch.tensor(row, dtype=torch.long)].to(device)
