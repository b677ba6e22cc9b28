"""The console: a live progress line, sample completions, alarms and tables, in color on a terminal, plain elsewhere.

In: metrics as the training loop has them, completions, alarm rows, tables. Out: text on one stream: standard output, or
standard error where the last line of standard output is to be one JSON object.
"""

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from os import environ
from types import TracebackType
from typing import Any, TextIO

from rich import box
from rich.console import Console as RichConsole
from rich.live import Live
from rich.panel import Panel
from rich.table import Table as RichTable
from rich.text import Text

from tinyr2.report.completions import Completion
from tinyr2.report.jsonl import strict_json
from tinyr2.report.table import Table, to_text
from tinyr2.report.text import clean

_SHOWN = (("loss", "loss", ".4f"), ("kl", "kl", ".4f"), ("reward", "reward", ".3f"),
          ("completions/mean_length", "length", ".1f"))
_SAMPLE_CHARACTERS = 1200
_WINDOW = 20  # progress calls over which rates are measured


class Console:
    """What a person sees of a run. A context manager: leaving it ends the live line.

    plain: None chooses by the stream: plain where it is no terminal, or TERM is "dumb", or NO_COLOR is set.
    every: seconds between two progress lines of plain output.
    """

    def __init__(self, json_mode: bool = False, plain: bool | None = None, *, stream: TextIO | None = None,
                 every: float = 5.0, clock: Callable[[], float] = time.monotonic):
        self.json_mode = json_mode
        self._stream = stream or (sys.stderr if json_mode else sys.stdout)
        self.plain = _is_plain(self._stream) if plain is None else plain
        self._rich = None if self.plain else RichConsole(file=self._stream, force_terminal=True, highlight=False)
        self._live: Live | None = None
        self._every, self._clock = every, clock
        self._marks: deque[tuple[float, int, float | None]] = deque(maxlen=_WINDOW)  # time, step, tokens so far
        self._printed_at: float | None = None
        self._pending: str | None = None  # a progress line that the clock held back

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def progress(self, step: int, total: int, metrics: Mapping[str, float], name: str = "step") -> None:
        """Show where the run is; call it at every step. Rates come from the console's own clock and `num_tokens`."""
        self._marks.append((self._clock(), step, metrics.get("num_tokens")))
        line = self._line(step, total, metrics, name)
        if self._rich is not None:
            if self._live is None:
                # in JSON mode standard output is not this console's, so what goes there is left alone
                self._live = Live(console=self._rich, auto_refresh=False, redirect_stdout=not self.json_mode)
                self._live.start()
            self._live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)
        else:
            now = self._clock()
            due = self._printed_at is None or now - self._printed_at >= self._every
            self._pending = None if due else line
            if due:
                self._printed_at = now
                self._write(line)
        if step >= total:
            self.end_progress()

    def end_progress(self) -> None:
        """Leave the last progress line standing; the next `progress` begins a new one."""
        if self._live is not None:
            self._live.stop()
        elif self._pending is not None:
            self._write(self._pending)
        self._live = self._pending = self._printed_at = None
        self._marks.clear()

    def sample(self, completion: Completion) -> None:
        """Print one completion with its prompt and reward. What the model wrote cannot steer the terminal."""
        reward = "" if completion.reward is None else f" · reward {completion.reward:.3g}"
        head = f"sample at step {completion.step}{reward} · {clean(completion.author)} · {clean(completion.finish)}"
        prompt, text = _shortened(clean(completion.prompt)), _shortened(clean(completion.completion))
        if self._rich is None:
            self._write("\n".join([f"--- {head}", _indented("prompt", prompt), _indented("completion", text)]))
        else:
            body = Text.assemble((self._fit(prompt).strip() + "\n", "dim"), self._fit(text))
            self._rich.print(Panel(body, title=Text(self._fit(head)), title_align="left", border_style="dim"))

    def alarm(self, row: Mapping[str, Any]) -> None:
        """Print an alarm, a row of events.jsonl: level, name, step, evidence and action."""
        level = str(row.get("level", "warn"))
        text = f"{level.upper()} {row.get('name')} at step {row.get('step')}: {row.get('evidence')}"
        self._say(text, "bold red" if level == "critical" else "yellow")
        if row.get("action"):
            self._say(f"  what to do: {row['action']}", "")

    def note(self, text: str) -> None:
        """Print a line for the person."""
        self._say(text, "")

    def table(self, table: Table) -> None:
        """Print a table."""
        if self._rich is None:
            self._write(to_text(table))
            return
        shown = RichTable(box=box.SIMPLE_HEAD, title=Text(self._fit(table.title)) if table.title else None,
                          title_justify="left")
        shown.add_column("")
        for column in table.columns:
            shown.add_column(Text(self._fit(column)), justify="right", no_wrap=True)
        for row in table.rows:
            shown.add_row(*(Text(self._fit(text)) for text in (row.name, *row.cells)))
        self._rich.print(shown)

    def result(self, value: Mapping[str, Any]) -> None:
        """In JSON mode print `value` as one line on standard output; the caller prints nothing there after it."""
        if self.json_mode:
            self.end_progress()
            sys.stdout.write(strict_json(value) + "\n")
            sys.stdout.flush()

    def close(self) -> None:
        """End the live line, so that the terminal is as it was; a progress line held back is printed."""
        self.end_progress()

    def _line(self, step: int, total: int, metrics: Mapping[str, float], name: str) -> str:
        figures = [f"{label} {metrics[key]:{form}}" for key, label, form in _SHOWN if metrics.get(key) is not None]
        (began, first, before), (now, _, tokens) = self._marks[0], self._marks[-1]
        left: list[str] = []  # early in the line, so that a narrow terminal cuts off something else
        if now > began and step > first:
            left = [f"ETA {_duration((total - step) * (now - began) / (step - first))}"]
            if tokens is not None and before is not None:
                figures.append(f"{(tokens - before) / (now - began):,.0f} tokens/s")
        return clean(" · ".join([f"{name} {step}/{total}", *left, *figures]))

    def _say(self, text: str, style: str) -> None:
        if self._rich is None:
            self._write(clean(text))
        else:
            self._rich.print(Text(self._fit(clean(text)), style=style))

    def _write(self, text: str) -> None:
        self._stream.write(self._fit(text) + "\n")
        self._stream.flush()

    def _fit(self, text: str) -> str:
        """`text` in what the stream can encode: a model may write any character, a terminal may be ASCII."""
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        return text.encode(encoding, "replace").decode(encoding)


def _is_plain(stream: TextIO) -> bool:
    return not stream.isatty() or environ.get("TERM") == "dumb" or bool(environ.get("NO_COLOR"))


def _shortened(text: str) -> str:
    if len(text) <= _SAMPLE_CHARACTERS:
        return text
    half = _SAMPLE_CHARACTERS // 2
    return f"{text[:half]}\n… {len(text) - 2 * half:,} characters …\n{text[-half:]}"


def _indented(label: str, text: str) -> str:
    return f"{label}:\n" + "\n".join(f"    {line}" for line in text.split("\n"))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
