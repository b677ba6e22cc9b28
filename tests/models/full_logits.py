"""The slow reference of `models/head.py`: token by token over full logits, differentiated by autograd."""

from dataclasses import dataclass

import torch

from tinyr2.models.head import Head, run
from tinyr2.objectives.divergence import Divergence
from tinyr2.objectives.policy import weighted_nll

N, D, V = 7, 5, 11
KINDS = {"reverse_kl": Divergence(kind="reverse_kl"), "forward_kl": Divergence(kind="forward_kl"),
         "jsd": Divergence(kind="jsd", beta=0.3)}
HEADS = {"plain": {}, "scaled": {"scale": 0.7}, "softcapped": {"scale": 1.3, "softcap": 2.0}}


@dataclass
class Case:
    """A student, a teacher of another width, and weights that make every token count differently."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    teacher_hidden: torch.Tensor
    teacher_weight: torch.Tensor
    targets: torch.Tensor
    credit: torch.Tensor
    share: torch.Tensor

    @property
    def learned(self):
        return (self.hidden, self.weight, self.bias)

    def to(self, dtype):
        cast = {name: x if x.dtype == torch.int64 else x.detach().to(dtype) for name, x in vars(self).items()}
        return Case(**cast).learning()

    def learning(self):
        for x in self.learned:
            x.requires_grad_()
        return self


def make_case(n=N, d=D, v=V, seed=0):
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    return Case(normal(n, d), normal(v, d), normal(v), normal(n, d + 2), normal(v, d + 2),
                torch.randint(v, (n,), generator=rng), normal(n), normal(n).abs() / max(1, n)).learning()


def default_objective(case, divergence):
    def objective(scores):
        loss = weighted_nll(scores.learner_logp, case.credit[scores.part], denom=N)
        return loss if divergence is None else loss + (case.share[scores.part] * scores.divergence).sum()

    return objective


def run_case(case, divergence=None, *, extra=None, objective=None, **kwargs):
    teacher = {} if divergence is None else {
        "teacher_hidden": case.teacher_hidden, "teacher_head": Head(case.teacher_weight)}
    return run(case.hidden, Head(case.weight, case.bias, **(extra or {})), case.targets,
               objective or default_objective(case, divergence), divergence=divergence, **teacher, **kwargs)


def _log_softmax(logits):
    return logits - logits.exp().sum().log()


def naive(case, divergence=None, *, extra=None, temperature=1.0):
    """Loss and streams, token by token, over full logits, through autograd."""
    extra = {"scale": 1.0, "softcap": None} | (extra or {})
    rows = []
    for i in range(len(case.targets)):
        logits = extra["scale"] * (case.weight @ case.hidden[i] + case.bias)
        if extra["softcap"] is not None:
            logits = extra["softcap"] * torch.tanh(logits / extra["softcap"])
        student = _log_softmax(logits / temperature)
        teacher = _log_softmax(case.teacher_weight @ case.teacher_hidden[i] / temperature)
        s, t = student.exp(), teacher.exp()
        value = torch.zeros((), dtype=s.dtype)
        if divergence is not None:
            m = divergence.beta * t + (1 - divergence.beta) * s
            value = {
                "reverse_kl": (s * (student - teacher)).sum(), "forward_kl": (t * (teacher - student)).sum(),
                "jsd": divergence.beta * (t * (teacher - m.log())).sum()
                + (1 - divergence.beta) * (s * (student - m.log())).sum()}[divergence.kind]
        rows.append((student[case.targets[i]], value, -(s * student).sum(), teacher[case.targets[i]]))
    logp, value, entropy, teacher_logp = (torch.stack(column) for column in zip(*rows, strict=True))
    loss = -(case.credit * logp).sum() / N + (case.share * value).sum()
    return loss, logp, value, entropy, teacher_logp
