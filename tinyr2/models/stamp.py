"""Whether a model's weights are still those that were seen.

In: a model. Out: a stamp to hold against it later. It sees new tensors, moved ones, writes that autograd counts, and
adapters that were switched or merged. It does not see writes behind autograd's back: through `.data`, or by torch's
fused optimizers unless their steps are counted, as `train.optim` does.
"""

import torch
from torch import Tensor, nn

from tinyr2.core.errors import RunError


class Stamp:
    """A model's parameters, buffers and adapter switches at one moment."""

    def __init__(self, model: nn.Module):
        self._seen = _look(model)

    def require(self, model: nn.Module, version: int) -> None:
        """RunError where `model` has changed since; `version` is what its policy was called."""
        if _look(model) != self._seen:
            raise RunError(f"stale weights: they have changed since the policy of version {version} first wrote with "
                           "them; make a new one after each optimizer step, or refresh its decode copy")


def _look(model: nn.Module) -> tuple:
    weights = tuple(_mark(t) for t in (*model.parameters(), *model.buffers()))  # a router's bias is a buffer
    switches = tuple((tuple(m.active_adapters), m.disable_adapters, m.merged) for m in model.modules()
                     if hasattr(m, "active_adapters") and hasattr(m, "merged"))
    return weights, switches


def _mark(tensor: Tensor) -> tuple[int, torch.dtype, int]:
    return tensor.data_ptr(), tensor.dtype, 0 if tensor.is_inference() else tensor._version
