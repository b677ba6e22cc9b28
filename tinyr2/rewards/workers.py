"""Processes that may hang: each answers one question at a time, and is killed when its time is up.

In: pairs of answers. Out: for each True, False, or None where the worker said so, broke, or ran out of time. A process
of their own and SIGKILL, because nothing less stops a computation inside C code.
"""

import json
import os
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path

from tinyr2.core.errors import RunError

JUDGE = Path(__file__).with_name("judge.py")
_START_S = 60.0  # to import sympy, on a machine that is busy with other things
_STARTS = 3  # that may fail one after another
_GRACE_S = 0.5  # after which the kernel ends a worker that nobody has killed


class Workers:
    """`count` processes that run `program`, started when the first question comes, gone when this process is.

    `asked` counts the questions, `killed` the workers that ran out of time or broke.
    """

    def __init__(self, count: int, timeout_s: float, program: Path = JUDGE):
        self.asked = self.killed = 0
        self._count = count
        self._timeout_s = timeout_s
        self._program = program
        self._failed_starts = 0  # since the last question
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()
        self._end = weakref.finalize(self, _kill_all, self._workers)

    def ask(self, questions: Sequence[tuple[str, str]]) -> list[bool | None]:
        """One verdict for each (gold, given); a question that hangs costs itself, and the others no more than a turn.

        RunError: a worker cannot be started.
        """
        verdicts: list[bool | None] = [None] * len(questions)
        waiting = deque(range(len(questions)))
        with self._lock:
            self.asked += len(questions)
            try:
                while waiting or any(w.question is not None for w in self._workers):
                    self._hand_out(waiting, questions)
                    self._collect(verdicts, waiting)
            except BaseException:  # a worker that still computes would answer the next batch
                _kill_all(self._workers)
                raise
        return verdicts

    def close(self) -> None:
        """Kill every worker; the next question starts new ones."""
        with self._lock:
            _kill_all(self._workers)

    def _hand_out(self, waiting: deque[int], questions: Sequence[tuple[str, str]]) -> None:
        for worker in self._workers:
            if waiting and worker.ready and worker.question is None:
                self._failed_starts = 0
                worker.take(waiting.popleft(), questions, self._timeout_s)
        coming = sum(not worker.ready for worker in self._workers)
        missing = min(self._count - len(self._workers), len(waiting) - coming)
        self._workers.extend(_Worker(self._program) for _ in range(missing))

    def _collect(self, verdicts: list[bool | None], waiting: deque[int]) -> None:
        """Wait for an answer, or for the next deadline; note what came, and bury who is late or dead."""
        active = [w for w in self._workers if w.question is not None or (waiting and not w.ready)]
        soonest = min(w.deadline for w in active)
        heard = wait([w.out for w in active], max(0.0, soonest - time.monotonic()))
        for worker in active:
            question = worker.question
            verdict = worker.hear() if worker.out in heard else _SILENCE
            if verdict is not _SILENCE and question is not None:
                verdicts[question] = verdict
            elif worker.dead or time.monotonic() >= worker.deadline:
                self._bury(worker, waiting)

    def _bury(self, worker: "_Worker", waiting: deque[int]) -> None:
        worker.kill()
        self._workers.remove(worker)
        self._failed_starts += not worker.ready
        if self._failed_starts == _STARTS:
            self._failed_starts = 0
            raise RunError(f"a verifier's process did not start; see why with: {sys.executable} -P {self._program}")
        if worker.unread:
            assert worker.question is not None
            waiting.appendleft(worker.question)
        else:
            self.killed += worker.ready


_SILENCE = object()


class _Worker:
    """One process: not ready until its first message, then idle, or busy with `question` until `deadline`."""

    def __init__(self, program: Path):
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, bufsize=0, start_new_session=True)  # Ctrl-C is for the parent
        assert self._process.stdout is not None
        self.out = self._process.stdout
        self.ready = self.dead = self.unread = False
        self.question: int | None = None
        self.deadline = time.monotonic() + _START_S
        self._heard = b""

    def take(self, question: int, questions: Sequence[tuple[str, str]], timeout_s: float) -> None:
        """Send a question; a process that has died meanwhile is `dead`, the question `unread`."""
        data = json.dumps([*questions[question], timeout_s + _GRACE_S]).encode()
        assert len(data) < 60_000, "a question fits into the pipe, so that writing never waits"
        assert self._process.stdin is not None
        self.question, self.deadline = question, time.monotonic() + timeout_s
        try:
            self._process.stdin.write(struct.pack(">I", len(data)) + data)
        except BrokenPipeError:
            self.dead = self.unread = True

    def hear(self) -> bool | object | None:
        """A verdict, or _SILENCE while there is no whole message, or where it only says that the process is ready."""
        data = os.read(self.out.fileno(), 65536)
        self.dead = not data
        self._heard += data
        if len(self._heard) < 4 or len(self._heard) < (end := 4 + struct.unpack(">I", self._heard[:4])[0]):
            return _SILENCE
        message, self._heard = json.loads(self._heard[4:end]), self._heard[end:]
        if not self.ready:
            self.ready = True
            self.deadline = float("inf")
            return _SILENCE
        self.question = None
        return message

    def kill(self) -> None:
        """End the process, and leave no zombie."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


def _kill_all(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().kill()
