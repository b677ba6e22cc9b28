"""The output head: hidden states become logits.

In: a Hugging Face causal LM. Out: its head as a value, the logits of a few states, and the precision that the head's
products run in, for the decoder, the learner and the teacher alike.
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


def precision(hidden: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """What the head's products read, and what they give: half precision is read as it is on CUDA alone.

    Asks whether autocast is on; float64 stays float64, everything else gives float32.
    """
    kind = hidden.device.type
    work = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    seen = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    return torch.bfloat16 if kind == "cuda" and seen == torch.bfloat16 else work, work


@torch.no_grad()
def logits_of(hidden: Tensor, head: Head) -> Tensor:
    """Logits (n, V) of a few states (n, D), as the model means them: what a decoder draws from."""
    seen, work = precision(hidden)
    logits = torch.empty(len(hidden), len(head.weight), dtype=work, device=hidden.device)
    wide = {} if seen == work else {"out_dtype": work}  # an argument that CUDA alone takes
    torch.mm(hidden.to(seen), head.weight.to(seen).t(), out=logits, **wide)  # autocast leaves an `out` alone
    if head.bias is not None:
        logits.add_(head.bias.to(work))
    return bend(logits, head.scale, head.softcap)


def bend(raw: Tensor, scale: float, softcap: float | None) -> Tensor:
    """What `Head` does to W h + b, in place: scale and softcap."""
    if scale != 1.0:
        raw.mul_(scale)
    return raw if softcap is None else raw.div_(softcap).tanh_().mul_(softcap)
