"""Decoding: a copy of a model's weights made for writing, and the steps that it takes.

In: prompts, then one token per live row and step. Out: the hidden states that predict the next tokens, and their
logits. The copy joins projections, folds norms and merges adapters, once for each version of the weights; it knows
when the weights have moved on, and refuses to write with the old ones until it has been refreshed. On CUDA its steps
are captured (`models.replay`).
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial, wraps

import torch
from torch import Tensor, nn

from tinyr2.models.blocks import FeedForward, Form, GroupedAttention, Now, Prompts, floor_of, normalize, pack
from tinyr2.models.logits import bend, head_of
from tinyr2.models.mla import LatentAttention
from tinyr2.models.moe import Experts
from tinyr2.models.packed import body_of, is_steady, layout
from tinyr2.models.products import refill
from tinyr2.models.replay import Capture, CudaGraphs, Replay
from tinyr2.models.slots import UNKNOWN, SlotCache, Step, Store
from tinyr2.models.stamp import Stamp

DENSE = frozenset({"llama", "mistral", "qwen2", "qwen3"})
LATENT = frozenset({"deepseek_v2", "deepseek_v3"})


def supports_decoding(model: nn.Module) -> bool:
    """Whether `Decoder` knows the model's class and its kind of rotary positions."""
    return model.config.model_type in DENSE | LATENT and is_steady(model.config)


def _quiet(method: Callable) -> Callable:
    """Without gradients, and without autocast: the copy has one dtype, and its products have it too."""
    @wraps(method)
    def run(self, *args):
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            return method(self, *args)
    return run


class Decoder:
    """A decode copy of a causal LM's weights: attention and feed-forward of each layer, final norm, head."""

    def __init__(self, model: nn.Module, *, vocab: int | None = None, dtype: torch.dtype | None = None,
                 exact: bool = False, version: int = 0, capture: Capture | None = None):
        """vocab: the head's first so many ids    dtype: of the copy; None: autocast's where it is on, or the head's
        exact: a row's numbers do not depend, bit for bit, on the rows beside it    version: a stamp for the caller
        capture: how steps are captured; None: as graphs on CUDA, not at all elsewhere"""
        assert supports_decoding(model), f"{type(model).__name__}: no decode copy is known for this class"
        body, head = body_of(model), head_of(model, vocab)
        self.form = Form(dtype or _dtype_of(head.weight), exact)
        self.version = version
        self._model, self._vocab = model, vocab
        self._embedding, self._rotary = body.embed_tokens, body.rotary_emb
        self._floor, self._scale, self._softcap = floor_of(body.norm), head.scale, head.softcap
        self._norm = self._head = self._spare = None
        self._turns = torch.zeros(0)
        self._fill()
        self._replay = self._replay_by(capture)

    @property
    def vocab(self) -> int:
        """The ids that it can draw."""
        return self._head.shape[0]

    @property
    def device(self) -> torch.device:
        """Where it writes."""
        return self._embedding.weight.device

    def check(self) -> None:
        """RunError where a weight has changed since it was copied, or an adapter was switched."""
        self._stamp.require(self._model, self.version)

    @_quiet
    def refresh(self, version: int) -> None:
        """Copy the weights as they are now. Off the CPU they take the old ones' place: captured steps stay good."""
        for (attention, feed), layer in zip(self._layers, self._stock(), strict=True):
            attention.load(layer.self_attn, layer.input_layernorm)
            feed.load(layer.mlp, layer.post_attention_layernorm)
        self._load_ends()
        self.version = version

    def new_cache(self, columns: int = UNKNOWN) -> SlotCache:
        """An empty cache, for rows of up to `columns` tokens if that is known."""
        stores, self._spare = self._spare, None
        if stores is None:
            like = torch.empty(0, dtype=self.form.dtype, device=self.device)
            stores = [attention.stores(like) for attention, _ in self._layers]
        return SlotCache(stores, self.device, longest=columns, exact=self.form.exact, static=self._replay is not None)

    def take_back(self, cache: SlotCache) -> None:
        """A cache that nobody uses any more. Captured steps name its stores' place, so the next cache will have them;
        where nothing is captured, their memory is free."""
        if self._replay is not None:
            self._spare = cache.layers

    @_quiet
    def prefill(self, cache: SlotCache, prompts: Sequence[Sequence[int]], copies: Sequence[int]) -> Tensor:
        """Append copies[i] slots for prompt i, which is computed once → (sum(copies), D), each slot's last state."""
        lengths = [len(p) for p in prompts]
        fill = cache.append(prompts, copies)
        position = torch.cat([torch.arange(n) for n in lengths]).to(self.device)
        rows = layout(lengths, self.device, padding=0.0) if self.form.exact else layout(lengths, self.device)
        where = Prompts(rows, fill, self._turns_up_to(max(lengths))[position])
        x = self._embed(torch.tensor([t for p in prompts for t in p], device=self.device))
        for (attention, feed), stores in zip(self._layers, cache.layers, strict=True):
            x = feed(attention.prefill(x, where, stores))
        ends = torch.tensor(lengths).cumsum(0) - 1
        last = torch.repeat_interleave(ends, torch.tensor(list(copies))).to(self.device)
        return self._final(x[last])

    @_quiet
    def step(self, cache: SlotCache, tokens: Tensor) -> Tensor:
        """Feed one token to each slot. tokens (R,) int64 → (R, D), the states that predict the next ones."""
        step = cache.advance()
        turns, run = self._turns_up_to(step.width), partial(self._run, cache.layers)
        if self._replay is None:
            return run(tokens, step)
        places = (cache.places, turns.data_ptr(), self._embedding.weight.data_ptr())
        return self._replay(run, tokens, step, places)

    @_quiet
    def logits(self, states: Tensor) -> Tensor:
        """(n, D) → (n, V) float32, a fresh tensor."""
        return bend(self._head.wide(states), self._scale, self._softcap)

    def _run(self, layers: list[list[Store]], tokens: Tensor, step: Step) -> Tensor:
        """(R,) → (R, D): a step, whose shapes and addresses follow from its arguments alone where it is captured."""
        now = Now(step, self._turns[step.column])
        x = self._embed(tokens)
        for (attention, feed), stores in zip(self._layers, layers, strict=True):
            x = feed(attention.step(x, now, stores))
        return self._final(x)

    def _stock(self) -> Iterator[nn.Module]:
        body = body_of(self._model)
        return iter(body.layers[:body.config.num_hidden_layers])

    @_quiet
    def _fill(self) -> None:
        self._layers = [_copy(layer, self.form) for layer in self._stock()]
        self._load_ends()

    def _load_ends(self) -> None:
        norm, head = body_of(self._model).norm, head_of(self._model, self._vocab)
        self._norm = refill(self._norm, norm.weight.detach().float() * norm.weight.numel() ** 0.5)
        self._head = pack(head.weight, head.bias, self.form, self._head)
        self._stamp = Stamp(self._model)

    def _replay_by(self, capture: Capture | None) -> Replay | None:
        """None: each step is run. Said where it could be hoped for otherwise."""
        if capture is None and self.device.type == "cuda":
            capture = CudaGraphs(self.device)
        if capture is None:
            return None
        routed = any(isinstance(feed, Experts) for _, feed in self._layers)
        if not routed and not self.form.exact:
            return Replay(capture)
        why = ("its experts are given their tokens from the host" if routed else
               "rows whose bits must not depend on their company are grouped by their lengths")
        warnings.warn(f"{type(self._model).__name__}: decoding without captured steps, which is slower: {why}",
                      stacklevel=3)
        return None

    def _embed(self, tokens: Tensor) -> Tensor:
        return self._embedding(tokens).to(self.form.dtype)

    def _final(self, x: Tensor) -> Tensor:
        return normalize(x, self._floor).mul_(self._norm.to(x.dtype))

    def _turns_up_to(self, longest: int) -> Tensor:
        """(n, d/2) complex64, n >= longest: e^{i position theta}, with the scaling that some kinds of rope ask for."""
        if len(self._turns) < longest:
            theta = self._rotary.inv_freq.float()
            angle = torch.arange(longest * 3 // 2, device=self.device)[:, None] * theta
            self._turns = torch.polar(torch.full_like(angle, self._rotary.attention_scaling), angle)
        return self._turns


def _copy(layer: nn.Module, form: Form) -> tuple[GroupedAttention | LatentAttention, FeedForward | Experts]:
    attention = LatentAttention if layer.self_attn.config.model_type in LATENT else GroupedAttention
    feed = Experts if hasattr(layer.mlp, "experts") else FeedForward
    return (attention(layer.self_attn, layer.input_layernorm, form),
            feed(layer.mlp, layer.post_attention_layernorm, form))


def _dtype_of(weight: Tensor) -> torch.dtype:
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
