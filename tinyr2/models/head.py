"""From hidden states to a loss, without ever holding the logits of all tokens.

In: hidden states (N, D) that predict N target tokens, the output head, and an objective over 1-D tensors. Out: the
loss, whose gradients with respect to hidden states and head are known before `backward` asks, and detached per-token
streams. Tokens go through in chunks; a chunk's logits turn into their own gradient in place and are never made twice.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tinyr2.core.errors import ConfigError
from tinyr2.models.logits import Head, Side, head_of, logits_of, prepare, product
from tinyr2.objectives.divergence import Divergence, measure

__all__ = ["Head", "HeadResult", "Objective", "TokenScores", "head_of", "logits_of", "run"]

# Elements that one CPU thread walks over at a time: what a block needs stays in the caches.
CACHED_ELEMENTS = 2**18


@dataclass(frozen=True, kw_only=True)
class TokenScores:
    """What an objective sees of n learned tokens, all at the temperature of the run."""

    learner_logp: Tensor  # (n,) nats, of the targets; requires grad while something is learned
    divergence: Tensor | None  # (n,) nats; requires grad likewise; None where none was asked for
    entropy: Tensor  # (n,) nats, detached
    teacher_logp: Tensor | None  # (n,) nats, of the targets, detached; None without a teacher
    part: slice  # which of the N tokens these are


@dataclass(frozen=True, kw_only=True)
class HeadResult:
    """The loss, and what was seen on the way to it: every stream (N,), detached, float32 (or float64, as given)."""

    loss: Tensor  # scalar; carries the gradient
    learner_logp: Tensor
    entropy: Tensor
    divergence: Tensor | None
    teacher_logp: Tensor | None


Objective = Callable[[TokenScores], Tensor]


def run(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    objective: Objective,
    *,
    temperature: float = 1.0,
    divergence: Divergence | None = None,
    teacher_hidden: Tensor | None = None,
    teacher_head: Head | None = None,
    chunk_elements: int = 2**23,
) -> HeadResult:
    """The objective summed over the N tokens, with its gradient to `hidden` and `head`.

    hidden (N, D) and targets (N,) int64: hidden[i] is the state that predicts targets[i]
    objective      called with a few of the tokens at a time, returns the scalar sum over them (divided by whatever is
                   counted over the step); its gradient is taken with respect to learner_logp and divergence alone
    temperature    divides the logits of student and teacher
    divergence     needs the teacher; the teacher alone gives teacher_logp
    teacher_hidden (N, D_teacher), teacher_head over the same V tokens; nothing of the teacher's gets a gradient
    chunk_elements logits that are held at once, per model; at least one token's

    float32 and float64 are computed as they are, half precision in float32; bfloat16 on CUDA (or under its autocast)
    multiplies in bfloat16 and accumulates in float32. `backward` runs once: it scales the stored gradients in place.
    N = 0 gives loss 0 and gradients of zeros. ConfigError where the two vocabularies differ in size.
    """
    assert temperature > 0 and chunk_elements > 0, f"temperature {temperature}, chunk_elements {chunk_elements}"
    assert (teacher_hidden is None) == (teacher_head is None), "a teacher is hidden states and a head"
    assert divergence is None or teacher_hidden is not None, "a divergence needs a teacher"
    inputs = (hidden, head.weight, head.bias)
    learns = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs)
    if teacher_head is not None and len(teacher_head.weight) != len(head.weight):
        raise ConfigError(f"the student's head has {len(head.weight)} tokens, the teacher's "
                          f"{len(teacher_head.weight)}; read both with head_of(model, vocab=the tokenizer's size)")
    rows = max(1, chunk_elements // len(head.weight))
    student = prepare(hidden, head, temperature, rows)
    teacher = None if teacher_head is None else prepare(teacher_hidden, teacher_head, temperature, rows)
    with torch.no_grad():
        result, grads = _sweep(_Job(student, teacher, targets, objective, divergence, learns))
    if not any(learns):
        return result
    return replace(result, loss=_KnownGradient.apply(result.loss, grads, *inputs))


@dataclass(frozen=True)
class _Job:
    student: Side
    teacher: Side | None
    targets: Tensor
    objective: Objective
    divergence: Divergence | None
    learns: tuple[bool, ...]  # whether hidden, weight, bias want a gradient


def _sweep(job: _Job) -> tuple[HeadResult, list[Tensor | None]]:
    side, space = job.student, job.student.space
    count, vocab = len(side.hidden), len(side.weight)
    result = HeadResult(
        loss=space.new_zeros(()), learner_logp=space.new_empty(count), entropy=space.new_empty(count),
        divergence=None if job.divergence is None else space.new_empty(count),
        teacher_logp=None if job.teacher is None else space.new_empty(count))
    shapes = (side.hidden.shape, side.weight.shape, (vocab,))
    grads = [space.new_zeros(shape) if wanted else None for shape, wanted in zip(shapes, job.learns, strict=True)]
    threads = torch.get_num_threads()
    cached = max(threads, threads * CACHED_ELEMENTS // vocab) if space.device.type == "cpu" else len(space)
    for part in _parts(0, count, len(space)):
        logits = side.logits(part)
        teacher_logits = None if job.teacher is None else job.teacher.logits(part)
        for rows in _parts(part.start, part.stop, cached):
            here = slice(rows.start - part.start, rows.stop - part.start)
            block = None if teacher_logits is None else teacher_logits[here]
            result.loss.add_(_block(job, rows, logits[here], block, result))
        if any(job.learns):
            _accumulate(grads, side, part, logits)
    return result, grads


def _parts(start: int, stop: int, size: int) -> Iterator[slice]:
    return (slice(i, min(i + size, stop)) for i in range(start, stop, max(1, size)))


def _block(job: _Job, rows: slice, logits: Tensor, teacher_logits: Tensor | None, streams: HeadResult) -> Tensor:
    """The loss of a few tokens; fills their streams and leaves d(loss)/d(raw logits) in `logits`."""
    learns, target = any(job.learns), job.targets[rows, None]
    tempered = job.student.temper(logits)
    slope = job.student.slope(tempered) if learns else None
    logp = torch.log_softmax(tempered, dim=-1)
    prob = torch.exp(logp, out=logits)
    learner_logp, entropy = logp.gather(1, target)[:, 0], (prob * logp).sum(-1).neg_()
    value = pull = teacher_logp = None
    if job.teacher is not None:
        teacher = torch.log_softmax(job.teacher.temper(teacher_logits), dim=-1)
        teacher_logp = teacher.gather(1, target)[:, 0]
        if job.divergence is not None:
            value, pull = measure(
                job.divergence, logp, teacher, student_prob=prob, gradient=learns, overwrite=True)
    scores = TokenScores(
        learner_logp=learner_logp, divergence=value, entropy=entropy, teacher_logp=teacher_logp, part=rows)
    _note(scores, streams)
    if not learns:
        return job.objective(scores)
    loss, by_logp, by_divergence = _ask(job.objective, scores, job.student.gain)
    _differentiate(prob, target, by_logp, pull, by_divergence)
    if slope is not None:
        logits.mul_(slope)
    return loss


def _note(scores: TokenScores, streams: HeadResult) -> None:
    for name in ("learner_logp", "divergence", "entropy", "teacher_logp"):
        if (stream := getattr(scores, name)) is not None:
            getattr(streams, name)[scores.part] = stream


def _ask(objective: Objective, scores: TokenScores, gain: float) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The objective's value; `gain` times its gradients (n,) by learner_logp and divergence, None where unused."""
    leaves = [scores.learner_logp] + ([] if scores.divergence is None else [scores.divergence])
    with torch.enable_grad():
        for leaf in leaves:
            leaf.requires_grad_()
        loss = objective(scores)
        assert loss.ndim == 0, f"an objective returns a scalar, not {tuple(loss.shape)}"
        by = torch.full_like(loss, gain)
        grads = torch.autograd.grad(loss, leaves, by, allow_unused=True) if loss.requires_grad else ()
    by_logp, by_divergence, *_ = (*grads, None, None)
    return loss.detach(), by_logp, by_divergence


def _differentiate(
    prob: Tensor, target: Tensor, by_logp: Tensor | None, pull: Tensor | None, by_divergence: Tensor | None
) -> None:
    """Turns `prob` (n, V) into by_logp * (onehot(target) - prob) + by_divergence * pull, in its own memory."""
    if by_logp is None and by_divergence is None:
        prob.zero_()
    elif by_logp is None:
        torch.mul(pull, by_divergence[:, None], out=prob)
    else:
        prob.mul_(-by_logp[:, None])
        if by_divergence is not None:
            prob.addcmul_(pull, by_divergence[:, None])
        prob.scatter_(1, target, prob.gather(1, target) + by_logp[:, None])


def _accumulate(grads: list[Tensor | None], side: Side, part: slice, by_logits: Tensor) -> None:
    """Adds a chunk's share, by_logits (n, V), to the gradients of hidden states, weight and bias."""
    hidden, weight, bias = grads
    pull = by_logits.to(side.weight.dtype)
    if hidden is not None:
        product(pull, side.weight, hidden[part])
    if weight is not None:
        product(pull.t(), side.hidden[part], weight, add=True)
    if bias is not None:
        bias.add_(by_logits.sum(0))


class _KnownGradient(torch.autograd.Function):
    """A loss whose gradients have been computed already; `backward` scales them."""

    @staticmethod
    def forward(ctx, loss: Tensor, grads: list[Tensor | None], *inputs: Tensor | None) -> Tensor:
        ctx.grads, ctx.dtypes = grads, [None if x is None else x.dtype for x in inputs]
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, by_loss: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.grads is not None, "the gradients are scaled in place, so backward runs once"
        grads, ctx.grads = ctx.grads, None
        scaled = (g if g is None else g.mul_(by_loss).to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True))
        return None, None, *scaled
