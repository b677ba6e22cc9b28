"""One layer of a stock dense decoder (Llama, Mistral, Qwen2, Qwen3) over T packed tokens.

In: a stock decoder layer, hidden states (T, D). Out: the next hidden states. The layer's own parameters are read, so
gradients land there. A linear layer or norm that is not a plain one (an adapter, say) is called as it is.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from tinyr2.models import fused
from tinyr2.models.products import linear

NORMS = (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm)
# (query, key, value) (T, H, D each), scaling, dropout, window → (T, H, D)
Attend = Callable[[tuple[Tensor, Tensor, Tensor], float, float, int | None], Tensor]


def fits(x: Tensor) -> bool:
    """Whether hidden states `x` can go through `dense_layer`: no half precision, no autocast."""
    return x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(x.device.type)


def dense_layer(layer: nn.Module, x: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
    """x (T, D), rotary: cosines and sines (T, head_dim) → (T, D): what the stock layer computes."""
    att = layer.self_attn
    q, k, v = _normed(layer.input_layernorm, [att.q_proj, att.k_proj, att.v_proj], x)
    q, k, v = (h.view(len(x), -1, att.head_dim) for h in (q, k, v))
    q, k = _rotated(att, "q_norm", q, rotary), _rotated(att, "k_norm", k, rotary)
    dropout = att.attention_dropout if att.training else 0.0
    x = x + _linear(att.o_proj, attend((q, k, v), att.scaling, dropout, _window(att)).flatten(1))
    return _add_mlp(layer.post_attention_layernorm, layer.mlp, x)


def normalized(norm: nn.Module, x: Tensor) -> Tensor:
    """x (..., D) through an RMSNorm module."""
    if not (fits(x) and _plain(norm)):
        return norm(x)
    return fused.rms_norm(x.flatten(0, -2), norm.weight, norm.variance_epsilon).view(x.shape)


def _add_mlp(norm: nn.Module, mlp: nn.Module, x: Tensor) -> Tensor:
    silu = mlp.config.hidden_act == "silu"
    parts = [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    if silu and not torch.is_grad_enabled() and _plain(norm, *parts):
        return fused.add_mlp_(x, norm.weight, norm.variance_epsilon, *((m.weight, m.bias) for m in parts))
    gate, up = _normed(norm, parts[:2], x)
    if silu and _plain(mlp.down_proj):
        return x + fused.swiglu(gate, up, mlp.down_proj.weight, mlp.down_proj.bias)
    return x + _linear(mlp.down_proj, mlp.act_fn(gate) * up)


def _normed(norm: nn.Module, layers: list[nn.Module], x: Tensor) -> tuple[Tensor, ...]:
    if _plain(norm, *layers):
        return fused.norm_linears(x, norm.weight, norm.variance_epsilon, [(m.weight, m.bias) for m in layers])
    x = normalized(norm, x)
    return tuple(_linear(layer, x) for layer in layers)


def _rotated(att: nn.Module, norm_name: str, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    norm = getattr(att, norm_name, None)
    if norm is None:
        return fused.rotate(x, *rotary)
    if not _plain(norm):
        return fused.rotate(norm(x), *rotary)
    return fused.rotate(x, *rotary, norm.weight, norm.variance_epsilon)


def _linear(layer: nn.Module, x: Tensor) -> Tensor:
    return linear(x, layer.weight, layer.bias) if _plain(layer) else layer(x)


def _plain(*modules: nn.Module) -> bool:
    """Whether the modules are no more than their weights."""
    return all(type(m) in (nn.Linear, *NORMS) for m in modules)


def _window(att: nn.Module) -> int | None:
    """How many tokens the layer looks back on; Mistral's says it in the config alone, Llama's has no window."""
    if att.config.model_type == "mistral":
        return att.config.sliding_window
    return getattr(att, "sliding_window", None)
