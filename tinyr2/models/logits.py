"""The output head: hidden states become logits.

In: a Hugging Face causal LM. Out: its head as a value, and the logits of a few states: scaled, softcapped and divided
by a temperature in one place, for the decoder, the learner and the teacher alike.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tinyr2.core.errors import ConfigError


@dataclass(frozen=True)
class Head:
    """What turns a hidden state h into logits: softcap * tanh(scale * (W h + b) / softcap), or scale * (W h + b)."""

    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    scale: float = 1.0
    softcap: float | None = None


def head_of(model: nn.Module, vocab: int | None = None) -> Head:
    """The output head of a Hugging Face causal LM, the factors that its config puts on the logits included.

    vocab: keep the first `vocab` rows, so that two models padded to different sizes speak of the same tokens; the
    gradient still reaches the whole weight. ConfigError where there is no plain linear head, or too few rows.
    """
    linear, name = model.get_output_embeddings(), type(model).__name__
    if linear is None:
        raise ConfigError(f"{name}: no output head; give a causal language model")
    if hasattr(linear, "base_layer"):
        raise ConfigError(f"{name}: an adapter sits on the output head; leave lm_head out of target_modules")
    weight, bias = linear.weight, getattr(linear, "bias", None)
    if not weight.is_floating_point():
        raise ConfigError(f"{name}: the output head is quantized to {weight.dtype}; load the model with dtype bfloat16 "
                          "or float32")
    if vocab is not None and vocab > len(weight):
        raise ConfigError(f"{name}: {vocab} tokens asked of a head with {len(weight)}; vocab is the smaller of the two "
                          "models' vocabularies")
    config = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    if vocab is not None and vocab < len(weight):  # a slice of all rows would copy the whole gradient once more
        weight, bias = weight[:vocab], bias if bias is None else bias[:vocab]
    return Head(weight, bias, _scale_in(config), softcap)


def _scale_in(config) -> float:
    # Names in use among transformers' classes: Cohere, Falcon-H1, Muse; Granite and MiniCPM3 divide by theirs, which
    # HyperCLOVA X, under the same name, multiplies by.
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier", "output_multiplier"):
        factor = getattr(config, name, None)
        scale *= 1.0 if factor is None else factor
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return scale
    return scale * scaling if config.model_type.startswith("hyperclovax") else scale / scaling


@dataclass(frozen=True)
class Side:
    """One model: states and head, detached, in the dtype that products read; space for one chunk's logits."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    space: Tensor  # (rows, V) float32 or float64
    gain: float  # scale / temperature
    bound: float | None  # softcap / temperature

    def logits(self, part: slice) -> Tensor:
        """(n, V) raw logits of a chunk, in `space`: the chunk before is gone."""
        out = self.space[: part.stop - part.start]
        product(self.hidden[part], self.weight.t(), out)
        return out if self.bias is None else out.add_(self.bias)

    def temper(self, raw: Tensor) -> Tensor:
        """Scale, softcap and temperature, in place."""
        if self.gain != 1.0 or self.bound is not None:
            raw.mul_(self.gain if self.bound is None else self.gain / self.bound)
        return raw if self.bound is None else raw.tanh_().mul_(self.bound)

    def slope(self, tempered: Tensor) -> Tensor | None:
        """d(tempered) / d(raw) without the factor `gain`; None where it is 1."""
        return None if self.bound is None else (tempered / self.bound).square_().neg_().add_(1.0)


def prepare(hidden: Tensor, head: Head, temperature: float, rows: int) -> Side:
    """A side for `hidden` (N, D) with space for the logits of `rows` tokens; asks whether autocast is on."""
    kind = hidden.device.type
    work = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    seen = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    product = torch.bfloat16 if kind == "cuda" and seen == torch.bfloat16 else work
    return Side(
        hidden=hidden.detach().to(product),
        weight=head.weight.detach().to(product),
        bias=None if head.bias is None else head.bias.detach().to(work),
        space=torch.empty(min(rows, len(hidden)), len(head.weight), dtype=work, device=hidden.device),
        gain=head.scale / temperature,
        bound=None if head.softcap is None else head.softcap / temperature,
    )


def product(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """out = a @ b, or out += a @ b, in out's dtype: autocast leaves products with an `out` alone."""
    wide = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}  # an argument that CUDA alone takes
    if add:
        torch.addmm(out, a, b, out=out, **wide)
    else:
        torch.mm(a, b, out=out, **wide)


@torch.no_grad()
def logits_of(hidden: Tensor, head: Head) -> Tensor:
    """Logits (n, V) of a few states (n, D), as the model means them: what a decoder draws from."""
    side = prepare(hidden, head, 1.0, len(hidden))
    return side.temper(side.logits(slice(0, len(hidden))))
