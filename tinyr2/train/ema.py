"""A self-teacher whose weights follow the student's slowly: their exponential moving average.

In: the student, and a decay. Out: a frozen model of the same class, moved once per optimizer step. Its moving weights
are buffers of the `Ema`, so a checkpoint of a module that holds student and `Ema` has both.
"""

import copy

import torch
from torch import nn


class Ema(nn.Module):
    """A copy of `student` that moves by shadow ← decay · shadow + (1 − decay) · student at each `update`.

    decay 1 is the model as it began, forever, and adds nothing to a checkpoint; at 0 the student itself would be the
    same for nothing, so the caller takes that one. Only what the student trains is copied and averaged: of a student
    with adapters these are the adapters' factors, and the frozen base is shared. The average is kept in float32 at
    least, since in bfloat16 a decay of 0.99 would round most moves away. Make it when the student is on its device, and
    before a checkpoint is restored into it.
    """

    def __init__(self, student: nn.Module, decay: float):
        super().__init__()
        assert 0 < decay <= 1, f"decay {decay}: at 0 the student is its own teacher, without a copy"
        self.decay = decay
        frozen = {id(p): p for p in student.parameters() if not p.requires_grad}
        shadow = copy.deepcopy(student, memo=frozen).eval()
        moving = [(name, p) for name, p in shadow.named_parameters() if p.requires_grad]
        for name, p in moving:
            p.grad = None
            p.data = p.data.to(torch.promote_types(p.dtype, torch.float32))
            # the parameter's own memory, so that a checkpoint that is restored into the buffer is in the model
            self.register_buffer(_key(name), p.detach(), persistent=decay < 1)
        saved = shadow.state_dict()
        self._beside = [name for name, _ in shadow.named_buffers() if name in saved]
        for name in self._beside:
            self.register_buffer(_key(name), shadow.get_buffer(name), persistent=decay < 1)
        self._names = [name for name, _ in moving]
        object.__setattr__(self, "_shadow", shadow.requires_grad_(False))  # no submodule: nobody trains or counts it

    @property
    def model(self) -> nn.Module:
        """The teacher: frozen, without dropout, of the student's class."""
        return self._shadow

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """Move towards `student`, once per optimizer step; its buffers (an expert's bias) are taken as they are."""
        if self.decay == 1:
            return
        trained, beside = dict(student.named_parameters()), dict(student.named_buffers())
        for name in self._names:
            shadow = self.get_buffer(_key(name))
            shadow.mul_(self.decay).add_(trained[name].to(shadow.dtype), alpha=1 - self.decay)
        for name in self._beside:
            self.get_buffer(_key(name)).copy_(beside[name])


def _key(name: str) -> str:
    return name.replace(".", "/")  # a buffer's name has no dots
