"""What is made sure of before a server is asked anything: that it answers, and serves the model that the config names.

In: a client. Out: the server's version, or a ConfigError that says what is wrong or what it serves instead.
"""

from typing import Any

from tinyr2.core.config import nearest
from tinyr2.core.errors import ConfigError
from tinyr2.core.net import Client, Fault, Request

_SHOWN = 8  # names in a message


def find_version(client: Client) -> str | None:
    """The version that the server says it has; None where it says none. ConfigError where nobody answers."""
    for path in ("/version", "/server_info", "/get_server_info"):
        found = ask_if_known(client, Request(path=path, probe=True, key=path))
        if isinstance(found, dict) and isinstance(found.get("version"), str):
            return found["version"]
    return None


def check_model(client: Client) -> None:
    """ConfigError where the server lists its models, and the configured one is not among them."""
    config = client.config
    found = ask_if_known(client, Request(path="/v1/models", probe=True, key="models"))
    if not isinstance(found, dict) or not isinstance(found.get("data"), list):
        return  # it lists none; the probe asks for the model by name
    served = [str(card.get("id")) for card in found["data"] if isinstance(card, dict)]
    if config.model not in served:
        hint = nearest(config.model, served)
        cure = f"did you mean {hint!r}? " if hint else ""
        raise ConfigError(f"{config.url}: the server has no model {config.model!r}; {cure}it serves "
                          f"{', '.join(served[:_SHOWN]) or 'none'}; set model to one of these")


def ask_if_known(client: Client, request: Request) -> Any:
    """The answer's JSON, or None where the server does not know the path. ConfigError for any other fault."""
    try:
        return client.ask(request, lambda answer: answer)
    except Fault as fault:
        if fault.status in (404, 405) or fault.kind in ("refused", "garbled"):
            return None
        cure = ("mend api_key_env" if fault.status in (401, 403) else "start the server, or mend url"
                if fault.kind in ("connection", "timeout") else "mend the server")
        raise ConfigError(f"{fault.text}; {cure}") from fault
