"""The stock way to decode: a fixed batch, prompts padded on the left, transformers' own cache.

For classes of which no decode copy is known. In and out as `engine.decode_all`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tinyr2.core.rng import generator
from tinyr2.models.head import head_of, logits_of
from tinyr2.models.packed import body_of
from tinyr2.rollouts.request import Answer, Ending, Request
from tinyr2.rollouts.sampling import SamplingConfig, draw_tokens


def decode_all(model: nn.Module, requests: Sequence[Request], sampling: SamplingConfig, *, ending: Ending,
               vocab: int | None, max_rows: int) -> list[Answer]:
    """Answer the requests, `max_rows` at a time, each batch until its last row has stopped."""
    head = head_of(model, vocab)
    answers: list[Answer] = []
    with _evaluating(model), torch.inference_mode():
        for i in range(0, len(requests), max_rows):
            batch = requests[i:i + max_rows]
            drawn: list[list[tuple[int, float]]] = [[] for _ in batch]
            alive = set(range(len(batch)))
            for ids, logps in _steps(model, batch, lambda states: logits_of(states, head), sampling):
                for row in sorted(alive):
                    drawn[row].append((ids[row], logps[row]))
                    if _over(drawn[row], ending) or len(drawn[row]) == batch[row].max_new:
                        alive.remove(row)
                if not alive:
                    break
            answers += [_answer(tokens, ending) for tokens in drawn]
    return answers


def _steps(model: nn.Module, batch: Sequence[Request], logits: Callable[[Tensor], Tensor],
           sampling: SamplingConfig) -> Iterator[tuple[list[int], list[float]]]:
    """Ids and log-probs that each row draws, step by step, without end."""
    device = next(model.parameters()).device
    tokens, mask = _pad_left([r.prompt_ids for r in batch], device)
    uniform = torch.tensor(_uniform(batch), device=device,
                           dtype=torch.float32 if device.type == "mps" else torch.float64)
    cache = None
    for column in uniform.T:
        position = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1]:]
        out = body_of(model)(input_ids=tokens, attention_mask=mask, position_ids=position, past_key_values=cache,
                             use_cache=True)
        cache = out.past_key_values
        ids, logp = draw_tokens(logits(out.last_hidden_state[:, -1]), column, sampling)
        yield ids.tolist(), logp.tolist()
        tokens = ids[:, None]
        mask = torch.cat([mask, mask.new_ones(len(batch), 1)], dim=1)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]  # adapters train beside a body that does not
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _over(drawn: Sequence[tuple[int, float]], ending: Ending) -> bool:
    return ending.reached([token for token, _ in drawn])


def _answer(drawn: Sequence[tuple[int, float]], ending: Ending) -> Answer:
    ids, logps = zip(*drawn, strict=True)
    return Answer(ids, logps, "stop" if _over(drawn, ending) else "length")


def _pad_left(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(len(r) for r in rows)
    tokens = torch.tensor([[0] * (width - len(r)) + list(r) for r in rows], device=device)
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=device)
    return tokens, mask


def _uniform(requests: Sequence[Request]) -> list[list[float]]:
    longest = max(r.max_new for r in requests)
    return [[*generator(r.seed, "tokens").random(r.max_new).tolist(), *[0.0] * (longest - r.max_new)]
            for r in requests]
