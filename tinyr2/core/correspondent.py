"""What everyone who asks a server has: a client, a journal of what it said, and one account of both.

In: where the server is, and where its answers are kept. Out: the base of those who know what to ask.
"""

from pathlib import Path

from tinyr2.core.answers import Answers
from tinyr2.core.ledger import Accounting
from tinyr2.core.net import Client
from tinyr2.core.net_config import NetConfig


class Correspondent:
    """One server and its journal; tokens and requests that the journal remembers count against the caps."""

    def __init__(self, config: NetConfig, journal: Path | None) -> None:
        """journal: None: nothing is kept"""
        self.version: str | None = None  # of the server, where it says one
        self._client = Client(config)
        self._answers = Answers(journal)
        self._client.spent_before, self._client.asked_before = self._answers.tokens, len(self._answers)

    @property
    def accounting(self) -> Accounting:
        """What was asked since this one was made, and what became of it."""
        return self._client.accounting

    def close(self) -> None:
        """Give connections and journal back."""
        self._client.close()
        self._answers.close()
