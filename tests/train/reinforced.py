"""One optimizer step of reinforcement on hand-made rollouts, twice: through our rooms, and as a plain loop in float64.

In: a config and rollouts. Out: the loss and the gradient of every parameter.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from tests.objectives import loops
from tests.train.tiny import EOS, VOCAB, qwen3_f64, rollout
from tinyr2.core.config import build
from tinyr2.core.types import Rollout
from tinyr2.recipes.reinforce import ReinforceConfig
from tinyr2.teachers.local import hire, judge_of
from tinyr2.train.credit import assign_credit
from tinyr2.train.critic import Critic, ValueHead, loss_of
from tinyr2.train.policy_loss import PolicyLoss, StepCounts
from tinyr2.train.step import Learner, Reading, accumulate

LIMIT = 9  # tokens an answer may have
REWARDS = {"verdict": (1.0, None), "style": (0.5, None)}  # weight and discount
GROUPS = (((3, 4, 5), ((6, 7, EOS), (8, EOS), (9, 10, 11, 12, EOS))),
          ((9,), ((10, 11, 12, 13, EOS), (14,), (15, 16, 17))),
          ((15, 16, 17, 18), ((21, 22, 3, EOS), (4, 5), (6, 6, 6, 6, 6, 6))))
VERDICTS, STYLES = (1, 0, 0, 1, 1, 0, 0, 1, 0), (0.25, -0.5, 1.0, 0.0, 0.75, 0.5, -1.0, 0.125, 0.5)


def config_of(algorithm: str | None = None, **more) -> ReinforceConfig:
    raw = {"model": {"path": "m"}, "data": {"path": "d"}, "rewards": [{"name": "exact_answer"}], "output_dir": "o"}
    return build(ReinforceConfig, raw | ({} if algorithm is None else {"algorithm": algorithm}) | more, "test")


def make_rollouts(temperature: float = 1.0, spread: float = 0.0, seed: int = 0) -> list[Rollout]:
    """Graded answers with all that a step may know of them; `spread` in nats: how far from on-policy they are.

    Everything that a batch holds in float32 is representable there, so that a loop reads the same numbers. One answer
    has tokens that are read and not learned.
    """
    model, drawn = qwen3_f64(), torch.Generator().manual_seed(seed)
    out, i = [], 0
    for group, (prompt, answers) in enumerate(GROUPS):
        for sample, answer in enumerate(answers):
            mask = (True, False, False, True, True) if i == 2 else None
            noise = partial(torch.randn, len(answer), generator=drawn, dtype=torch.float64)
            with torch.no_grad():
                logp = _logps(model, rollout(prompt, answer), temperature)
            learned = [t for t in range(len(answer)) if mask is None or mask[t]]
            parts = {"verdict": float(VERDICTS[i]), "style": STYLES[i]}
            reference, values = (logp + 0.3 * noise())[learned], (0.5 * noise())[learned]
            out.append(rollout(
                prompt, answer, group=group, sample=sample, learn_mask=mask, temperature=temperature,
                finish="stop" if answer[-1] == EOS else "length", actor_logp=_exact(logp + spread * noise()),
                reference_logp=_exact(reference), values=_exact(values), reward_parts=parts,
                reward=sum(w * parts[name] for name, (w, _) in REWARDS.items()), right=bool(VERDICTS[i])))
            i += 1
    return out


def last_values(rollouts: list[Rollout]) -> list[float]:
    """What a critic expects after each answer."""
    return [0.25 + 0.125 * len(r.response_ids) for r in rollouts]


def _exact(values: torch.Tensor) -> tuple[float, ...]:
    return tuple(values.float().tolist())


def _logps(model: nn.Module, r: Rollout, temperature: float) -> torch.Tensor:
    """(n,) of all response tokens."""
    return _tables(model, r, temperature).gather(1, torch.tensor(r.response_ids)[:, None])[:, 0]


def _tables(model: nn.Module, r: Rollout, temperature: float) -> torch.Tensor:
    """(n, V) log-probs before each response token."""
    logits = model(torch.tensor([[*r.prompt_ids, *r.response_ids]])).logits[0]
    return torch.log_softmax(logits / temperature, -1)[len(r.prompt_ids) - 1:-1]


@dataclass(frozen=True)
class Found:
    """Of one step."""

    loss: float
    gradient: dict[str, torch.Tensor]


def ours(config: ReinforceConfig, rollouts: list[Rollout], *, budget: int = 1000, corrects: bool = False,
         rewards: dict = REWARDS, head: ValueHead | None = None) -> Found:
    """Through credit, loss and step; with a `head`, the critic on the policy's body learns too."""
    model, opd = qwen3_f64(), config.opd
    learner = Learner(model=model, vocab=VOCAB, tokens_per_micro_batch=budget)
    kept = [r for r in credited(config, rollouts, rewards)
            if not (config.loss.mask_truncated_completions and r.finish == "length")]
    loss = PolicyLoss(config=config.loss, kl=config.kl, counts=StepCounts.of(kept), opd=opd, corrects=corrects,
                      constant=config.loss.constant or LIMIT)
    critic = None if head is None else Critic(body=learner, head=head)
    taught = opd is not None and opd.place == "loss"
    scores = accumulate(learner, kept, loss.on, Reading(
        temperature=config.rollout.temperature, score_first=loss.score_first,
        judge=judge_of(hire(qwen3_f64(hidden=24, seed=1), VOCAB)) if taught else None,
        divergence=opd.divergence if taught else None,
        also=None if critic is None else lambda batch, states: loss_of(critic, batch, states, config.value,
                                                                       loss.counts.tokens)))
    heads = {} if head is None else {"score": head.score.weight.grad}
    return Found(scores.loss, {n: p.grad for n, p in model.named_parameters()} | heads)


def credited(config: ReinforceConfig, rollouts: list[Rollout], rewards: dict = REWARDS) -> list[Rollout]:
    return assign_credit(rollouts, config.advantage, config.kl, rewards, last_values=last_values(rollouts),
                         critic_lam=config.value.lam if config.value is not None else 1.0)


def looped(config: ReinforceConfig, rollouts: list[Rollout], *, corrects: bool = False, rewards: dict = REWARDS,
           head: ValueHead | None = None) -> Found:
    """The same, row by row and token by token, on full logits."""
    model = qwen3_f64()
    known = [r for r in rollouts if r.reward is not None and r.error is None]
    credit, returns = looped_credit(config, known, rewards)
    kept = [(r, a, g) for r, a, g in zip(known, credit, returns, strict=True)
            if a is not None and not (config.loss.mask_truncated_completions and r.finish == "length")]
    size = Sizes(sum(_learned(r) for r, _, _ in kept), len(kept), sum(_learned(r) for r, _, _ in kept if r.right))
    total = torch.zeros((), dtype=torch.float64)
    for r, advantage, _ in kept:
        total = total + _row(config, model, r, advantage, size, corrects)
    value = 0.0
    if head is not None:
        for r, _, targets in kept:
            value = value + _value_row(config, model, r, targets, size, head)
    (total + value).backward()
    heads = {} if head is None else {"score": head.score.weight.grad}
    return Found(float(total.detach()), {n: p.grad for n, p in model.named_parameters()} | heads)


@dataclass(frozen=True)
class Sizes:
    tokens: int
    sequences: int
    right: int


def _row(config, model, r, advantage, size, corrects):
    """One answer's share of the loss."""
    picked = [t for t in range(len(r.response_ids)) if r.learn_mask is None or r.learn_mask[t]]
    temperature, n = config.rollout.temperature, len(picked)
    tables = _tables(model, r, temperature)
    logp = [tables[t, r.response_ids[t]] for t in picked]
    actor = [r.actor_logp[t] for t in picked]
    old = r.old_logp or ([x.item() for x in logp] if corrects else actor)
    gaps = [a - b for a, b in zip(logp, old, strict=True)]
    if config.loss.ratio != "token":
        whole = sum(gaps) / (n if config.loss.ratio == "sequence_mean" else 1)
    chosen = config.loss.importance
    weights = loops.importance_weight([a - b for a, b in zip(old, actor, strict=True)], chosen.level,
                                      "mask" if chosen.mode == "mask" else "truncate", chosen.cap, chosen.floor)
    high = config.loss.epsilon_high or config.loss.epsilon
    total = 0.0
    for t in range(n):
        share = {"token": 1 / size.tokens, "sequence": 1 / (size.sequences * n),
                 "constant": 1 / (size.sequences * (config.loss.constant or LIMIT))}[config.loss.aggregation]
        ratio = gaps[t] if config.loss.ratio == "token" else whole
        if config.loss.ratio != "token" and corrects and chosen.level == "token":
            # a weight of each token on an answer's ratio acts as in GSPO-token (2507.18071, eq. 13 and 14): on the
            # share of the gradient that goes through its own token
            gain = 1 if config.loss.ratio == "sequence_mean" else n
            ratio = whole.detach() + gain * (gaps[t] - gaps[t].detach())
        term = loops.clipped_surrogate(ratio, advantage[t], config.loss.epsilon, high, config.loss.delta)
        term = term * (weights[t] if corrects else 1.0)
        if config.kl.place == "loss":
            penalty = loops.estimate(config.kl.estimator, logp[t], torch.tensor(r.reference_logp[t]).double())
            term = term + config.kl.beta * penalty * (gaps[t].exp() if config.kl.ratio else 1.0)
        if config.opd is not None and config.opd.place == "loss":
            term = term + config.opd.weight * _reverse_kl(tables[picked[t]], r, picked[t], temperature)
        total = total + share * term
        if r.right:
            total = total - config.loss.positive_nll * logp[t] / size.right
    return total


def _reverse_kl(table, r, t, temperature):
    with torch.no_grad():
        wise = _tables(qwen3_f64(hidden=24, seed=1), r, temperature)[t]
    return (table.exp() * (table - wise)).sum()


def _value_row(config, model, r, targets, size, head):
    states = model.model(torch.tensor([[*r.prompt_ids, *r.response_ids]])).last_hidden_state[0]
    picked = [t for t in range(len(r.response_ids)) if r.learn_mask is None or r.learn_mask[t]]
    values = [(states[len(r.prompt_ids) - 1 + t] * head.score.weight[0]).sum() for t in picked]
    weights = [1 / size.tokens] * len(values)
    return config.value.weight * loops.value_loss(values, r.values, targets, weights, config.value.clip)


def _learned(r: Rollout) -> int:
    return len(_old(r))


def _old(r: Rollout) -> list[float]:
    """log-probs of the learned tokens before the step."""
    if r.old_logp is not None:
        return list(r.old_logp)
    return [x for t, x in enumerate(r.actor_logp) if r.learn_mask is None or r.learn_mask[t]]


def looped_credit(config, known, rewards):
    """Per answer the credit of its learned tokens and the critic's targets; None for one without a baseline."""
    kl, gamma = config.kl, config.advantage.gamma
    gaps = [[loops.estimate(kl.estimator, a, b) for a, b in zip(_old(r), r.reference_logp, strict=True)]
            for r in known]
    paid = [kl.beta * sum(g) if kl.place == "sequence_reward" else 0.0 for g in gaps]
    outcomes = [r.reward - p for r, p in zip(known, paid, strict=True)]
    parts = []  # of each answer: (discount, what is discounted so)
    for r, p in zip(known, paid, strict=True):
        own = [(g, w * (r.reward_parts[name] or 0.0)) for name, (w, g) in rewards.items()]
        parts.append([(gamma if g is None else g, x) for g, x in own] + [(gamma, -p)])
    stream = [[-kl.beta * g if kl.place == "token_reward" else 0.0 for g in row] for row in gaps]
    if config.advantage.baseline == "value":
        credit, returns = _looped_values(config, known, parts, stream)
    else:
        credit, returns = _looped_outcomes(config, known, outcomes, parts, stream), [None] * len(known)
    if config.advantage.scale == "whiten":
        flat = loops.whiten([a for row in credit if row is not None for a in row], 1e-8)
        rows = iter(loops.split(flat, [len(row) for row in credit if row is not None]))
        credit = [None if row is None else next(rows) for row in credit]
    return credit, returns


def _looped_outcomes(config, known, outcomes, parts, stream):
    advantage, centered = config.advantage, [None] * len(known)
    for group in sorted({r.group for r in known}):
        members = [i for i, r in enumerate(known) if r.group == group]
        for i in members:
            others = [j for j in members if j != i] if advantage.baseline == "leave_one_out" else members
            if len(members) < 2 and advantage.baseline != "none":
                continue
            spread = loops.spread([outcomes[j] for j in members]) if advantage.scale == "group_std" else None
            spread = loops.spread(outcomes) if advantage.scale == "batch_std" else spread
            row = []
            for k, (g, x) in enumerate(parts[i]):
                less = 0.0 if advantage.baseline == "none" else loops.mean([parts[j][k][1] for j in others])
                scale = 1.0 if spread is None else (spread + advantage.eps if spread > 0 else float("inf"))
                row.append((g, (x - less) / scale))
            centered[i] = row
    credit = []
    for row, penalties in zip(centered, stream, strict=True):
        n, later = len(penalties), loops.discounted_sum(penalties, advantage.gamma)
        credit.append(None if row is None else [sum(g ** (n - 1 - t) * x for g, x in row) + later[t]
                                                for t in range(n)])
    return credit


def _looped_values(config, known, parts, stream):
    credit, returns, ends = [], [], last_values(known)
    for i, r in enumerate(known):
        n, gamma = len(stream[i]), config.advantage.gamma
        worth = [sum(g ** (n - 1 - t) * x for g, x in parts[i]) for t in range(n)]  # of all that follows t
        reward = [worth[t] - (gamma * worth[t + 1] if t + 1 < n else 0.0) + stream[i][t] for t in range(n)]
        after = ends[i] if config.advantage.bootstrap_truncated and r.finish == "length" else None
        alpha = config.advantage.lam_alpha
        lam = config.advantage.lam if alpha is None else loops.adaptive_lambda(n, alpha, config.advantage.lam_floor)
        credit.append(loops.gae(reward, r.values, gamma, lam, after))
        target = loops.gae(reward, r.values, gamma, config.value.lam, after)
        returns.append([a + v for a, v in zip(target, r.values, strict=True)])
    return credit, returns


def head_of_values(seed: int = 3) -> ValueHead:
    """A critic that already says something."""
    head = ValueHead(16).double()
    with torch.no_grad():
        head.score.weight.copy_(torch.randn(1, 16, generator=torch.Generator().manual_seed(seed)))
    return head


def assert_same(found: Found, expected: Found, tolerance: float = 1e-6) -> None:
    """Loss and each parameter's gradient, within `tolerance` of the largest entry."""
    largest = max(float(g.abs().max()) for g in expected.gradient.values())
    assert largest > 1e-4, "nothing is learned, so nothing is compared"
    assert abs(found.loss - expected.loss) <= tolerance * max(abs(expected.loss), 0.1)
    assert found.gradient.keys() == expected.gradient.keys()
    for name, g in expected.gradient.items():
        scale = max(float(g.abs().max()), largest / 100)
        assert float((found.gradient[name] - g).abs().max()) <= tolerance * scale, name


def at_temperature(config: ReinforceConfig, temperature: float) -> ReinforceConfig:
    rolled = config.rollout.model_copy(update={"temperature": temperature})
    return config.model_copy(update={"rollout": rolled})


def with_old_logp(rollouts: list[Rollout], spread: float = 0.1) -> list[Rollout]:
    """As scored by the learner before its first update, which the actor saw otherwise."""
    drawn = torch.Generator().manual_seed(5)
    return [replace(r, old_logp=_exact(torch.tensor(_old(r)) + spread * torch.randn(len(_old(r)), generator=drawn)))
            for r in rollouts]
