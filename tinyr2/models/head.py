"""From hidden states to a loss, without ever holding the logits of all tokens.

In: hidden states (N, D) that predict N target tokens, the output head, and an objective over 1-D tensors. Out: the
loss, whose gradients with respect to hidden states and head are known before `backward` asks, and detached per-token
streams. Tokens go through in chunks; a chunk's logits turn into their own gradient in place, and none is made twice.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tinyr2.core.errors import ConfigError
from tinyr2.models.blend import Blend, prepare_blend
from tinyr2.models.logits import Head, head_of, logits_of
from tinyr2.models.pairs import Pairs, arrange
from tinyr2.models.side import parts, prepare
from tinyr2.models.sweep import Chunk, Job, TokenScores
from tinyr2.models.topk import TopK
from tinyr2.objectives.divergence import Divergence

__all__ = ["Blend", "Head", "HeadResult", "Objective", "Pairs", "TokenScores", "TopK", "head_of", "logits_of", "run",
           "score_tokens"]


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
    teacher_blend: Blend | None = None,
    teacher_pairs: Pairs | None = None,
    teacher_topk: TopK | None = None,
    chunk_elements: int = 5 * 2**22,
) -> HeadResult:
    """The objective summed over the N tokens, with its gradient to `hidden` and `head`.

    hidden (N, D) and targets (N,) int64: hidden[i] is the state that predicts targets[i]
    objective      called with a few of the tokens at a time, returns the scalar sum over them (divided by whatever is
                   counted over the step); its gradient is taken with respect to learner_logp and divergence alone
    temperature    divides the logits of student and teacher
    divergence     needs the teacher; the teacher alone gives teacher_logp
    teacher_hidden (N, D_teacher), teacher_head over the same V tokens; nothing of the teacher's gets a gradient
    teacher_blend  instead of these two: several teachers of one vocabulary, averaged or multiplied
    teacher_pairs  with either: the teacher's vocabulary is another one, of which these tokens are shared. The
                   divergence is over the shared tokens and one bucket for all others; teacher_logp, over the teacher's
                   whole vocabulary, is that of the target's partner, NaN where it has none
    teacher_topk   instead of all these: the teacher's k likeliest per token, at this temperature already. The
                   divergence is over k + 1 buckets, or the corrected KL over the k; teacher_logp is NaN where the
                   target is not among the k
    chunk_elements logits that are held at once, per model; at least one token's

    float32 and float64 are computed as they are, half precision in float32; bfloat16 on CUDA (or under its autocast)
    multiplies in bfloat16 and accumulates in float32. `backward` runs once: it scales the stored gradients in place.
    N = 0 gives loss 0 and gradients of zeros. ConfigError where the two vocabularies differ in size and no pairs say
    what they share, or a blend's weights are no weights; DataError where the pairs are not one to one, or the k are not
    distinct tokens of the vocabulary with their log-probs.
    """
    assert temperature > 0 and chunk_elements > 0, f"temperature {temperature}, chunk_elements {chunk_elements}"
    assert (teacher_hidden is None) == (teacher_head is None), "a teacher is hidden states and a head"
    if teacher_head is not None:
        assert teacher_blend is None, "a teacher is one model or a blend"
        teacher_blend = Blend((teacher_hidden,), (teacher_head,), (1.0,))
    assert teacher_blend is None or teacher_topk is None, "a teacher is given whole or by its top k"
    assert teacher_blend is not None or teacher_pairs is None, "pairs need a whole teacher"
    assert divergence is None or teacher_blend or teacher_topk, "a divergence needs a teacher"
    inputs = (hidden, head.weight, head.bias)
    learns = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs)
    _check(len(hidden), len(head.weight), teacher_blend, teacher_topk, teacher_pairs, divergence)
    job = Job(
        student=prepare(hidden, head, temperature),
        teacher=None if teacher_blend is None else prepare_blend(teacher_blend, temperature),
        shared=None if teacher_pairs is None else arrange(
            teacher_pairs, len(head.weight), teacher_blend.vocab, hidden.device),
        topk=teacher_topk, targets=targets, divergence=divergence, learns=learns)
    # the precision has been chosen: autocast would lower it
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        result, grads = _sweep(job, objective, chunk_elements)
    if not any(learns):
        return result
    return replace(result, loss=_KnownGradient.apply(result.loss, grads, *inputs))


def _check(count: int, vocab: int, blend: Blend | None, topk: TopK | None, pairs: Pairs | None,
           divergence: Divergence | None) -> None:
    if blend is not None:
        blend.check(count)
        if pairs is None and blend.vocab != vocab:
            raise ConfigError(f"the student's head has {vocab} tokens, the teacher's {blend.vocab}; read both with "
                              "head_of(model, vocab=the tokenizer's size), or give the pairs of tokens that they share")
    if topk is not None:
        topk.check(count, vocab)
        if divergence is not None:
            topk.check_divergence(divergence)


@torch.no_grad()
def score_tokens(hidden: Tensor, head: Head, targets: Tensor, *, temperature: float = 1.0) -> HeadResult:
    """`run` without a loss: the log-probs of the N targets, and the entropies at their places."""
    return run(hidden.detach(), head, targets, lambda s: s.learner_logp.new_zeros(()), temperature=temperature)


def _sweep(job: Job, objective: Objective, chunk_elements: int) -> tuple[HeadResult, list[Tensor | None]]:
    side = job.student
    count, vocab = len(side.hidden), len(side.weight)
    space = side.hidden.new_empty(0, dtype=side.work)
    taught = job.teacher is not None or job.topk is not None
    result = HeadResult(
        loss=space.new_zeros(()), learner_logp=space.new_empty(count), entropy=space.new_empty(count),
        divergence=None if job.divergence is None else space.new_empty(count),
        teacher_logp=space.new_empty(count) if taught else None)
    shapes = (side.hidden.shape, side.weight.shape, (vocab,))
    grads = [space.new_zeros(shape) if wanted else None for shape, wanted in zip(shapes, job.learns, strict=True)]
    rows = min(count, job.rows(chunk_elements))
    memory = job.space(rows)
    for part in parts(0, count, max(1, rows)):
        chunk = Chunk(job, part, memory)
        scores = chunk.score()
        _note(scores, result)
        if any(job.learns):
            loss, by_logp, by_divergence = _ask(objective, scores, side.gain)
            chunk.differentiate(by_logp, by_divergence, grads)
        else:
            loss = objective(scores)
        result.loss.add_(loss)
    return result, grads


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
