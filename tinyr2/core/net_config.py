"""How a server is reached, how patiently, and what may be spent on it.

In: values from a config file, and one environment variable. Out: a frozen config, and the headers of every request.
"""

import os
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from tinyr2.core.config import Config
from tinyr2.core.errors import ConfigError


class NetConfig(Config):
    """How a server is reached, how patiently, and what may be spent on it. Times are seconds."""

    passing = frozenset({
        "url", "api_key_env", "connect_timeout", "write_timeout", "read_timeout", "pool_timeout", "total_timeout",
        "max_in_flight", "max_retries", "backoff", "max_backoff", "budget_requests", "budget_tokens"})

    url: str
    model: str = Field(min_length=1)  # the name that the server gives it
    api_key_env: str | None = None  # the environment variable that holds the key
    connect_timeout: float = Field(10.0, gt=0.0)
    write_timeout: float = Field(30.0, gt=0.0)
    read_timeout: float = Field(300.0, gt=0.0)  # until the next byte of the answer
    pool_timeout: float = Field(60.0, gt=0.0)  # until a connection is free
    total_timeout: float = Field(900.0, gt=0.0)  # for the whole answer, however its bytes drip
    max_in_flight: int = Field(16, ge=1)
    max_retries: int = Field(6, ge=0)
    backoff: float = Field(0.5, ge=0.0)  # the longest first pause; it doubles from try to try
    max_backoff: float = Field(30.0, ge=0.0)
    # for one server and run; after a resume only the answers that were kept count as spent
    budget_requests: int | None = Field(None, ge=1)
    budget_tokens: int | None = Field(None, ge=1)

    @field_validator("url")
    @classmethod
    def _base(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("a server's address looks like http://127.0.0.1:8000")
        if parts.username or parts.password:
            raise ValueError("an address holds no password; name the variable that holds the key in api_key_env")
        return url.rstrip("/").removesuffix("/v1")


def headers_of(config: NetConfig) -> dict[str, str]:
    """JSON, and the key where there is one. ConfigError where its variable is not set."""
    headers = {"content-type": "application/json"}
    if config.api_key_env is not None:
        key = os.environ.get(config.api_key_env)
        if not key:
            raise ConfigError(f"api_key_env: the environment variable {config.api_key_env} is not set; export it with "
                              "the server's key, or remove api_key_env")
        headers["authorization"] = f"Bearer {key}"
    return headers
