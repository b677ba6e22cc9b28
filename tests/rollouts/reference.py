"""The slow and obvious decoder that the tests compare with: one row, no cache, the whole forward for every token."""

import torch

from tinyr2.core.rng import generator
from tinyr2.rollouts.request import Answer, Request


@torch.no_grad()
def decode(model, request: Request, temperature: float, stop: set[int]) -> Answer:
    uniform = generator(request.seed, "tokens").random(request.max_new)
    ids, logps = [], []
    for u in uniform:
        logits = model(torch.tensor([[*request.prompt_ids, *ids]]), use_cache=False).logits[0, -1]
        logp = torch.log_softmax(logits.double() / (temperature or 1.0), -1)
        if temperature == 0:
            token = int(logp.argmax())
        else:
            mass, token = 0.0, -1
            for token, p in enumerate(logp.exp().tolist()):  # noqa: B007 (the token is what the loop is for)
                mass += p
                if mass > u:
                    break
        ids.append(token)
        logps.append(float(logp[token]))
        if token in stop:
            return Answer(tuple(ids), tuple(logps), "stop")
    return Answer(tuple(ids), tuple(logps), "length")
