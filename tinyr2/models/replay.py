"""Steps that are recorded once for each of few shapes, and then repeated: on CUDA, hundreds of kernels in one launch.

In: a decoder's step, its tokens, and a way to capture. Out: the states that the step itself would give. What is
captured reads and writes fixed addresses, so a step's inputs are copied to where they always lie, and all captured
steps are forgotten when stores or weights have moved.
"""

import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from tinyr2.models.slots import Group, Step

Run = Callable[[Tensor, Step], Tensor]  # tokens (R,) and their step → states (R, D); may be run twice in one place
Body = Callable[[], Tensor]
Capture = Callable[[Body], Body]  # what it returns repeats the work, and returns the result


@dataclass(frozen=True)
class _Inputs:
    """What captured steps of R slots read."""

    tokens: Tensor  # (R,) int64
    column: Tensor  # (R,) int64
    slot: Tensor  # (R,) int64, 0 ... R-1

    @classmethod
    def of(cls, slots: int, device: torch.device) -> "_Inputs":
        tokens, column = torch.zeros(2, slots, dtype=torch.long, device=device)
        return cls(tokens, column, torch.arange(slots, device=device))

    def step(self, width: int) -> Step:
        """A step at these addresses; its masks are made anew by each run, so that a captured one makes its own."""
        return Step(self.slot, self.column, width, (Group(width, None, self.column),))


class Replay:
    """Captured steps, by their number of slots and of columns."""

    def __init__(self, capture: Capture):
        self._capture = capture
        self._inputs: dict[int, _Inputs] = {}
        self._captured: dict[tuple[int, int], Body] = {}
        self._places: Hashable = None

    def __call__(self, run: Run, tokens: Tensor, step: Step, places: Hashable) -> Tensor:
        """`run` for tokens (R,) and a static step of R slots or more → (R, D), a fresh tensor.

        places: equal to those of the call before if nothing has moved that `run` reads or writes
        """
        if places != self._places:
            self._captured.clear()
            self._places = places
        slots, width = len(step.slot), step.width
        if slots not in self._inputs:
            self._inputs[slots] = _Inputs.of(slots, tokens.device)
        inputs = self._inputs[slots]
        inputs.tokens[:len(tokens)].copy_(tokens)  # free slots feed whatever was there
        inputs.column.copy_(step.column)
        if (slots, width) not in self._captured:
            self._captured[slots, width] = self._capture(lambda: run(inputs.tokens, inputs.step(width)))
        return self._captured[slots, width]()[:len(tokens)].clone()  # the next call overwrites what it returned


class CudaGraphs:
    """Captures as graphs of one CUDA device, which share a stream and a pool of memory: they never run side by side.

    PyTorch's documentation, "CUDA semantics", "CUDA Graphs": warm-up, capture, and a pool that several graphs share.
    """

    def __init__(self, device: torch.device):
        self._device, self._stream, self._pool = device, torch.cuda.Stream(device), None
        self._alive: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    def __call__(self, body: Body) -> Body:
        with torch.cuda.device(self._device):
            if not self._alive:  # a pool that has lost its last graph takes no other
                self._pool = torch.cuda.graph_pool_handle()
            self._warm_up(body)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                out = body()
        self._alive.add(graph)

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

    def _warm_up(self, body: Body) -> None:
        """Run once uncaptured, on the same stream: libraries set themselves up for it in ways that no graph may hold.
        The work is done twice for that, to the same end: a step's keys and values go where they went before."""
        here = torch.cuda.current_stream()
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            body()
        here.wait_stream(self._stream)
