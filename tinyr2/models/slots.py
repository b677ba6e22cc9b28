"""Caches without padding: each live row is a slot with a length of its own.

In: what the layers of a decoder want to remember of each token. Out: the part of it that a step attends to. A row that
leaves costs one row's copy: the last live one moves into its place.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

UNKNOWN = 2**62  # tokens: where nobody knows how long a row may get
GRAIN = 64  # columns; in exact mode a row attends to its own length rounded up to this, whatever its neighbors need
PAGE = 128  # columns; where steps are captured all rows attend to the longest one's length rounded up to this


class Store:
    """One thing that one layer remembers of each token: (slots, ..., columns, ...), the columns on axis `time`."""

    def __init__(self, shape: Sequence[int], time: int, like: Tensor):
        """shape: of one slot, without the columns; `like` gives dtype and device."""
        self._time = time
        self._resize(like.new_empty(0, *shape[:time - 1], 0, *shape[time - 1:]))

    def _resize(self, data: Tensor) -> None:
        self.data = data
        self.place = object()  # of its own for every place in memory
        self._by_column = data.movedim(self._time, 1)

    def fit(self, slots: int, columns: int, longest: int) -> None:
        """Make room; columns double up to `longest`, so that copies stay rare and short answers small."""
        had, wide = self.data.shape[0], self.data.shape[self._time]
        if had >= slots and wide >= columns:
            return
        shape = list(self.data.shape)
        shape[0] = slots  # not fewer than are in use; what was there for rows that have left is given back
        shape[self._time] = wide if wide >= columns else max(columns, min(max(2 * columns, 128), longest))
        data = self.data.new_empty(shape)
        old, new = self._by_column, data.movedim(self._time, 1)
        kept = min(had, slots)
        new[:kept, :wide] = old[:kept]
        # zeros: a masked column still enters 0 x value, and an uninitialized NaN would spread
        new[:kept, wide:] = 0
        new[kept:] = 0
        self._resize(data)

    def seen(self, slots: int, columns: int) -> Tensor:
        """The first columns of the first slots, heads beside slots: (slots * heads, ...), a view."""
        data = self.data
        shape = list(data.shape[1:])
        shape[self._time - 1] = columns
        stride = data.stride()[1:]
        return data.as_strided((slots * shape[0], *shape[1:]), stride)

    def write(self, slot: Tensor, column: Tensor, values: Tensor) -> None:
        """values (n, ...) go to slot[i], column[i]."""
        self._by_column[slot, column] = values

    def move(self, to: Tensor, source: Tensor, columns: int) -> None:
        """The first `columns` of slots `source` replace those of slots `to`."""
        part = self._by_column[:, :columns]
        part[to] = part[source]


@dataclass
class Group:
    """Some rows that attend to the same number of columns."""

    width: int
    lengths: tuple[int, ...] | None  # columns that each row may see; None: `column` alone says it
    column: Tensor  # (R,) the last of them
    rows: Tensor | None = None  # (R,) which slots; None: slots 0 ... R-1
    _masks: dict = field(default_factory=dict)

    def mask(self, copies: int, window: int | None = None) -> Tensor | None:
        """(R * copies, 1, width) float32: 0 or -inf, each row repeated for its heads; None where nothing is hidden."""
        full = self.lengths is not None and min(self.lengths) == self.width
        if full and (window is None or window >= self.width):
            return None
        if (copies, window) not in self._masks:
            index, last = torch.arange(self.width, device=self.column.device)[None], self.column[:, None]
            hidden = index > last if window is None else (index > last) | (index <= last - window)
            mask = torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, float("-inf"))
            self._masks[copies, window] = mask.repeat_interleave(copies, 0)[:, None]
        return self._masks[copies, window]


@dataclass(frozen=True)
class Step:
    """One new token per slot, to be written at `column`; then attend, group by group."""

    slot: Tensor  # (R,) 0 ... R-1
    column: Tensor  # (R,)
    width: int  # of the longest row, the new token included
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class Fill:
    """Where packed prompt tokens go: token source[i] to slot[i], column[i]."""

    source: Tensor
    slot: Tensor
    column: Tensor
    slots: int
    width: int
    longest: int

    def into(self, store: Store, values: Tensor) -> None:
        """values (T, ...), one per packed token."""
        store.fit(self.slots, self.width, self.longest)
        store.write(self.slot, self.column, values[self.source])


class SlotCache:
    """Stores of R live rows, in slots 0 ... R-1, of `lengths` tokens each."""

    def __init__(self, layers: list[list[Store]], device: torch.device, *, longest: int = UNKNOWN, exact: bool = False,
                 static: bool = False):
        """longest: tokens that a row may come to have, where known    exact: rows are grouped by their lengths
        static: a step has one of few shapes: its rows are rounded up, with free slots, and its columns too"""
        self.layers = layers  # of each layer, the stores that it reads and writes
        self._grain = GRAIN if exact else PAGE if static else 1
        self._longest = _rounded(longest, self._grain)
        self.lengths: list[int] = []
        self._column = torch.zeros(0, dtype=torch.long, device=device)
        self._exact, self._static = exact, static

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def places(self) -> tuple[object, ...]:
        """Where the stores lie: equal to what it was as long as none has moved."""
        return tuple(s.place for stores in self.layers for s in stores)

    @property
    def _seats(self) -> int:
        return seats(len(self)) if self._static else len(self)

    def append(self, prompts: Sequence[Sequence[int]], copies: Sequence[int]) -> Fill:
        """New slots: copies[i] for prompt i, whose tokens lie end to end in a pack."""
        source, slot, column, start = [], [], [], 0
        for prompt, count in zip(prompts, copies, strict=True):
            for _ in range(count):
                source.append(torch.arange(start, start + len(prompt)))
                slot.append(torch.full((len(prompt),), len(self.lengths)))
                column.append(torch.arange(len(prompt)))
                self.lengths.append(len(prompt))
            start += len(prompt)
        device = self._column.device
        self._column = send(self.lengths, device)
        return Fill(*(torch.cat(part).to(device) for part in (source, slot, column)), slots=self._seats,
                    width=_rounded(max(map(len, prompts)), self._grain), longest=self._longest)

    def advance(self) -> Step:
        """Each row grows by one token."""
        column, slots = self._column, self._seats
        self._column = column + 1
        self.lengths = [n + 1 for n in self.lengths]
        longest = max(self.lengths)
        wide = _rounded(longest, self._grain)
        for store in (s for stores in self.layers for s in stores):
            store.fit(slots, wide, self._longest)
        slot = torch.arange(slots, device=column.device)
        if not self._static:
            return Step(slot, column, longest, self._groups(column, longest))
        column = F.pad(column, (0, slots - len(self)))  # a free slot's first column: whoever enters overwrites it
        return Step(slot, column, wide, (Group(wide, None, column),))

    def _groups(self, column: Tensor, width: int) -> tuple[Group, ...]:
        if not self._exact:
            return (Group(width, tuple(self.lengths), column),)
        wide = [_rounded(n, GRAIN) for n in self.lengths]
        groups = []
        for w in sorted(set(wide)):
            rows = [i for i, own in enumerate(wide) if own == w]
            index = send(rows, column.device)
            groups.append(Group(w, tuple(self.lengths[i] for i in rows), column[index], index))
        return tuple(groups)

    @torch.inference_mode()
    def drop(self, gone: set[int]) -> list[int]:
        """Free slots; the last live ones move into the holes. Returns the old slot of each new slot 0 ... R'-1."""
        left = len(self) - len(gone)
        order = list(range(left))
        holes = [s for s in order if s in gone]
        movers = [s for s in range(left, len(self)) if s not in gone]
        for hole, mover in zip(holes, movers, strict=True):
            order[hole] = mover
        device = self._column.device
        if holes:
            to, source = send(holes, device), send(movers, device)
            columns = max(self.lengths[m] for m in movers)
            for store in (s for stores in self.layers for s in stores):
                store.move(to, source, columns)
        self.lengths = [self.lengths[s] for s in order]
        self._column = self._column[send(order, device)]
        return order


def seats(rows: int) -> int:
    """The slots of a step with static shapes: the next power of 2 up to 64, then the next multiple of 64."""
    return 1 << (rows - 1).bit_length() if rows <= 64 else _rounded(rows, 64)


def send(numbers: Sequence[float], device: torch.device, dtype: torch.dtype = torch.long) -> Tensor:
    """A tensor on the device. On CUDA nobody waits: a plain copy would, for all that the device has been given."""
    found = torch.tensor(numbers, dtype=dtype)
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found.to(device)


def _rounded(count: int, grain: int) -> int:
    return -(-count // grain) * grain
