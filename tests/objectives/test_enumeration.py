"""Expected gradients by enumerating a tiny language: every group of answers, weighed by its probability."""

from itertools import product

import pytest
import torch

from tinyr2.objectives.advantage import leave_one_out
from tinyr2.objectives.kl import estimate
from tinyr2.objectives.policy import sampled_reverse_kl, truncated_importance, weighted_nll
from tinyr2.objectives.value import discounted_sum

VOCAB = 3


def _parameters(length):
    """Logits of the first token (3,), and of the second given the first (3, 3)."""
    rng = torch.Generator().manual_seed(length)
    shapes = [(VOCAB,), (VOCAB, VOCAB)][:length]
    return [torch.randn(shape, generator=rng, dtype=torch.float64).requires_grad_() for shape in shapes]


def _token_logps(parameters, answer):
    """(length,) log-prob of each token of `answer`."""
    logps = [parameters[0].log_softmax(-1)[answer[0]]]
    if len(answer) == 2:
        logps.append(parameters[1].log_softmax(-1)[answer[0], answer[1]])
    return torch.stack(logps)


def _answers(length):
    """Every answer with its reward: no two are alike, none is zero."""
    answers = list(product(range(VOCAB), repeat=length))
    return answers, {a: ((7 * i) % 11 + 1) / 4 - 0.9 for i, a in enumerate(answers)}


def _probability(parameters, answer):
    return _token_logps(parameters, answer).sum().exp()


def _exact_gradient(parameters, value):
    """Gradient of the sum over all answers of p(answer) * value(answer)."""
    answers, _ = _answers(len(parameters))
    expected = sum(_probability(parameters, a) * value(a) for a in answers)
    return torch.autograd.grad(expected, parameters)


def _expected_gradient_over_groups(parameters, size, loss):
    """Sum over all `size`-tuples of answers of p(tuple) times the gradient of loss(tuple, its token log-probs)."""
    answers, _ = _answers(len(parameters))
    logps = {a: _token_logps(parameters, a) for a in answers}
    weight = {a: logps[a].sum().exp().item() for a in answers}
    total = torch.zeros((), dtype=torch.float64)
    for group in product(answers, repeat=size):
        chance = 1.0
        for answer in group:
            chance *= weight[answer]
        # The chance is a number: what the expectation averages is the gradient of the loss, not of the chance.
        total = total + chance * loss(group, [logps[a] for a in group])
    return torch.autograd.grad(total, parameters)


def _assert_close(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert b.abs().max() > 1e-3
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("length", "size"), [(1, 2), (1, 3), (2, 2), (2, 3)])
def test_reinforce_with_leave_one_out_has_the_exact_gradient_of_the_expected_reward(length, size):
    parameters, (_, reward) = _parameters(length), _answers(length)

    def loss(group, logps):
        advantages = leave_one_out([reward[a] for a in group])
        spread = torch.tensor([x for x in advantages for _ in range(length)], dtype=torch.float64)
        return weighted_nll(torch.cat(logps), spread, denom=size)

    got = _expected_gradient_over_groups(parameters, size, loss)
    _assert_close([-g for g in got], _exact_gradient(parameters, reward.__getitem__))


@pytest.mark.parametrize(("length", "size"), [(1, 2), (1, 3), (2, 2), (2, 3)])
def test_reward_weighted_likelihood_has_the_exact_gradient_of_the_expected_reward(length, size):
    parameters, (_, reward) = _parameters(length), _answers(length)

    def loss(group, logps):
        spread = torch.tensor([reward[a] for a in group for _ in range(length)], dtype=torch.float64)
        return weighted_nll(torch.cat(logps), spread, denom=size)

    got = _expected_gradient_over_groups(parameters, size, loss)
    _assert_close([-g for g in got], _exact_gradient(parameters, reward.__getitem__))


def test_candidates_without_a_verdict_leave_the_gradient_that_of_the_rest():
    parameters, reward = _parameters(1), {(0,): 0.75, (1,): None, (2,): -0.5}

    def loss(group, logps):
        kept = [(x, p) for x, p in zip(leave_one_out([reward[a] for a in group]), logps, strict=True) if x is not None]
        if not kept:
            return torch.zeros((), dtype=torch.float64)
        return weighted_nll(torch.cat([p for _, p in kept]), torch.tensor([x for x, _ in kept]), denom=2)

    got = _expected_gradient_over_groups(parameters, 2, loss)
    # Only pairs of judged answers count: E[1{both judged} (r_1 - r_2) grad log p_1], summed over both places.
    logp = parameters[0].log_softmax(-1)
    p = logp.exp().detach()
    exact = torch.autograd.grad(1.25 * p[0] * p[2] * (logp[0] - logp[2]), parameters)
    _assert_close([-g for g in got], exact)


def test_minus_the_mean_reward_of_the_best_candidate_has_no_gradient_in_the_students_parameters():
    parameters, (_, reward) = _parameters(1), _answers(1)
    groups = [((0,), (2,), (1,)), ((1,), (1,), (0,))]
    assert all(_token_logps(parameters, a).requires_grad for group in groups for a in group)  # the student wrote them
    rewards = torch.tensor([[reward[a] for a in group] for group in groups], dtype=torch.float64)
    best = rewards.argmax(dim=1)
    reward_loss = -torch.mean(rewards[torch.arange(len(best)), best])
    assert not reward_loss.requires_grad
    kl = (parameters[0].softmax(-1) * parameters[0].log_softmax(-1)).sum()
    with_it = torch.autograd.grad(0.8 * reward_loss + 0.2 * kl, parameters, retain_graph=True)
    without = torch.autograd.grad(0.2 * kl, parameters)
    assert torch.equal(with_it[0], without[0])
    # though what it claims to improve, the expected reward of the best of three, does depend on them:
    exact = sum(_probability(parameters, a) * _probability(parameters, b) * _probability(parameters, c)
                * max(reward[a], reward[b], reward[c]) for a, b, c in product(reward, repeat=3))
    assert torch.autograd.grad(exact, parameters)[0].abs().max() > 1e-2


def _teacher_logps(answer):
    first = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    second = torch.tensor([[0.1, 0.8, 0.1], [0.4, 0.3, 0.3], [0.25, 0.25, 0.5]], dtype=torch.float64).log()
    return torch.stack([first[answer[0]], *(second[answer[0], b] for b in answer[1:])])


def test_sampled_reverse_kl_has_the_exact_gradient_of_the_kl_of_a_token():
    parameters = _parameters(1)
    student = parameters[0].log_softmax(-1)
    teacher = torch.stack([_teacher_logps((y,))[0] for y in range(VOCAB)])
    exact = torch.autograd.grad((student.exp() * (student - teacher)).sum(), parameters)
    got = _expected_gradient_over_groups(
        parameters, 1, lambda group, logps: sampled_reverse_kl(logps[0], _teacher_logps(group[0]), denom=1))
    _assert_close(got, exact)


def test_sampled_reverse_kl_of_a_sequence_is_the_kl_of_each_token_with_the_prefix_held():
    parameters = _parameters(2)
    first, second = parameters[0].log_softmax(-1), parameters[1].log_softmax(-1)
    teacher = torch.stack([torch.stack([_teacher_logps((a, b))[1] for b in range(VOCAB)]) for a in range(VOCAB)])
    head = torch.stack([_teacher_logps((a, 0))[0] for a in range(VOCAB)])
    kl = (first.exp() * (first - head)).sum()
    kl = kl + (first.exp().detach() * (second.exp() * (second - teacher)).sum(-1)).sum()
    got = _expected_gradient_over_groups(
        parameters, 1, lambda group, logps: sampled_reverse_kl(logps[0], _teacher_logps(group[0]), denom=1))
    _assert_close(got, torch.autograd.grad(kl, parameters))


def test_the_plain_log_ratio_as_a_loss_has_expected_gradient_zero():
    parameters = _parameters(1)
    (got,) = _expected_gradient_over_groups(
        parameters, 1, lambda group, logps: (logps[0] - _teacher_logps(group[0])).sum())
    assert got.abs().max().item() <= 1e-12


def test_importance_weights_turn_what_another_policy_sampled_into_the_exact_gradient():
    parameters, (answers, reward) = _parameters(1), _answers(1)
    actor = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64).log()
    learner = parameters[0].log_softmax(-1)
    total = torch.zeros((), dtype=torch.float64)
    for (y,) in answers:
        weight = truncated_importance(learner[y], actor[y], 1e9)
        total = total + actor[y].exp() * weighted_nll(learner[y], weight * reward[y,], denom=1)
    _assert_close([-g for g in torch.autograd.grad(total, parameters)], _exact_gradient(parameters, reward.__getitem__))


def _kl_gradients(form):
    """The expected gradient of a KL term by place, on-policy, in a language of two tokens; and the reference's logps.

    in_loss: k2 of each token. own_token: minus k1 of the token as its advantage. suffix_sum: minus the sum of k1 from
    the token on, which is what a reward per token becomes under gamma 1.
    """
    parameters = _parameters(2)

    def loss(group, logps):
        gap = estimate("k1", logps[0].detach(), _teacher_logps(group[0]))
        if form == "in_loss":
            return estimate("k2", logps[0], _teacher_logps(group[0])).sum()
        return weighted_nll(logps[0], -gap if form == "own_token" else discounted_sum(-gap, [2], 1.0), denom=1)

    return parameters, _expected_gradient_over_groups(parameters, 1, loss)


def test_on_policy_k2_in_the_loss_is_own_token_k1_in_the_reward():
    _assert_close(_kl_gradients("in_loss")[1], _kl_gradients("own_token")[1])


def test_it_is_not_the_suffix_sum_form_which_is_the_gradient_of_the_sequence_kl():
    parameters, suffix = _kl_gradients("suffix_sum")
    own = _kl_gradients("own_token")[1]
    assert (suffix[0] - own[0]).abs().max() > 0.05  # the first token answers for what follows it
    _assert_close([suffix[1]], [own[1]])            # nothing follows the second
    _assert_close(suffix, _exact_gradient(
        parameters, lambda a: (_token_logps(parameters, a) - _teacher_logps(a)).sum()))


def test_k1_in_the_loss_has_expected_gradient_zero_and_k3_is_biased():
    parameters = _parameters(2)
    kl, k1, k3 = _kl_gradients("own_token")[1], *(
        _expected_gradient_over_groups(
            parameters, 1, lambda group, logps, e=e: estimate(e, logps[0], _teacher_logps(group[0])).sum())
        for e in ("k1", "k3"))
    assert all(g.abs().max() <= 1e-12 for g in k1)
    assert all((a - b).abs().max() > 1e-2 for a, b in zip(k3, kl, strict=True))
