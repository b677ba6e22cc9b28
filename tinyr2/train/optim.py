"""Optimizers and schedules: torch's own, and what joins two of them.

In: a model and a config. Out: something with `param_groups`, `state`, `step` and `zero_grad`.
"""

import math
from collections.abc import Iterator, MutableMapping
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

    def __len__(self) -> int:
        return sum(len(part.state) for part in self._parts)


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer | Joint:
    """Over the parameters that require gradients. Norms, biases and embeddings are not decayed."""
    ends = {id(p) for m in (model.get_input_embeddings(), model.get_output_embeddings()) for p in m.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim == 2 and id(p) not in ends]
    others = [p for p in trained if p.ndim != 2 or id(p) in ends]
    betas = (config.adam_beta1, config.adam_beta2)
    if config.optim == "adamw":
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.learning_rate, betas=betas)
    parts: list[torch.optim.Optimizer] = []
    if matrices:
        # this scaling makes one learning rate serve both parts (Liu et al. 2025, "Muon is scalable", eq. 4)
        parts.append(torch.optim.Muon(matrices, lr=config.learning_rate, weight_decay=config.weight_decay,
                                      adjust_lr_fn="match_rms_adamw"))
    if others:
        parts.append(torch.optim.AdamW(others, lr=config.learning_rate, betas=betas, weight_decay=0.0))
    return Joint(parts)


def learning_rate(config: OptimConfig, step: int, max_steps: int) -> float:
    """The rate of optimizer step `step` (0-based): linear warm-up, then the schedule down to 0 at `max_steps`."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    left = 1 - (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps)
    factor = {"constant": 1.0, "linear": left, "cosine": 0.5 * (1 - math.cos(math.pi * left))}
    return config.learning_rate * factor[config.lr_scheduler_type]
