"""Slow references in float64: each formula as its paper writes it, one number at a time.

A number is a Python float, or a torch scalar where a gradient is wanted. A row is one answer: a list of numbers.
"""

import math

import torch


def exp(x):
    return x.exp() if isinstance(x, torch.Tensor) else math.exp(x)


def log(x):
    return x.log() if isinstance(x, torch.Tensor) else math.log(x)


def minimum(a, b):
    return a if a < b else b


def maximum(a, b):
    return a if a > b else b


def clip(x, low, high):
    return maximum(minimum(x, high), low)


def sigmoid(x):
    return 1 / (1 + exp(-x))


def mean(values):
    return sum(values) / len(values)


def split(x, lengths):
    """The rows of a packed list or tensor."""
    rows, start = [], 0
    for n in lengths:
        rows.append([x[start + t] for t in range(n)])
        start += n
    return rows


def leave_one_out(rewards):
    out = []
    for i, r in enumerate(rewards):
        others = [x for j, x in enumerate(rewards) if j != i and x is not None]
        out.append(None if r is None or not others else r - mean(others))
    return out


def group_mean(rewards):
    valid = [x for x in rewards if x is not None]
    return [None if r is None or len(valid) < 2 else r - mean(valid) for r in rewards]


def spread(values):
    valid = [x for x in values if x is not None]
    if len(valid) < 2:
        return 0.0
    return math.sqrt(sum((x - mean(valid)) ** 2 for x in valid) / (len(valid) - 1))


def scaled(advantages, std, eps):
    return [None if a is None else a / (std + eps) if std > 0 else 0.0 for a in advantages]


def whiten(values, eps):
    if len(values) < 2 or min(values) == max(values):
        return [0.0 for _ in values]
    std = math.sqrt(sum((x - mean(values)) ** 2 for x in values) / (len(values) - 1))
    return [(x - mean(values)) / (std + eps) for x in values]


def discounted_outcome(outcome, lengths, gamma):
    return [gamma ** (n - 1 - t) * r for r, n in zip(outcome, lengths, strict=True) for t in range(n)]


def estimate(estimator, learner, reference):
    ratio = exp(reference - learner)  # of the reference to the learner
    return {"k1": -log(ratio), "k2": log(ratio) ** 2 / 2, "k3": ratio - 1 - log(ratio)}[estimator]


def discounted_sum(row, discount):
    return [sum(discount ** (k - t) * row[k] for k in range(t, len(row))) for t in range(len(row))]


def gae(reward, value, gamma, lam, last_value):
    """One row. `last_value` None: the answer ended."""
    following = [*value[1:], 0.0 if last_value is None else last_value][:len(value)]
    delta = [r + gamma * after - v for r, after, v in zip(reward, following, value, strict=True)]
    return [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, len(delta))) for t in range(len(delta))]


def adaptive_lambda(length, alpha, floor):
    return clip(1 - 1 / (alpha * length), floor, 1.0)


def value_loss(value, old_value, returns, weight, clip_range):
    total = 0.0
    for v, old, target, w in zip(value, old_value, returns, weight, strict=True):
        error = (v - target) ** 2
        if clip_range is not None:
            error = maximum(error, (clip(v, old - clip_range, old + clip_range) - target) ** 2)
        total = total + w * 0.5 * error
    return total


def explained_variance(value, returns):
    residual = [r - v for r, v in zip(returns, value, strict=True)]
    return 1 - sum((x - mean(residual)) ** 2 for x in residual) / sum((x - mean(returns)) ** 2 for x in returns)


def weighted_nll(logps, weights, denom):
    return -sum(w * x for w, x in zip(weights, logps, strict=True)) / denom


def sampled_reverse_kl(learner, teacher, weights, denom):
    return -sum(w * (q - p.item()) * p for p, q, w in zip(learner, teacher, weights, strict=True)) / denom


def clipped_surrogate(log_ratio, advantage, low, high, dual=None):
    ratio = exp(log_ratio)
    kept = minimum(ratio * advantage, clip(ratio, 1 - low, 1 + high) * advantage)
    if dual is not None and advantage < 0:
        kept = maximum(kept, dual * advantage)
    return -kept


def clipped(log_ratio, advantage, low, high):
    ratio = math.exp(log_ratio)
    return ratio < 1 - low and advantage < 0, ratio > 1 + high and advantage > 0


def sequence_log_ratio(learner, old, level):
    gaps = [a - b for a, b in zip(learner, old, strict=True)]
    return sum(gaps) / len(gaps) if level == "sequence_mean" else sum(gaps)


def token_weight(lengths, aggregation, tokens, sequences, constant=1.0):
    weight = {"token": lambda n: 1 / tokens, "sequence": lambda n: 1 / sequences / n,
              "constant": lambda n: 1 / sequences / constant}[aggregation]
    return [weight(n) for n in lengths for _ in range(n)]


def importance_weight(row, level, mode, cap, floor):
    known = [x for x in row if not math.isnan(x)]
    out = []
    for x in row:
        weight = math.exp(sum(known)) if level == "sequence" else math.exp(x)
        bounded = min(max(weight, floor), cap)
        if mode == "mask":
            bounded = weight if floor <= weight <= cap else 0.0
        out.append(1.0 if math.isnan(x) else bounded)
    return out


def dpo_loss(chosen, rejected, beta, label_smoothing, denom):
    total = 0.0
    for w, r in zip(chosen, rejected, strict=True):
        right = sigmoid(beta * (w - r))
        total = total - (1 - label_smoothing) * log(right) - label_smoothing * log(1 - right)
    return total / denom


def bradley_terry(chosen, rejected, margins, center, denom):
    total = 0.0
    for w, r, m in zip(chosen, rejected, margins, strict=True):
        total = total - log(sigmoid(w - r - m)) + center * (w + r) ** 2
    return total / denom
