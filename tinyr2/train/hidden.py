"""Hidden-state distillation: what the student's layers put out is drawn to what a teacher's layers put out.

In: a batch, a student, a frozen teacher, a map from layers to layers. Out: one more term of the loss, with its gradient
on the student and on the projections that bridge two widths. The projections are trained and saved with the student,
and are no part of the model that a run gives back. After Romero et al. 2015 (1412.6550) and Jiao et al. 2020
(1909.10351).
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from tinyr2.core.config import Config
from tinyr2.core.errors import ConfigError
from tinyr2.core.rng import derive
from tinyr2.core.types import Batch
from tinyr2.models.packed import layer_states
from tinyr2.objectives.distillation import hidden_gap
from tinyr2.train.optim import Joint, Offloaded, OptimConfig, Optimizer, make_optimizer

LayerMap = Mapping[int, int]  # student's layer → teacher's layer, both counted from 0


class HiddenConfig(Config):
    """Which layers are compared, and how."""

    # student's layer: teacher's layer, counted from 0; uniform: every layer of the student, spread over the teacher's
    layers: dict[int, int] | Literal["uniform", "last"] = "uniform"
    weight: float = Field(1.0, gt=0)  # of the mean over tokens and layers, beside the other terms of the loss
    distance: Literal["mse", "cosine"] = "mse"
    normalize: bool = True  # states are scaled to a root mean square of 1 first: their sizes differ from layer to layer
    project: Literal["needed", "always"] = "needed"  # needed: no projection where both widths are equal
    learning_rate_factor: float = Field(1.0, gt=0)  # of the projections, times train.learning_rate

    @field_validator("layers")
    @classmethod
    def _some(cls, layers: dict[int, int] | str) -> dict[int, int] | str:
        if layers == {}:
            raise ValueError("no layer is named; write {student's layer: teacher's layer}, uniform or last")
        return layers


def layer_map(layers: dict[int, int] | Literal["uniform", "last"], student: int, teacher: int) -> dict[int, int]:
    """The map that `layers` means for models of so many layers; ConfigError for a layer that is not there.

    uniform: layer i of S goes with layer ceil((i + 1) T / S) - 1 of T, so that last goes with last (the uniform
    strategy of Jiao et al. 2020, Section 3.1, for any two depths).
    """
    if layers == "uniform":
        return {i: -(-(i + 1) * teacher // student) - 1 for i in range(student)}
    if layers == "last":
        return {student - 1: teacher - 1}
    for mine, theirs in layers.items():
        for side, layer, size in (("student", mine, student), ("teacher", theirs, teacher)):
            if not 0 <= layer < size:
                raise ConfigError(f"hidden.layers: {mine}: {theirs}: the {side} has no layer {layer}; its layers are 0 "
                                  f"to {size - 1}")
    return dict(sorted(layers.items()))


class Projections(nn.Module):
    """For each mapped layer of the student, what brings its states to the teacher's width."""

    def __init__(self, layers: LayerMap, student: int, teacher: int, seed: int, *, always: bool = False):
        """student, teacher: widths    always: a projection also where they are equal"""
        super().__init__()
        wanted = always or student != teacher
        self.by_layer = nn.ModuleDict({str(i): _linear(student, teacher, derive(seed, "hidden", i)) if wanted
                                       else nn.Identity() for i in layers})

    def forward(self, layer: int, states: Tensor) -> Tensor:
        """states (N, D_student) of the student's `layer` → (N, D_teacher)."""
        bridge = self.by_layer[str(layer)]
        return bridge(states if isinstance(bridge, nn.Identity) else states.to(bridge.weight.dtype))

    def get_input_embeddings(self) -> None:
        """None: there are none."""

    def get_output_embeddings(self) -> None:
        """None: there are none."""


class Apprentice(nn.Module):
    """What a run trains and its checkpoints hold: the student, and the projections beside it."""

    def __init__(self, student: nn.Module, projections: Projections):
        super().__init__()
        self.student, self.projections = student, projections


def optimizer_of(apprentice: Apprentice, config: OptimConfig, hidden: HiddenConfig) -> Optimizer | Offloaded | Joint:
    """One optimizer for both; the projections are clipped apart and have a rate of their own."""
    student = make_optimizer(apprentice.student, config)
    if not list(apprentice.projections.parameters()):
        return student
    beside = make_optimizer(apprentice.projections, config)
    for group in beside.param_groups:
        group |= {"part": "projections", "rate_factor": hidden.learning_rate_factor}
    return Joint([student, beside])


@dataclass(frozen=True, kw_only=True)
class HiddenTerm:
    """The term of the loss. A step reads both models where their states are needed anyway, and then asks for it.

    states, ours = term.read(student, batch)
    loss = term.loss(ours, term.consult(batch), denom=tokens)
    """

    config: HiddenConfig
    layers: LayerMap
    teacher: nn.Module  # frozen
    projections: Projections

    def read(self, student: nn.Module, batch: Batch, *,
             gradient_checkpointing: bool = False) -> tuple[Tensor, dict[int, Tensor]]:
        """The student's last states, and by layer those of its mapped layers, each (N, D_student), with gradient.

        All are states that predict the learned tokens.
        """
        return _read(student, batch, self.layers.keys(), gradient_checkpointing)

    @torch.no_grad()
    def consult(self, batch: Batch) -> dict[int, Tensor]:
        """By layer the states (N, D_teacher) of the teacher's mapped layers; it reads the batch's own tokens."""
        return _read(self.teacher, batch, set(self.layers.values()))[1]

    def loss(self, ours: Mapping[int, Tensor], theirs: Mapping[int, Tensor], *, denom: int) -> Tensor:
        """weight · the mean over layers of the sum of distances over tokens, by `denom`: a scalar with its gradient.

        ours: student's layer → (N, D_student)   theirs: teacher's layer → (N, D_teacher)   denom: tokens of the step
        Of states scaled to a root mean square of 1 the mean squared error is |u - v|² of unit vectors u and v (Sun et
        al. 2019, 1908.09355, eq. 7); without scaling it is eq. 9 of Jiao et al. 2020.
        """
        return self.config.weight * sum(
            self.gaps(layer, ours[layer], theirs[goal]).sum() for layer, goal in self.layers.items()
        ) / (len(self.layers) * denom)

    def gaps(self, layer: int, ours: Tensor, theirs: Tensor) -> Tensor:
        """(N,) the distance of each token's states at one of the student's layers, after its projection."""
        pair = (self.projections(layer, ours), theirs.detach())
        return hidden_gap(*(map(_unit, pair) if self.config.normalize else pair), self.config.distance)


def hire_layers(student: nn.Module, teacher: nn.Module, config: HiddenConfig, seed: int) -> HiddenTerm:
    """Freeze the teacher, and make the projections, on the student's device; ConfigError for layers not there."""
    mine, theirs = (model.config.get_text_config() for model in (student, teacher))
    layers = layer_map(config.layers, mine.num_hidden_layers, theirs.num_hidden_layers)
    projections = Projections(layers, mine.hidden_size, theirs.hidden_size, seed, always=config.project == "always")
    teacher.requires_grad_(False)
    return HiddenTerm(config=config, layers=layers, teacher=teacher.eval(),
                      projections=projections.to(next(student.parameters()).device))


def _read(model: nn.Module, batch: Batch, layers: Collection[int],
          gradient_checkpointing: bool = False) -> tuple[Tensor, dict[int, Tensor]]:
    last, inner = layer_states(model, batch.tokens, batch.position, batch.lengths, layers,
                               gradient_checkpointing=gradient_checkpointing)
    before = batch.learn - 1
    return last[before], {i: x[before] for i, x in inner.items()}


def _linear(student: int, teacher: int, seed: int) -> nn.Linear:
    """A projection that keeps the size of what it is given, on average."""
    layer = nn.utils.skip_init(nn.Linear, student, teacher, bias=False)
    nn.init.normal_(layer.weight, std=student ** -0.5, generator=torch.Generator().manual_seed(seed))
    return layer


def _unit(states: Tensor) -> Tensor:
    """states (N, D) scaled to a root mean square of 1, in float32 or wider."""
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    return nn.functional.rms_norm(wide, wide.shape[-1:])
