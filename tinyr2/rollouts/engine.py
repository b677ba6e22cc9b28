"""The decoder: many requests, each with its own prompt, limit and random numbers, in one moving batch.

In: requests. Out: one answer per request, in order. Finished rows leave, waiting ones enter; equal prompts are computed
once. What a row draws depends on its own seed alone, never on the rows it travels with.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import torch
from torch import Tensor, nn

from tinyr2.core.rng import generator
from tinyr2.models import decode
from tinyr2.models.head import Head, head_of, logits_of
from tinyr2.models.packed import supports_packing
from tinyr2.rollouts import padded
from tinyr2.rollouts.request import Answer, Request
from tinyr2.rollouts.sampling import SamplingConfig, draw_tokens


@dataclass
class _Row:
    """A request on its way."""

    index: int
    request: Request
    uniform: np.ndarray  # (max_new,) f64
    ids: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)


@torch.inference_mode()
def decode_all(model: nn.Module, requests: Sequence[Request], sampling: SamplingConfig, *, stop: Sequence[int],
               vocab: int | None = None, max_rows: int = 256) -> list[Answer]:
    """Answer every request with at most `max_rows` rows at a time.

    `stop` ids end an answer; `vocab` crops a padded vocabulary to its first so many ids.
    """
    modes = [(module, module.training) for module in model.modules()]  # adapters train beside a body that does not
    model.eval()
    try:
        if not supports_packing(model):
            warnings.warn(f"{type(model).__name__}: decoding through the stock padded forward, which is slower",
                          stacklevel=2)
            return padded.decode_all(model, requests, sampling, stop=stop, vocab=vocab, max_rows=max_rows)
        return _Engine(model, sampling, set(stop), head_of(model, vocab)).run(requests, max_rows)
    finally:
        for module, training in modes:
            module.training = training


class _Engine:
    """The state of one `decode_all`."""

    def __init__(self, model: nn.Module, sampling: SamplingConfig, stop: set[int], head: Head):
        self.model, self.sampling, self.stop, self.head = model, sampling, stop, head
        self.cache = decode.SlotCache(head.weight.device)
        self.rows: list[_Row] = []

    def run(self, requests: Sequence[Request], max_rows: int) -> list[Answer]:
        waiting = [_Row(i, r, generator(r.seed, "tokens").random(r.max_new)) for i, r in enumerate(requests)]
        waiting.reverse()
        answers: list[Answer | None] = [None] * len(requests)
        pending: Tensor | None = None  # (R,) the token each live row drew last
        while waiting or self.rows:
            if waiting and len(self.rows) <= max_rows * 3 // 4:
                pending = self._admit(waiting, max_rows - len(self.rows), pending)
            else:
                pending = self._advance(decode.step(self.model, self.cache, pending), self.rows)
            pending = self._retire(answers, pending)
        return answers

    def _admit(self, waiting: list[_Row], room: int, pending: Tensor | None) -> Tensor:
        new = [waiting.pop() for _ in range(min(room, len(waiting)))]
        groups = [list(g) for _, g in groupby(new, key=lambda r: r.request.prompt_ids)]
        hidden = decode.prefill(self.model, self.cache, [g[0].request.prompt_ids for g in groups],
                                [len(g) for g in groups])
        self.rows += new
        first = self._advance(hidden, new)
        return first if pending is None else torch.cat([pending, first])

    def _advance(self, hidden: Tensor, rows: list[_Row]) -> Tensor:
        """Draw the next token of `rows` from their states (R, D)."""
        uniform = torch.tensor([r.uniform[len(r.ids)] for r in rows], device=hidden.device,
                               dtype=torch.float32 if hidden.device.type == "mps" else torch.float64)
        ids, logp = draw_tokens(logits_of(hidden, self.head), uniform, self.sampling)
        for row, token, value in zip(rows, ids.tolist(), logp.tolist(), strict=True):
            row.ids.append(token)
            row.logp.append(value)
        return ids

    def _retire(self, answers: list[Answer | None], pending: Tensor) -> Tensor:
        """Let finished rows go; returns the pending tokens of those that stay."""
        gone = set()
        for slot, row in enumerate(self.rows):
            stopped = row.ids[-1] in self.stop
            if stopped or len(row.ids) == row.request.max_new:
                answers[row.index] = Answer(tuple(row.ids), tuple(row.logp), "stop" if stopped else "length")
                gone.add(slot)
        if not gone:
            return pending
        order = self.cache.drop(gone)
        self.rows = [self.rows[s] for s in order]
        return pending[torch.tensor(order, dtype=torch.long, device=pending.device)]
