"""Work in a child process: its memory is given back when it ends, and torch is there as it was imported.

In: a function of a module (it is pickled by name) and its arguments. Out: what it returned, or in words why it returned
nothing.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from tinyr2.core.errors import UserError
from tinyr2.report.console import Console


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How the work of a child ended."""

    value: Any = None  # what it returned
    fault: str | None = None  # why it returned nothing, as "was interrupted" or "could not go on: …"
    interrupted: bool = False  # SIGINT or SIGTERM came in the meantime


def run_in_child(work: Callable[..., Any], *args: Any, json_mode: bool = False) -> Ended:
    """`work(*args, console)` in a child process, with a console of its own; waits for its end.

    SIGINT and SIGTERM are passed on as a SIGTERM, at which a training run saves a checkpoint and returns; a second one
    kills the child. A child whose parent dies, dies.
    """
    # a server that has imported torch, so that no child pays for it, and that has computed nothing
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([work.__module__])
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(send, work, args, json_mode))
    child.start()
    send.close()
    with _passed_on(child) as came:
        try:
            value, fault = receive.recv()
            child.join()
        except EOFError:
            child.join()
            value, fault = None, _last_word(child.exitcode)
    return Ended(value=value, fault=fault, interrupted=bool(came))


def _last_word(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


@contextmanager
def _passed_on(child: BaseProcess) -> Iterator[list[int]]:
    """The signals that came, each passed on to the child."""
    came: list[int] = []
    names = (signal.SIGTERM, signal.SIGINT)
    before = {s: signal.getsignal(s) for s in names}

    def pass_on(number: int, _frame: Any) -> None:
        came.append(number)
        if len(came) == 1:
            child.terminate()
        else:
            child.kill()

    for s in names:
        signal.signal(s, pass_on)
    try:
        yield came
    finally:
        for s in names:
            signal.signal(s, before[s])


def _child(send: Connection, work: Callable[..., Any], args: tuple[Any, ...], json_mode: bool) -> None:
    """Do the work and send (what it returned, None), or (None, why it returned nothing)."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        with Console(json_mode=json_mode) as console:
            told = work(*args, console), None
    except UserError as error:
        told = None, f"could not go on: {error}"
    except KeyboardInterrupt:
        told = None, "was interrupted"
    sys.stdout.flush()
    with suppress(BrokenPipeError):  # who asked may be gone
        send.send(told)
    send.close()


def _die_with_parent() -> None:
    """As if killed: every file is whole or absent at any moment, and whoever starts anew finds no lock held."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
