"""A teacher in this process, with the student's tokenizer.

In: a batch. Out: the batch with the teacher's hidden states at the learned tokens. With the teacher's head they are its
full distribution, kept without ever writing a (tokens × vocabulary) matrix.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn

from tinyr2.core.types import Batch
from tinyr2.models.head import Head, head_of
from tinyr2.models.packed import hidden_states


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
def consult(teacher: Teacher, batch: Batch) -> Batch:
    """Add `teacher_hidden` (N, D_teacher): the states that predict the learned tokens."""
    hidden = hidden_states(teacher.model, batch.tokens, batch.position, batch.lengths)
    return replace(batch, teacher_hidden=hidden[batch.learn - 1])
