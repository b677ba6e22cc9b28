"""A teacher in this process, with the student's tokenizer and the student's prompt.

In: a batch. Out: the teacher's hidden states at the learned tokens. With the teacher's head they are its full
distribution, kept without ever writing a (tokens × vocabulary) matrix.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tinyr2.core.types import Batch, Rollout
from tinyr2.models.head import Head, head_of
from tinyr2.models.packed import hidden_states
from tinyr2.teachers.opinion import Judge, Opinion, Whole


@dataclass(frozen=True)
class Teacher:
    """A frozen model and its head, cropped to the ids that the student shares."""

    model: nn.Module
    head: Head


def hire(model: nn.Module, vocab: int) -> Teacher:
    """Freeze `model` and keep the first `vocab` rows of its head."""
    model.requires_grad_(False)
    return Teacher(model.eval(), head_of(model, vocab))


@torch.no_grad()
def states_of(teacher: Teacher, batch: Batch) -> Tensor:
    """(N, D_teacher): the states that predict the learned tokens."""
    return hidden_states(teacher.model, batch.tokens, batch.position, batch.lengths)[batch.learn - 1]


def judge_of(teacher: Teacher, name: str = "teacher") -> Judge:
    """A judge that says, of every token, the teacher's whole distribution."""

    def judge(rollouts: Sequence[Rollout], batch: Batch, states: Tensor | None) -> list[Opinion]:
        return [Opinion(name=name, whole=Whole(hidden=states_of(teacher, batch), head=teacher.head))]

    return judge
