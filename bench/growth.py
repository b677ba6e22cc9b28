"""W7: learner and teacher passes on 16,384 tokens, as 64 rows of 256 and so on to 2 rows of 8,192.

    python bench/growth.py --steps 5

Attention grows with a row's length; nothing else may. Its calls are timed inside the passes, forward and backward, and
taken away: `variation` is the largest rest over the smallest, minus 1. Prints one JSON line and draws docs/growth.svg.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from distill_step import character_tokenizer, model
from sides import HERE, peak_mib
from torch import Tensor, nn

import tinyr2.models.packed as packed
from tinyr2.models.head import head_of, run
from tinyr2.objectives.divergence import Divergence

TOKENS = 16384
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)


@dataclass
class Watch:
    """Seconds spent in attention, and how often it was called."""

    seconds: float = 0.0
    calls: list[str] = field(default_factory=list)

    def time(self, name: str, call: Callable[[], object]) -> object:
        start = time.perf_counter()
        result = call()
        self.seconds += time.perf_counter() - start
        self.calls.append(name)
        return result


class _Timed(torch.autograd.Function):
    """Attention with a clock around its forward and its backward."""

    @staticmethod
    def forward(ctx, watch: Watch, call: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.watch, ctx.leaves = watch, [x.detach().requires_grad_() for x in inputs]
        with torch.enable_grad():
            ctx.out = watch.time("forward", lambda: call(*ctx.leaves))
        return ctx.out.detach()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.watch.time("backward", lambda: torch.autograd.grad(ctx.out, ctx.leaves, grad))
        return None, None, *grads


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=5, help="passes of each shape; the first two are not counted")
    parser.add_argument("--threads", type=int, default=2)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    vocab = len(character_tokenizer())
    student, teacher = model(128, 4, vocab, TOKENS).train(), model(256, 4, vocab, TOKENS).eval().requires_grad_(False)
    watch = watched()
    tokens = torch.randint(3, vocab, (TOKENS,))
    taken: dict[int, list[tuple[float, float]]] = {length: [] for length in LENGTHS}
    for _ in range(a.steps):
        for length in LENGTHS:
            taken[length].append(passes(student, teacher, tokens, length, watch))
    shapes = [summary(length, pairs[2:] or pairs) for length, pairs in taken.items()]
    rest = [shape["rest_s"] for shape in shapes]
    (HERE.parent / "docs" / "growth.svg").write_text(plot(shapes))
    print(json.dumps({"side": "tinyr2", **vars(a), "variation": round(max(rest) / min(rest) - 1, 4), "shapes": shapes,
                      "peak_mib": peak_mib()}))


def watched() -> Watch:
    """Put a clock around the attention of the packed forward."""
    watch, attend = Watch(), packed.attend_ordered

    def timed(rows: packed.Layout, qkv: Sequence[Tensor], *settings) -> Tensor:
        def call(*inputs: Tensor) -> Tensor:
            return attend(rows, inputs, *settings)

        if torch.is_grad_enabled():
            return _Timed.apply(watch, call, *qkv)
        return watch.time("forward", lambda: call(*qkv))

    packed.attend_ordered = timed
    return watch


def passes(student: nn.Module, teacher: nn.Module, tokens: Tensor, length: int, watch: Watch) -> tuple[float, float]:
    """Seconds of one teacher forward, learner forward, head and backward; and those of attention among them."""
    lengths = [length] * (TOKENS // length)
    position = torch.arange(length).repeat(len(lengths))
    learn = position.nonzero()[:, 0]
    student.zero_grad()
    watch.seconds, watch.calls = 0.0, []
    start = time.perf_counter()
    with torch.no_grad():
        judged = packed.hidden_states(teacher, tokens, position, lengths)[learn - 1]
    states = packed.hidden_states(student, tokens, position, lengths)[learn - 1]
    result = run(states, head_of(student), tokens[learn], lambda s: s.divergence.sum() / len(learn),
                 divergence=Divergence(), teacher_hidden=judged, teacher_head=head_of(teacher))
    result.loss.backward()
    total = time.perf_counter() - start
    layers = student.config.num_hidden_layers
    expected = {"forward": layers + teacher.config.num_hidden_layers, "backward": layers}
    assert {name: watch.calls.count(name) for name in expected} == expected, f"attention calls: {watch.calls}"
    return total, watch.seconds


def summary(length: int, pairs: list[tuple[float, float]]) -> dict:
    """Medians of one shape."""
    total, attention = (statistics.median(pair[i] for pair in pairs) for i in (0, 1))
    rest = [pair[0] - pair[1] for pair in pairs]
    return {"rows": TOKENS // length, "length": length, "total_s": round(total, 4), "attention_s": round(attention, 4),
            "rest_s": round(statistics.median(rest), 4), "rest_spread_s": [round(min(rest), 4), round(max(rest), 4)]}


def plot(shapes: list[dict]) -> str:
    """An SVG: one bar for each shape, the rest below, attention on top."""
    width, height, left, bottom, wide = 560, 300, 50, 250, 56
    scale = 200 / max(shape["total_s"] for shape in shapes)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
             'font-size="12">', f'<rect width="{width}" height="{height}" fill="#fff"/>',
             f'<text x="{left}" y="20">Seconds of teacher and learner passes on {TOKENS:,} tokens</text>',
             f'<rect x="{left}" y="30" width="10" height="10" fill="#c9822b"/><text x="{left + 15}" y="39">attention'
             f'</text><rect x="{left + 90}" y="30" width="10" height="10" fill="#33658a"/>'
             f'<text x="{left + 105}" y="39">everything else</text>']
    for i, shape in enumerate(shapes):
        x, rest, attention = left + i * 84, shape["rest_s"] * scale, shape["attention_s"] * scale
        middle, top = x + wide / 2, bottom - rest - attention
        parts += [f'<rect x="{x}" y="{bottom - rest:.1f}" width="{wide}" height="{rest:.1f}" fill="#33658a"/>',
                  f'<rect x="{x}" y="{top:.1f}" width="{wide}" height="{attention:.1f}" fill="#c9822b"/>',
                  f'<text x="{middle}" y="{bottom - 5}" text-anchor="middle" fill="#fff">{shape["rest_s"]:.2f}</text>',
                  f'<text x="{middle}" y="{top - 5:.1f}" text-anchor="middle">{shape["total_s"]:.2f}</text>',
                  f'<text x="{middle}" y="{bottom + 18}" text-anchor="middle">{shape["rows"]} × {shape["length"]:,}'
                  '</text>']
    parts += [f'<text x="{left}" y="{bottom + 40}">rows × tokens; white: all but attention; above: the whole</text>',
              "</svg>"]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
