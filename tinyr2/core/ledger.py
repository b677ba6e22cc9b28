"""What was asked of a server, and what became of it: counts that balance exactly.

In: counts from many threads. Out: an `Accounting`, a picture of them at one instant.
"""

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Accounting:
    """asked = answered + failed + from_journal, and requests = succeeded + retried + given_up, exactly.

    Things asked for are answers; a request is one try to get one. A probe is a request that no answer comes from.
    """

    asked: int = 0
    answered: int = 0  # by the server, and kept
    failed: int = 0  # left without an answer
    from_journal: int = 0  # known already: asked before, or twice in one call
    requests: int = 0
    succeeded: int = 0
    retried: int = 0  # failed, and sent again
    given_up: int = 0  # failed for good
    probes: int = 0
    tokens: int = 0  # sent for answers, tries included
    unsaid: int = 0  # response tokens whose log-prob the server left out
    not_finite: int = 0  # … or gave as NaN or -inf
    seconds: float = 0.0  # in calls
    busy_seconds: float = 0.0  # of these, with at least one request running
    faults: Mapping[str, int] = field(default_factory=dict)  # failed tries and probes, by kind

    @property
    def balanced(self) -> bool:
        """Whether both sums are exact; between calls they are."""
        return (self.asked == self.answered + self.failed + self.from_journal
                and self.requests == self.succeeded + self.retried + self.given_up)


class Ledger:
    """The counts of one server, written by many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._faults: Counter[str] = Counter()

    def add(self, *, fault: str | None = None, **counts: float) -> None:
        """Add to the fields of `Accounting` that `counts` names, and one to the kind of fault."""
        with self._lock:
            self._counts.update(counts)
            if fault is not None:
                self._faults[fault] += 1

    def __getitem__(self, name: str) -> float:
        with self._lock:
            return self._counts[name]

    def picture(self) -> Accounting:
        """All counts at one instant."""
        with self._lock:
            return Accounting(**self._counts, faults=dict(self._faults))
