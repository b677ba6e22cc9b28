"""Rollouts as a person reads them: texts, rewards, and per token how far the student is from the teacher."""

from transformers import PreTrainedTokenizerBase

from tinyr2.core.types import Problem
from tinyr2.report.completions import Completion
from tinyr2.tokens.chat import decode, token_texts
from tinyr2.train.loop import StepResult

SHOWN = 16  # per recorded step


def completions_of(step: int, result: StepResult, tokenizer: PreTrainedTokenizerBase) -> list[Completion]:
    """The first rollouts of a step; `disagreement` is learner_logp − teacher_logp at each learned token."""
    gaps: dict[int, list[float]] = {}
    scores = result.scores
    if scores is not None and scores.teacher_logp is not None:
        for row, gap in zip(scores.row.tolist(), (scores.learner_logp - scores.teacher_logp).tolist(), strict=True):
            gaps.setdefault(row, []).append(gap)
    # scoring reorders rollouts and passes them on unchanged, so identity finds each one's scores
    rows = {id(r): i for i, r in enumerate(scores.rollouts)} if scores is not None else {}
    shown = []
    for r in result.rollouts[:SHOWN]:
        gap = gaps.get(rows.get(id(r), -1))
        shown.append(Completion(
            step=step, problem_id=r.problem.id, author=r.author, prompt=prompt_text(r.problem),
            completion=decode(tokenizer, r.response_ids), finish=r.finish, reward=r.reward,
            reward_parts=dict(r.reward_parts), answer=r.problem.answer, tokens=token_texts(tokenizer, r.response_ids),
            disagreement=gap if r.learn_mask is None else None, error=r.error))
    return shown


def prompt_text(problem: Problem) -> str:
    """A problem's messages, one after another; the role is named where there are several."""
    if len(problem.messages) == 1:
        return problem.messages[0].content
    return "\n".join(f"{m.role}: {m.content}" for m in problem.messages)
