"""What recipes do with answers: tell a grader's errors, center rewards, and read the data's own completions."""

import warnings
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from tinyr2.core.errors import DataError
from tinyr2.core.types import Problem, Rollout
from tinyr2.objectives.advantage import leave_one_out
from tinyr2.tokens.chat import render_example


def tell_errors(rollouts: Sequence[Rollout], step: int, *, fatal: bool) -> None:
    """Warn of each error that a grader made; if `fatal`, a DataError where no answer of the step could be graded."""
    errors = list(dict.fromkeys(r.error for r in rollouts if r.error is not None))
    if fatal and errors and all(r.error is not None for r in rollouts):
        raise DataError(f"no answer of step {step} could be graded: {'; '.join(errors)}; mend the reward function")
    for error in errors:  # without the step, so that each is told once
        warnings.warn(f"answers without a grade: {error}", stacklevel=2)


def center(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Each group's leave-one-out advantages, over the answers that one author wrote."""
    groups: dict[tuple[int, str], list[int]] = {}
    for i, r in enumerate(rollouts):
        groups.setdefault((r.group, r.author), []).append(i)
    out = list(rollouts)
    for members in groups.values():
        rewards = [rollouts[i].reward for i in members]
        for i, advantage in zip(members, leave_one_out(rewards), strict=True):
            out[i] = replace(rollouts[i], advantage=advantage)
    return out


def worked(problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase, first_group: int = 0,
           temperature: float = 1.0) -> list[Rollout]:
    """The data's own completions as rollouts."""
    out = []
    for i, p in enumerate(problems):
        prompt, response = render_example(tokenizer, p.messages, p.completion)
        out.append(Rollout(problem=p, group=first_group + i, sample=0, author="dataset", prompt_ids=tuple(prompt),
                           response_ids=tuple(response), temperature=temperature, finish="stop"))
    return out
