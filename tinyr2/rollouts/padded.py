"""The stock way to decode: a fixed batch, prompts padded on the left, transformers' own cache.

For classes that the slot cache does not know. In and out as `engine.decode_all`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tinyr2.core.rng import generator
from tinyr2.models.head import Head, head_of, logits_of
from tinyr2.models.packed import body_of
from tinyr2.rollouts.request import Answer, Request
from tinyr2.rollouts.sampling import SamplingConfig, draw_tokens


def decode_all(model: nn.Module, requests: Sequence[Request], sampling: SamplingConfig, *, stop: Sequence[int],
               vocab: int | None, max_rows: int) -> list[Answer]:
    """Answer the requests, `max_rows` at a time, each batch until its last row has stopped."""
    head = head_of(model, vocab)
    return [answer for i in range(0, len(requests), max_rows)
            for answer in _batch(model, requests[i:i + max_rows], sampling, set(stop), head)]


def _batch(model: nn.Module, requests: Sequence[Request], sampling: SamplingConfig, stop: set[int],
           head: Head) -> list[Answer]:
    device = head.weight.device
    tokens, mask = _pad_left([r.prompt_ids for r in requests], device)
    uniform = torch.tensor(_uniform(requests), device=device,
                           dtype=torch.float32 if device.type == "mps" else torch.float64)
    drawn, logps, cache = [], [], None
    alive = torch.ones(len(requests), dtype=torch.bool, device=device)
    stop_ids = torch.tensor(sorted(stop), device=device)
    limit = torch.tensor([r.max_new for r in requests], device=device)
    while bool(alive.any()):
        position = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1]:]
        out = body_of(model)(input_ids=tokens, attention_mask=mask, position_ids=position, past_key_values=cache,
                             use_cache=True)
        cache = out.past_key_values
        ids, logp = draw_tokens(logits_of(out.last_hidden_state[:, -1], head), uniform[:, len(drawn)], sampling)
        drawn.append(ids)
        logps.append(logp)
        alive &= ~torch.isin(ids, stop_ids) & (limit > len(drawn))
        tokens = ids[:, None]
        mask = torch.cat([mask, mask.new_ones(len(requests), 1)], dim=1)
    rows = zip(torch.stack(drawn, 1).tolist(), torch.stack(logps, 1).tolist(), requests, strict=True)
    return [_answer(ids, logp, request.max_new, stop) for ids, logp, request in rows]


def _answer(ids: list[int], logp: list[float], limit: int, stop: set[int]) -> Answer:
    end = next((i for i, t in enumerate(ids[:limit]) if t in stop), None)
    n = limit if end is None else end + 1
    return Answer(tuple(ids[:n]), tuple(logp[:n]), "length" if end is None else "stop")


def _pad_left(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(len(r) for r in rows)
    tokens = torch.tensor([[0] * (width - len(r)) + list(r) for r in rows], device=device)
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=device)
    return tokens, mask


def _uniform(requests: Sequence[Request]) -> list[list[float]]:
    longest = max(r.max_new for r in requests)
    return [[*generator(r.seed, "tokens").random(r.max_new).tolist(), *[0.0] * (longest - r.max_new)]
            for r in requests]
