"""Optimizers and schedules: torch's own, and what joins two of them.

In: a model and a config. Out: something with `param_groups`, `state`, `step` and `zero_grad`.
"""

import math
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from tinyr2.core.config import Config


class OptimConfig(Config):
    """AdamW, or Muon for the matrices with AdamW for the rest; names are TRL's and transformers'."""

    optim: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = Field(1e-4, gt=0)
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "linear"
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.95, ge=0, lt=1)
    max_grad_norm: float = Field(1.0, gt=0)
    optim_offload: bool = False  # states and float32 master weights on the CPU, the model on its accelerator


class Joint:
    """Two or more optimizers that act as one: their groups and states side by side."""

    def __init__(self, parts: list[torch.optim.Optimizer]):
        self.parts = parts
        self.state = _JointState(parts)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """All groups, in the order of the parts."""
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        """One step of each part."""
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for part in self.parts:
            part.zero_grad()


class _JointState(MutableMapping):
    """Parameter → slots, each kept by the part that owns the parameter."""

    def __init__(self, parts: list[torch.optim.Optimizer]):
        self._parts = parts
        self._owner = {id(p): part for part in parts for group in part.param_groups for p in group["params"]}

    def __getitem__(self, param: Tensor) -> dict:
        return self._owner[id(param)].state[param]

    def __setitem__(self, param: Tensor, slots: dict) -> None:
        self._owner[id(param)].state[param] = slots

    def __delitem__(self, param: Tensor) -> None:
        del self._owner[id(param)].state[param]

    def __iter__(self) -> Iterator[Tensor]:
        return (param for part in self._parts for param in part.state)

    def __contains__(self, param: object) -> bool:
        return param in self._owner[id(param)].state

    def __len__(self) -> int:
        return sum(len(part.state) for part in self._parts)


Optimizer = torch.optim.Optimizer | Joint


class Offloaded:
    """An optimizer that lives on another device than the model: its slots, and float32 master weights.

    A step brings the gradients there, moves the masters, and copies them back in the model's dtype. The masters are
    read from the model once, at the first step; from then on they are slots of their parameters, named `master`.
    """

    def __init__(self, params: Sequence[Tensor], build: Callable[[list[Tensor]], Optimizer], device: torch.device):
        """params: the model's    build: from tensors in the order of `params`, the optimizer that steps them"""
        self._masters = {p: torch.empty_like(p, dtype=torch.float32, device=device, requires_grad=False)
                         for p in params}
        self._inner = build(list(self._masters.values()))
        owner = {id(master): p for p, master in self._masters.items()}
        self.param_groups = [group | {"params": [owner[id(m)] for m in group["params"]]}
                             for group in self._inner.param_groups]
        self.state = _OffloadedState(self._masters, self._inner)

    @torch.no_grad()
    def step(self) -> None:
        """One step of the masters, and the model follows."""
        for group, mine in zip(self._inner.param_groups, self.param_groups, strict=True):
            group.update({name: value for name, value in mine.items() if name != "params"})
        moved = {p: master for p, master in self._masters.items() if p.grad is not None}
        for p, master in moved.items():
            if master not in self._inner.state:
                master.copy_(p)
            master.grad = p.grad.to(master)
        self._inner.step()
        for p, master in moved.items():
            p.copy_(master)
            master.grad = None

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for p in self._masters:
            p.grad = None


class _OffloadedState(MutableMapping):
    """Parameter → slots, its master weight one of them."""

    def __init__(self, masters: dict[Tensor, Tensor], inner: Optimizer):
        self._masters, self._inner = masters, inner

    def __getitem__(self, param: Tensor) -> dict:
        if param not in self:
            raise KeyError(param)
        master = self._masters[param]
        return {"master": master, **self._inner.state[master]}

    def __setitem__(self, param: Tensor, slots: dict) -> None:
        self._masters[param].copy_(slots["master"])
        self._inner.state[self._masters[param]] = {name: slot for name, slot in slots.items() if name != "master"}

    def __delitem__(self, param: Tensor) -> None:
        del self._inner.state[self._masters[param]]

    def __iter__(self) -> Iterator[Tensor]:
        return (param for param in self._masters if param in self)

    def __contains__(self, param: object) -> bool:
        return self._masters[param] in self._inner.state

    def __len__(self) -> int:
        return len(self._inner.state)


def make_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer | Offloaded:
    """Over the parameters that require gradients. Norms, biases, embeddings and heads are not decayed."""
    ends = {id(p) for m in (model.get_input_embeddings(), model.get_output_embeddings(), getattr(model, "score", None))
            if m is not None for p in m.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim == 2 and id(p) not in ends]
    others = [p for p in trained if p.ndim != 2 or id(p) in ends]
    if not config.optim_offload:
        return _optimizer(matrices, others, config)
    n = len(matrices)
    return Offloaded([*matrices, *others], lambda held: _optimizer(held[:n], held[n:], config), torch.device("cpu"))


def _optimizer(matrices: list[Tensor], others: list[Tensor], config: OptimConfig) -> Optimizer:
    if config.optim == "adamw":
        return _adamw([{"params": matrices, "weight_decay": config.weight_decay},
                       {"params": others, "weight_decay": 0.0}], config)
    parts: list[torch.optim.Optimizer] = []
    if matrices:
        # this scaling makes one learning rate serve both parts (Liu et al. 2025, "Muon is scalable", eq. 4)
        parts.append(torch.optim.Muon(matrices, lr=config.learning_rate, weight_decay=config.weight_decay,
                                      adjust_lr_fn="match_rms_adamw"))
    if others:
        parts.append(_adamw([{"params": others, "weight_decay": 0.0}], config))
    return Joint(parts)


def _adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.AdamW:
    """In one pass over memory, and without a temporary copy of the weights."""
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=config.learning_rate,
                                  betas=(config.adam_beta1, config.adam_beta2), fused=True)
    # the fused kernel leaves the version counters alone, and by these a decode copy knows that it is stale
    optimizer.register_step_post_hook(lambda done, *_: torch.autograd.graph.increment_version(
        p for group in done.param_groups for p in group["params"] if p.grad is not None))
    return optimizer


def clip(params: Sequence[Tensor], max_norm: float) -> float:
    """Scale the gradients so that their joint 2-norm is at most `max_norm`; returns the norm they had.

    Pascanu et al. 2013, algorithm 1. Gradients that are short enough are read, not written.
    """
    norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
    if float(max_norm / (norm + 1e-6)) < 1.0:  # the factor that is multiplied with
        torch.nn.utils.clip_grads_with_norm_(params, max_norm, norm)
    return float(norm)


def learning_rate(config: OptimConfig, step: int, max_steps: int) -> float:
    """The rate of optimizer step `step` (0-based): linear warm-up, then the schedule down to 0 at `max_steps`."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    left = 1 - (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps)
    factor = {"constant": 1.0, "linear": left, "cosine": 0.5 * (1 - math.cos(math.pi * left))}
    return config.learning_rate * factor[config.lr_scheduler_type]
