"""A language of three tokens and at most two places: token 2 ends an answer. Its policy is a table of logits."""

from itertools import product

import torch

STATES = 3  # nothing written yet, after token 0, after token 1
ANSWERS = [(2,), *product((0, 1), range(3))]
REWARDS = dict(zip(ANSWERS, (0.85, -0.4, 1.0, 0.1, -0.9, 0.6, 0.25), strict=True))


def table(seed, scale=1.0):
    """Logits (states, tokens)."""
    return scale * torch.randn(STATES, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def states(answer):
    """The state in which each token was written."""
    return [0] + [a + 1 for a in answer[:-1]]


def logps(logits, answer):
    """The log-prob of each token of the answer, as scalars."""
    table = logits.log_softmax(-1)
    return [table[s, y] for s, y in zip(states(answer), answer, strict=True)]


def probability(logits, answer):
    return sum(logps(logits, answer)).exp()


def expected_gradient(loss, actor, parameters, size=2):
    """The sum over all `size`-tuples of answers of actor's probability of the tuple times the gradient of loss(tuple).

    The chance is a number: what the expectation averages is the gradient of the loss, not that of the chance.
    """
    chances = {a: probability(actor, a).item() for a in ANSWERS}
    total = torch.zeros((), dtype=torch.float64)
    for group in product(ANSWERS, repeat=size):
        chance = 1.0
        for answer in group:
            chance *= chances[answer]
        total = total + chance * loss(group)
    return torch.autograd.grad(total, parameters)


def true_gradient(logits):
    """The gradient of the expected reward."""
    return torch.autograd.grad(sum(probability(logits, a) * REWARDS[a] for a in ANSWERS), logits)[0]
