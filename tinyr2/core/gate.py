"""Back-pressure: how many requests may run at once, by what the server bears.

In: the beginning and the end of each request, and whether the server was under pressure. Out: leave to begin.
"""

import threading
import time


class Gate:
    """Additive increase, multiplicative decrease of the number of requests in flight; never above `most`.

    A request that went well adds 1 / limit, one that met pressure halves the limit, but only if it began after the
    last halving: what was sent into the same jam says nothing new. Chiu and Jain 1989.
    """

    def __init__(self, most: int) -> None:
        assert most >= 1, f"{most} requests at once"
        self.most = most
        self.limit = float(most)
        self._running = 0
        self._eased = self._opens = self._since = float("-inf")
        self._busy = 0.0
        self._changed = threading.Condition()

    def enter(self) -> float:
        """Wait for leave to begin; the clock (seconds, monotonic) at which it was given."""
        with self._changed:
            while True:
                now = time.monotonic()
                if now >= self._opens and self._running < int(self.limit):
                    break
                self._changed.wait(self._opens - now if now < self._opens else None)
            if self._running == 0:
                self._since = now
            self._running += 1
            return now

    def leave(self, began: float, *, pressed: bool) -> None:
        """A request that began at `began` is over."""
        with self._changed:
            now = time.monotonic()
            self._running -= 1
            if self._running == 0:
                self._busy += now - self._since
            if not pressed:
                self.limit = min(float(self.most), self.limit + 1 / self.limit)
            elif began > self._eased:
                self.limit, self._eased = max(1.0, self.limit / 2), now
            self._changed.notify_all()

    def hold(self, seconds: float) -> None:
        """Let nothing begin for so long: the server asked for it."""
        with self._changed:
            self._opens = max(self._opens, time.monotonic() + seconds)

    @property
    def busy_seconds(self) -> float:
        """Seconds in which at least one request was running."""
        with self._changed:
            return self._busy + (time.monotonic() - self._since if self._running else 0.0)
