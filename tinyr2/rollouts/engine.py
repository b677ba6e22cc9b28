"""The engine: many requests, each with its own prompt, limit and random numbers, in one moving batch.

In: requests. Out: one answer per request, in order. Finished rows leave, waiting ones enter; equal prompts side by side
that enter together are computed once. What a row draws depends on its own seed, never on the rows it travels with.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from tinyr2.core.rng import generator
from tinyr2.models.decode import Decoder, supports_decoding
from tinyr2.models.packed import is_steady
from tinyr2.models.slots import send
from tinyr2.rollouts import padded
from tinyr2.rollouts.request import Answer, Ending, Request
from tinyr2.rollouts.sampling import SamplingConfig, draw_tokens
from tinyr2.rollouts.scheduler import Scheduler


def decode_all(model: nn.Module | Decoder, requests: Sequence[Request], sampling: SamplingConfig, *,
               stop: Sequence[int] | Ending, vocab: int | None = None, max_rows: int = 256) -> list[Answer]:
    """Answer every request with at most `max_rows` rows at a time.

    model: a causal LM, of whose weights a decode copy is made for this call, or a `Decoder` (RunError if it is stale)
    stop: ids that end an answer, or an `Ending`    vocab: crops a padded vocabulary to its first so many ids
    """
    ending = stop if isinstance(stop, Ending) else Ending(ids=frozenset(stop))
    if isinstance(model, Decoder):
        model.check()
        assert vocab in (None, model.vocab), f"vocab {vocab}, but the decoder was made for {model.vocab}"
        return _Engine(model, requests, sampling, ending).run(max_rows)
    if supports_decoding(model):
        return _Engine(Decoder(model, vocab=vocab), requests, sampling, ending).run(max_rows)
    warnings.warn(f"{type(model).__name__}: no decode copy is known for this class; decoding through the stock padded "
                  "forward, which is slower", stacklevel=2)
    if not is_steady(model.config):
        warnings.warn(f"{type(model).__name__}: its rotary positions depend on the longest row of a batch, so that it "
                      "decodes one request at a time", stacklevel=2)
        max_rows = 1
    return padded.decode_all(model, requests, sampling, ending=ending, vocab=vocab, max_rows=max_rows)


@dataclass
class _Row:
    """A request on its way."""

    request: Request
    uniform: np.ndarray  # (max_new,) f64
    ids: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    over: bool = False  # by its ending, not its limit


class _Engine:
    """The state of one `decode_all`."""

    def __init__(self, decoder: Decoder, requests: Sequence[Request], sampling: SamplingConfig, ending: Ending):
        self.decoder, self.sampling, self.ending = decoder, sampling, ending
        self.rows = [_Row(r, generator(r.seed, "tokens").random(r.max_new)) for r in requests]

    @torch.inference_mode()
    def run(self, max_rows: int) -> list[Answer]:
        scheduler = Scheduler([(row.request.prompt_ids, len(row.request.prompt_ids)) for row in self.rows], max_rows)
        longest = max((len(r.request.prompt_ids) + r.request.max_new for r in self.rows), default=0)
        cache = self.decoder.new_cache(longest)
        pending = torch.zeros(0, dtype=torch.long, device=self.decoder.device)  # the token each live row drew last
        while scheduler.busy:
            if entries := scheduler.admit():
                prompts = [self.rows[e.requests[0]].request.prompt_ids for e in entries]
                states = self.decoder.prefill(cache, prompts, [len(e.requests) for e in entries])
                new = [self.rows[r] for e in entries for r in e.requests]
                pending = torch.cat([pending, self._draw(states, new)])
            else:
                states = self.decoder.step(cache, pending)
                pending = self._draw(states, [self.rows[r] for r in scheduler.seated])
            if gone := {slot for slot, r in enumerate(scheduler.seated) if self._done(self.rows[r])}:
                order = cache.drop(gone)
                scheduler.leave(order)
                pending = pending[send(order, pending.device)]
        self.decoder.take_back(cache)
        return [Answer(tuple(row.ids), tuple(row.logp), "stop" if row.over else "length") for row in self.rows]

    def _draw(self, states: Tensor, rows: list[_Row]) -> Tensor:
        """The next token of `rows` from their states (R, D); (R,) int64."""
        uniform = send([row.uniform[len(row.ids)] for row in rows], states.device,
                       torch.float32 if states.device.type == "mps" else torch.float64)
        ids, logp = draw_tokens(self.decoder.logits(states), uniform, self.sampling)
        for row, token, value in zip(rows, ids.tolist(), logp.tolist(), strict=True):
            row.ids.append(token)
            row.logp.append(value)
            row.over = self.ending.reached(row.ids)
        return ids

    def _done(self, row: _Row) -> bool:
        return row.over or len(row.ids) == row.request.max_new
